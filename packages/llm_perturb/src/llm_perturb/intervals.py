"""How sure a measured effect is: a bootstrap over sequences."""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

MIN_SEQUENCES = 10


class Interval(NamedTuple):
    """The ends of a 95 % confidence interval; NaN where it cannot be given."""

    low: float
    high: float


def ratio_interval(differences: np.ndarray, n_tokens: np.ndarray, n_resamples: int = 2000) -> Interval:
    """Cluster bootstrap of Σ d_i / Σ T_i: whole sequences are drawn, for the tokens of a text are not independent.

    Percentile interval, 95 %, always the same resamples for the same number of sequences, so that effects
    on one corpus are compared on the same draws.

    Args:
        differences: d_i, nats that sequence i costs more than before, (n,).
        n_tokens: T_i, predicted tokens of sequence i, (n,).
        n_resamples: how many draws.

    Returns:
        NaN ends when there are fewer than ``MIN_SEQUENCES`` sequences or a difference is not finite.
    """
    if len(differences) < MIN_SEQUENCES or not np.isfinite(differences).all():
        return Interval(math.nan, math.nan)
    if np.all(differences == 0):
        return Interval(0.0, 0.0)
    found = bootstrap(
        (differences, n_tokens),
        lambda d, t, axis: d.sum(axis) / t.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=n_resamples,
        rng=np.random.default_rng(0),
    )
    return Interval(float(found.confidence_interval.low), float(found.confidence_interval.high))
