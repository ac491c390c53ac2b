"""Bootstrap intervals over units: layers or single weights are drawn with replacement."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
N_RESAMPLES = 9999
BLOCK_SIZE = 2**22  # elements of a sample that are resampled at the same time


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


def paired_bootstrap_interval(
    samples: Sequence[np.ndarray],
    statistic: Callable[..., np.ndarray],
    rng: np.random.Generator,
    n_resamples: int = N_RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Percentile bootstrap interval of a statistic over paired samples (Efron & Tibshirani 1993, ch. 13).

    Each resample draws the same n units from every sample. Resamples in which the statistic is NaN (a rank correlation
    when all drawn units are equal) are left out; ``scipy.stats.bootstrap`` itself would then give no interval, so
    that only its distribution is used.

    Args:
        samples: arrays of shape (n,), n at least 2.
        statistic: takes the resampled samples, each of shape (B, n), and ``axis=-1``; returns shape (B,).
        rng: what draws the resamples.
        n_resamples: how many resamples.
        level: of confidence.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=n_resamples,
            batch=max(1, BLOCK_SIZE // len(samples[0])),
            rng=rng,
        )
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(result.bootstrap_distribution, [tail, 100 - tail])
    return Interval(low=float(low), high=float(high))
