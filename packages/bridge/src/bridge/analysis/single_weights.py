"""Single weights perturbed alone: which ones to choose, and what was predicted and measured for each."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bridge.analysis.measured_sets import infinite_where_undefined
from bridge.exchange import layout
from bridge.exchange.tables import TOP_WEIGHTS


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
    chosen = sampled[_spread_over_ranks(sampled, metrics, n)] if n < len(sampled) else sampled
    score = layout.score_column(metrics[0])
    chosen = chosen.sort_values(score, ascending=False, kind="stable")
    chosen = chosen.rename(columns={score: "score"}).assign(rank=range(1, len(chosen) + 1))
    return chosen[list(TOP_WEIGHTS.columns)].reset_index(drop=True)


def _spread_over_ranks(sampled: pd.DataFrame, metrics: Sequence[str], n: int) -> np.ndarray:
    """Which of the sampled weights are chosen, boolean, (len(sampled),); see ``choose_weights``."""
    chosen = np.zeros(len(sampled), dtype=bool)
    share, remainder = divmod(n, len(metrics))
    for number, metric in enumerate(metrics):
        quota = share + 1 if number < remainder else share
        log_ranks = np.log(sampled[layout.share_column(metric)].to_numpy(float))
        for point in np.linspace(log_ranks.min(), log_ranks.max(), quota):
            distances = np.where(chosen, np.inf, abs(log_ranks - point))
            chosen[np.argmin(distances)] = True
    return chosen


def weight_rows(measurements: pd.DataFrame) -> pd.DataFrame:
    """The measurements of single weights, with row and col as whole numbers."""
    rows = measurements[measurements["selection"] == layout.SINGLE_WEIGHT]
    if rows.empty:
        return rows
    return rows.assign(row=rows["row"].astype("Int64"), col=rows["col"].astype("Int64"))


def weight_effects(measurements: pd.DataFrame, sampled: pd.DataFrame | None) -> pd.DataFrame:
    """Each single weight's measured effect beside its scores by every metric.

    Args:
        measurements: a table of MEASUREMENTS.
        sampled: a table of SAMPLED_WEIGHTS, if there is one.

    Returns:
        Columns: perturbation, parameter, row, col, delta_nll, ci_low, ci_high (means over the seeds where a
        perturbation is random), size, value, score_<metric>. ``size`` is abs(delta_nll), also a mean over the
        seeds; infinite where the loss overflowed. Empty without measurements of single weights or without scores.
    """
    rows = weight_rows(measurements)
    if rows.empty or sampled is None:
        return pd.DataFrame()
    size = infinite_where_undefined(rows["delta_nll"].abs())
    rows = rows.assign(delta_nll=infinite_where_undefined(rows["delta_nll"]), size=size)
    rows = rows.sort_values("seed", kind="stable")  # means do not depend on the order of the rows
    effects = ["delta_nll", "ci_low", "ci_high", "size"]
    means = rows.groupby(["perturbation", *layout.WEIGHT_KEY], sort=False, dropna=False)[effects].mean().reset_index()
    score_columns = [layout.score_column(metric) for metric in layout.metrics_of_columns(sampled.columns)]
    scores = sampled[[*layout.WEIGHT_KEY, "value", *score_columns]].astype({"row": "Int64", "col": "Int64"})
    return means.merge(scores, on=layout.WEIGHT_KEY, how="inner")
