"""How well two rankings of the same units agree: prediction x against effect y.

Only ranks enter. An effect that is infinite or not a number (a loss that overflowed) ranks as the largest,
tied with every other such effect. Estimates that the points cannot give are NaN, always with a note.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

MIN_POINTS = 4  # with three points the smallest two-sided p-value is 1/3
ROUGH_POINTS = 10  # below this the percentile bootstrap covers less than it says
PERSISTENCE = 0.9  # of the rank-biased overlap: the first 10 ranks carry about 86 % of its weight
LEVEL = 0.95
_CHUNK = 2**22  # elements of one block of resamples


class Agreement(NamedTuple):
    """Agreement of a prediction with an effect over n units; NaN where the note says why.

    Attributes:
        n: number of units.
        spearman: Spearman's rho.
        ci_low: lower end of its 95 % bootstrap interval over units.
        ci_high: upper end.
        p_value: two-sided, by permutation of the pairing.
        kendall_tau_b: Kendall's tau-b.
        weighted_tau: Vigna's weighted tau, the largest units counting most.
        rbo: extrapolated rank-biased overlap, from the largest unit down.
        top_n: how many units count as the top in ``precision_at_n``.
        precision_at_n: share of the top_n predicted units that are among the top_n effects; chance gives top_n / n.
        note: what limits these numbers, or empty.
    """

    n: int
    spearman: float = np.nan
    ci_low: float = np.nan
    ci_high: float = np.nan
    p_value: float = np.nan
    kendall_tau_b: float = np.nan
    weighted_tau: float = np.nan
    rbo: float = np.nan
    top_n: int = 0
    precision_at_n: float = np.nan
    note: str = ""


def agreement(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, units: str = "units", n_resamples: int = 9999
) -> Agreement:
    """All measures of agreement between the prediction ``x`` and the effect ``y``, each of shape (n,).

    Units whose prediction is not a number are left out. ``units`` is the plural used in notes.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    assert x.shape == y.shape and x.ndim == 1, f"expected two vectors of one length, got {x.shape} and {y.shape}"
    known = ~np.isnan(x)
    notes = [f"{(~known).sum()} {units} without a score left out"] if not known.all() else []
    x, y = x[known], y[known]
    if not np.isfinite(y).all():
        notes.append(f"infinite or undefined effects, ranked as the largest: {(~np.isfinite(y)).sum()}")
        y = np.where(np.isfinite(y), y, np.inf)
    obstacle = _obstacle(x, y, units)
    if obstacle:
        return Agreement(len(x), note="; ".join([*notes, obstacle]))
    if len(x) < ROUGH_POINTS:
        notes.append(f"only {len(x)} {units}: the interval is rough")
    top_n = default_top_n(len(x))
    return Agreement(
        len(x),
        spearman_rho(x, y),
        *bootstrap_interval(x, y, rng, n_resamples),
        permutation_p_value(x, y, rng, n_resamples),
        kendall_tau_b(x, y),
        weighted_tau(x, y),
        rank_biased_overlap(x, y),
        top_n,
        precision_at_n(x, y, top_n),
        "; ".join(notes),
    )


def _obstacle(x: np.ndarray, y: np.ndarray, units: str) -> str:
    if len(x) < MIN_POINTS:
        return f"{len(x)} {units} are too few for a rank correlation (at least {MIN_POINTS})"
    if np.all(x == x[0]):
        return f"the scores of all {len(x)} {units} are equal: no rank correlation"
    if np.all(y == y[0]):
        return f"the effects of all {len(x)} {units} are equal: no rank correlation"
    return ""


def default_top_n(n: int) -> int:
    """Five, or a third of the units if that is fewer."""
    return max(1, min(5, n // 3))


def spearman_rho(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho: Pearson's correlation of the mid-ranks (Spearman 1904)."""
    return float(stats.spearmanr(stats.rankdata(x), stats.rankdata(y)).statistic)


def kendall_tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b, (C - D) / sqrt((C + D + T_x)(C + D + T_y)) (Kendall 1945)."""
    return float(stats.kendalltau(stats.rankdata(x), stats.rankdata(y), variant="b").statistic)


def weighted_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Weighted tau with additive hyperbolic weights, averaged over both rankings (Vigna 2015)."""
    return float(stats.weightedtau(stats.rankdata(x), stats.rankdata(y)).statistic)


def rank_biased_overlap(x: np.ndarray, y: np.ndarray, p: float = PERSISTENCE) -> float:
    """Extrapolated rank-biased overlap of the two orders, largest first (Webber, Moffat & Zobel 2010).

    RBO_ext = A_n p^n + (1 - p)/p * sum_d A_d p^d, where A_d is the share common to the first d of both.
    Equal values keep the order in which the units came.
    """
    first, second = _descending(x), _descending(y)
    n = len(first)
    place = np.empty(n, dtype=int)
    place[second] = np.arange(n)
    later = np.maximum(np.arange(n), place[first])  # the depth at which a unit is in both heads, from 0
    depths = np.arange(1, n + 1)
    agreement_at = np.cumsum(np.bincount(later, minlength=n)) / depths
    return float(agreement_at[-1] * p**n + (1 - p) / p * np.sum(agreement_at * p**depths))


def precision_at_n(x: np.ndarray, y: np.ndarray, n: int) -> float:
    """Share of the ``n`` units of largest ``x`` that are among the ``n`` of largest ``y`` (the top-n overlap)."""
    return float(len(np.intersect1d(_descending(x)[:n], _descending(y)[:n])) / n)


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-np.asarray(values, dtype=float), kind="stable")


def bootstrap_interval(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, n_resamples: int = 9999, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap interval of Spearman's rho over units (Efron & Tibshirani 1993, ch. 13).

    Each resample is ranked anew; those in which all x or all y are equal have no rho and are left out.
    """
    n = len(x)
    rhos = []
    for size in _blocks(n_resamples, n):
        chosen = rng.integers(0, n, size=(size, n))
        rhos.append(_rowwise_rho(x[chosen], y[chosen]))
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(np.concatenate(rhos), [tail, 100 - tail])
    return float(low), float(high)


def rho_difference_interval(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    n_resamples: int = 9999,
    level: float = LEVEL,
) -> tuple[float, float, float]:
    """Rho of the first (x, y) minus rho of the second over the same units, with its paired bootstrap interval."""
    n = len(first[0])
    differences = []
    for size in _blocks(n_resamples, n):
        chosen = rng.integers(0, n, size=(size, n))
        one, other = (_rowwise_rho(x[chosen], y[chosen]) for x, y in (first, second))
        differences.append(one - other)
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(np.concatenate(differences), [tail, 100 - tail])
    return spearman_rho(*first) - spearman_rho(*second), float(low), float(high)


def _blocks(total: int, width: int) -> list[int]:
    size = max(1, _CHUNK // width)
    return [min(size, total - start) for start in range(0, total, size)]


def _rowwise_rho(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho of each row; NaN for a constant one. x and y: (B, n)."""
    rank_x, rank_y = _centred_ranks(x), _centred_ranks(y)
    norms = np.sqrt((rank_x**2).sum(axis=1) * (rank_y**2).sum(axis=1))
    return np.divide((rank_x * rank_y).sum(axis=1), norms, out=np.full(len(x), np.nan), where=norms > 0)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    return stats.rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2


def permutation_p_value(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, n_resamples: int = 9999) -> float:
    """Two-sided p-value of Spearman's rho when every pairing of x with y is equally likely.

    Exact if there are at most ``n_resamples`` pairings, otherwise (1 + r) / (B + 1) per tail, twice the
    smaller tail (Phipson & Smyth 2010).
    """
    rank_y = _centred_ranks(y)

    def rho_unscaled(rank_x: np.ndarray, axis: int) -> np.ndarray:
        return (rank_x * rank_y).sum(axis=axis)

    result = stats.permutation_test(
        (_centred_ranks(x),),
        rho_unscaled,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, _CHUNK // len(x)),
        rng=rng,
    )
    return float(result.pvalue)


def rank_p_value(value: float, controls: np.ndarray) -> float:
    """One-sided p-value (1 + r) / (B + 1), r of the B controls being at least ``value``."""
    controls = np.asarray(controls, dtype=float)
    return float((1 + np.sum(controls >= value)) / (1 + len(controls)))
