"""Single weights perturbed alone: which ones to choose, and what was predicted and measured for each."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bridge.exchange.tables import TOP_WEIGHTS

SELECTION = "weight"
FILE = "sampled_weights.csv"
PLACE = ["parameter", "row", "col"]
_PREFIX = "score_"
_SHARE = "share_"


def sampled_metrics(sampled: pd.DataFrame) -> list[str]:
    """The metrics whose scores a table of SAMPLED_WEIGHTS gives."""
    return [column.removeprefix(_PREFIX) for column in sampled if column.startswith(_PREFIX)]


def choose_weights(sampled: pd.DataFrame, metrics: Sequence[str], n: int) -> pd.DataFrame:
    """``n`` of the sampled weights over the whole range of every metric's scores, so that none is favoured.

    The metrics share n equally. Each takes the weights nearest to evenly spaced points of the logarithm of
    ``share_<metric>`` (the share of all weights that score at least as high), from its highest weight to its lowest:
    as many among the ranks 1 to 10 as among those from a million to ten million.

    Args:
        sampled: a table of SAMPLED_WEIGHTS.
        metrics: whose scores are to be covered; the first gives the rank.
        n: how many, from 1; all of them where there are fewer.

    Returns:
        Table TOP_WEIGHTS, highest score by the first metric first, ranked from 1; equal scores in model order.
    """
    free = np.ones(len(sampled), dtype=bool)
    if n < len(sampled):
        for at, metric in enumerate(metrics):
            logs = np.log(sampled[_SHARE + metric].to_numpy(float))
            quota = n // len(metrics) + (at < n % len(metrics))
            for point in np.linspace(logs.min(), logs.max(), quota):
                free[np.argmin(np.where(free, abs(logs - point), np.inf))] = False
    else:
        free[:] = False
    chosen = sampled[~free].sort_values(_PREFIX + metrics[0], ascending=False, kind="stable")
    chosen = chosen.rename(columns={_PREFIX + metrics[0]: "score"}).assign(rank=range(1, len(chosen) + 1))
    return chosen[list(TOP_WEIGHTS.columns)].reset_index(drop=True)


def weight_rows(measurements: pd.DataFrame) -> pd.DataFrame:
    """The measurements of single weights, with row and col as whole numbers."""
    rows = measurements[measurements["selection"] == SELECTION]
    return rows.assign(**{place: rows[place].astype("Int64") for place in ("row", "col") if len(rows)})


def weight_effects(measurements: pd.DataFrame, sampled: pd.DataFrame | None) -> pd.DataFrame:
    """Each single weight's measured effect beside its scores by every metric.

    Columns: perturbation, parameter, row, col, delta_nll, ci_low, ci_high (means over the seeds where a
    perturbation is random), size, value, score_<metric>. ``size`` is abs(delta_nll), also a mean over the
    seeds; infinite where the loss overflowed. Empty without measurements of single weights or without scores.
    """
    rows = weight_rows(measurements)
    if rows.empty or sampled is None:
        return pd.DataFrame()
    effect = rows["delta_nll"].astype(float)
    rows = rows.assign(delta_nll=effect.where(np.isfinite(effect), np.inf), size=effect.abs())
    rows["size"] = rows["size"].where(np.isfinite(rows["size"]), np.inf)
    columns = ["delta_nll", "ci_low", "ci_high", "size"]
    means = rows.groupby(["perturbation", *PLACE], sort=False, dropna=False)[columns].mean().reset_index()
    scores = sampled[[*PLACE, "value", *(_PREFIX + metric for metric in sampled_metrics(sampled))]]
    return means.merge(scores.astype({"row": "Int64", "col": "Int64"}), on=PLACE, how="inner")
