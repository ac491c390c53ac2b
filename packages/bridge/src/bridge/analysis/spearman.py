"""Spearman's rank correlation: the coefficient, its interval, and a permutation p-value."""

import numpy as np
from scipy import stats

from bridge.analysis.bootstrap import BLOCK_SIZE, LEVEL, N_RESAMPLES, Interval, paired_bootstrap_interval


def spearman_rho(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho: Pearson's correlation of the mid-ranks (Spearman 1904). x and y: (n,)."""
    return float(stats.spearmanr(stats.rankdata(x), stats.rankdata(y)).statistic)


def rho_interval(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, n_resamples: int = N_RESAMPLES, level: float = LEVEL
) -> Interval:
    """Percentile bootstrap interval of Spearman's rho over units; each resample is ranked anew. x and y: (n,)."""
    return paired_bootstrap_interval([x, y], _rho_of_rows, rng, n_resamples, level)


def permutation_p_value(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, n_resamples: int = N_RESAMPLES
) -> float:
    """Two-sided p-value of Spearman's rho when every pairing of x with y is equally likely. x and y: (n,).

    Exact if there are at most ``n_resamples`` pairings. Otherwise (1 + r) / (B + 1) for each tail, r of B drawn
    pairings being at least as extreme, and twice the smaller tail (Phipson & Smyth 2010).
    """
    rank_y = _centred_ranks(y)

    def covariance(rank_x: np.ndarray, axis: int) -> np.ndarray:
        # The norms of the ranks are the same for every pairing, so that this orders pairings as rho does.
        products: np.ndarray = (rank_x * rank_y).sum(axis=axis)
        return products

    result = stats.permutation_test(
        (_centred_ranks(x),),
        covariance,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, BLOCK_SIZE // len(x)),
        rng=rng,
    )
    return float(result.pvalue)


def _rho_of_rows(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    """Spearman's rho of each row of x and y, (B, n) to (B,): thousands at once. NaN where a row is constant."""
    rank_x = _centred_ranks(x)
    rank_y = _centred_ranks(y)
    norms = np.sqrt((rank_x**2).sum(axis=axis) * (rank_y**2).sum(axis=axis))  # (B,)
    products = (rank_x * rank_y).sum(axis=axis)  # (B,)
    rho = np.full(len(x), np.nan)
    np.divide(products, norms, out=rho, where=norms > 0)
    return rho


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Mid-ranks along the last axis, minus their mean."""
    mean = (values.shape[-1] + 1) / 2
    ranks: np.ndarray = stats.rankdata(values, axis=-1) - mean
    return ranks
