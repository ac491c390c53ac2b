"""Estimates for all layers or all weights of a model, from those that were measured: columns of CORRELATIONS.

Every measured unit counts 1 / inclusion times, inclusion being the probability with which it was drawn. ``spearman`` in
the same row is the agreement over the measured units alone: of the design, in which high scores are frequent.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from bridge.analysis.population import population_precision, population_ratio
from bridge.analysis.weighted_rho import effective_number, rho_interval, weighted_rho

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
        population_ratio: the calibration, total effect divided by total score; 1 is the right size for a score in nats
            per token.
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


def estimate_population(points: pd.DataFrame) -> PopulationColumns:
    """The estimates of one comparison.

    Args:
        points: one row a measured unit, columns score_sum, delta_nll, inclusion; infinite effects tie as the largest.
    """
    points = points.dropna()
    if len(points) < 2:
        return PopulationColumns()
    score, effect, inclusion = (points[name].to_numpy(float) for name in ("score_sum", "delta_nll", "inclusion"))
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
