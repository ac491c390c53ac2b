"""Single weights perturbed alone: which ones to choose, and what was predicted and measured for each."""

import numpy as np
import pandas as pd

from bridge.records import TOP_WEIGHTS
from bridge.targets import spread

SELECTION = "weight"
FILE = "sampled_weights.csv"
PLACE = ["parameter", "row", "col"]
_PREFIX = "score_"


def sampled_metrics(sampled: pd.DataFrame) -> list[str]:
    """The metrics whose scores a table of SAMPLED_WEIGHTS gives."""
    return [column.removeprefix(_PREFIX) for column in sampled if column.startswith(_PREFIX)]


def choose_weights(sampled: pd.DataFrame, metric: str, n: int) -> pd.DataFrame:
    """``n`` of the sampled weights, evenly spaced in rank by a metric, the highest always among them.

    Args:
        sampled: a table of SAMPLED_WEIGHTS.
        metric: whose score ranks them; equal scores stay in model order.
        n: how many, from 1; all of them where there are fewer.

    Returns:
        Table TOP_WEIGHTS, highest score first, ranked from 1.
    """
    ordered = sampled.sort_values(_PREFIX + metric, ascending=False, kind="stable")
    positions = spread(len(ordered), n) if n > 1 else [0]
    chosen = ordered.iloc[positions].rename(columns={_PREFIX + metric: "score"})
    return chosen.assign(rank=range(1, len(chosen) + 1))[list(TOP_WEIGHTS.columns)].reset_index(drop=True)


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
