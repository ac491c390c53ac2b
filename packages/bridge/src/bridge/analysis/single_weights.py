"""Single weights perturbed alone: which ones to choose, and what was predicted and measured for each."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bridge.analysis.measured_sets import infinite_where_undefined
from bridge.exchange import layout
from bridge.exchange.tables import SINGLE_WEIGHTS
from bridge.exchange.weight_sample import draw_probability, draw_weights


def choose_weights(
    sampled: pd.DataFrame, metrics: Sequence[str], n: int, n_weights: int, seed: int = 0
) -> pd.DataFrame:
    """``n`` of the sampled weights at random, over every order of magnitude of rank by each of the metrics.

    Half of the draws favour no weight of the model; the others go to the half decades of rank by each metric equally
    (``bridge.exchange.weight_sample``), so that the highest weights are there as well as the many that do nothing.

    Args:
        sampled: a table of SAMPLED_WEIGHTS.
        metrics: whose half decades are to be covered; the first gives the rank.
        n: how many, from 1; all of them where there are fewer.
        n_weights: of the model that was scored.
        seed: of the draw.

    Returns:
        Table SINGLE_WEIGHTS, highest score by the first metric first, ranked from 1; equal scores in model order.
        ``inclusion`` is the probability of both draws, of the discovery's and this one.
    """
    ranks = sampled[[layout.share_column(metric) for metric in metrics]].to_numpy(float) * n_weights  # (m, M)
    rng = np.random.default_rng([seed, *b"single weights"])
    drawn = draw_weights(draw_probability(ranks, n_weights), sampled["inclusion"].to_numpy(float), n, rng)
    chosen = sampled.iloc[drawn.chosen].assign(inclusion=drawn.inclusion)
    score = layout.score_column(metrics[0])
    chosen = chosen.sort_values(score, ascending=False, kind="stable")
    chosen = chosen.rename(columns={score: "score"}).assign(rank=range(1, len(chosen) + 1))
    return chosen[list(SINGLE_WEIGHTS.columns)].reset_index(drop=True)


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
