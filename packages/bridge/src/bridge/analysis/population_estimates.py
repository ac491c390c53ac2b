"""Estimates for all layers or all weights of a model, from those that were measured: columns of CORRELATIONS.

Every measured unit counts 1 / inclusion times, inclusion being the probability with which it was drawn. ``spearman`` in
the same row is the agreement over the measured units alone: of the design, in which high scores are frequent.
"""

from typing import NamedTuple, cast

import numpy as np
import pandas as pd

from bridge.analysis.measured_sets import SETTING, rows_where, single_layers, top_sets
from bridge.analysis.population import population_precision, population_ratio
from bridge.analysis.single_weights import weight_effects
from bridge.analysis.weighted_rho import effective_number, rho_interval, weighted_rho
from bridge.exchange import layout

SHARE = 0.1  # of the population, whose overlap by score and by effect is ``population_precision``


class PopulationColumns(NamedTuple):
    """What CORRELATIONS says of the whole population; NaN where there is no estimate.

    Attributes:
        population_rho: Spearman's rho over all units of the model.
        population_low: lower end of its 95 % interval, over samples; empty where all were measured.
        population_high: upper end.
        population_p: two-sided p-value of rho = 0.
        n_effective: how many equally probable units would tell as much.
        population_share: ``SHARE``.
        population_precision: part of that share of largest effects that is in the same share of highest scores.
        precision_low: lower end of its 95 % interval.
        precision_high: upper end.
        population_ratio: total effect divided by total score; 1 is the right size for a score in nats per token.
        ratio_low: lower end of its 95 % interval.
        ratio_high: upper end.
    """

    population_rho: float = np.nan
    population_low: float = np.nan
    population_high: float = np.nan
    population_p: float = np.nan
    n_effective: float = np.nan
    population_share: float = np.nan
    population_precision: float = np.nan
    precision_low: float = np.nan
    precision_high: float = np.nan
    population_ratio: float = np.nan
    ratio_low: float = np.nan
    ratio_high: float = np.nan


def with_population_estimates(
    table: pd.DataFrame,
    measurements: pd.DataFrame,
    targets: pd.DataFrame | None = None,
    sampled: pd.DataFrame | None = None,
    single_weights: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The table of CORRELATIONS with the columns of ``PopulationColumns`` filled for the units layers and weights.

    Args:
        table: rows of CORRELATIONS.
        measurements: a table of MEASUREMENTS.
        targets: a table of TARGETS, which holds the inclusion probability of the layers.
        sampled: a table of SAMPLED_WEIGHTS, which holds the scores of single weights.
        single_weights: a table of SINGLE_WEIGHTS, which holds their inclusion probability.
    """
    points = _layer_points(measurements, targets) | _weight_points(measurements, sampled, single_weights)
    nothing = pd.DataFrame({"score": [], "effect": [], "inclusion": []}, dtype=float)
    keys = zip(table["unit"], table["metric"], table["perturbation"], table["k"], strict=True)
    estimates = [estimate_population(points.get(key, nothing)) for key in keys]
    columns = pd.DataFrame(estimates, columns=list(PopulationColumns._fields), index=table.index, dtype=float)
    return table.assign(**{name: columns[name] for name in PopulationColumns._fields})


def estimate_population(points: pd.DataFrame) -> PopulationColumns:
    """The estimates of one comparison.

    Args:
        points: one row a measured unit, columns score, effect, inclusion; infinite effects tie as the largest.
    """
    points = points.dropna()
    if len(points) < 2:
        return PopulationColumns()
    score, effect, inclusion = (points[name].to_numpy(float) for name in ("score", "effect", "inclusion"))
    weights = 1 / inclusion
    result = weighted_rho(score, effect, weights)
    interval = rho_interval(result, weights, inclusion)
    precision = population_precision(score, effect, inclusion, SHARE)
    ratio = population_ratio(score, effect, inclusion)
    return PopulationColumns(
        population_rho=result.rho,
        population_low=interval.low,
        population_high=interval.high,
        population_p=interval.p_value,
        n_effective=effective_number(weights),
        population_share=SHARE,
        population_precision=precision.value,
        precision_low=precision.low,
        precision_high=precision.high,
        population_ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
    )


_Key = tuple[str, str, str, int]  # unit, metric, perturbation, k


def _layer_points(measurements: pd.DataFrame, targets: pd.DataFrame | None) -> dict[_Key, pd.DataFrame]:
    """Score, effect and inclusion probability of each layer."""
    points: dict[_Key, pd.DataFrame] = {}
    if targets is None or targets.empty:
        return points
    inclusion = targets.drop_duplicates("target_layer").set_index("target_layer")["inclusion"]
    tops = single_layers(top_sets(measurements)).sort_values(["target_layer", "seed"], kind="stable")
    for key, sets in tops.groupby(SETTING):
        metric, perturbation, k = cast(tuple[str, str, int], key)
        means = sets.groupby("target_layer")[["score_sum", "delta_nll"]].mean()
        means = means.rename(columns={"score_sum": "score", "delta_nll": "effect"})
        points["layers", metric, perturbation, int(k)] = means.assign(inclusion=inclusion)
    return points


def _weight_points(
    measurements: pd.DataFrame, sampled: pd.DataFrame | None, single_weights: pd.DataFrame | None
) -> dict[_Key, pd.DataFrame]:
    """Score, size of the effect and inclusion probability of each single weight."""
    points: dict[_Key, pd.DataFrame] = {}
    effects = weight_effects(measurements, sampled)
    if sampled is None or single_weights is None or effects.empty:
        return points
    inclusion = single_weights[[*layout.WEIGHT_KEY, "inclusion"]].astype({"row": "Int64", "col": "Int64"})
    effects = effects.merge(inclusion, on=layout.WEIGHT_KEY, how="inner")
    effects = effects.sort_values(layout.WEIGHT_KEY, kind="stable")
    for perturbation in effects["perturbation"].unique():
        rows = rows_where(effects, perturbation=perturbation)
        for metric in layout.metrics_of_columns(sampled.columns):
            columns = {"score": rows[layout.score_column(metric)], "effect": rows["size"]}
            points["weights", metric, perturbation, 1] = pd.DataFrame(columns | {"inclusion": rows["inclusion"]})
    return points
