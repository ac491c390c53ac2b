"""How well two rankings of the same units agree: prediction x against effect y.

Only ranks enter. An effect that is infinite or not a number (a loss that overflowed) ranks as the largest,
tied with every other such effect. Estimates that the units do not allow are NaN, always with a note.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from bridge.analysis.bootstrap import N_RESAMPLES
from bridge.analysis.spearman import permutation_p_value, rho_interval, spearman_rho

MIN_UNITS = 4  # with three units the smallest two-sided p-value is 1/3
ROUGH_UNITS = 10  # below this the percentile bootstrap covers less than it says
PERSISTENCE = 0.9  # of the rank-biased overlap: the first 10 ranks carry about 86 % of its weight


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
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, units: str = "units", n_resamples: int = N_RESAMPLES
) -> Agreement:
    """All measures of agreement between a prediction and an effect.

    Args:
        x: the prediction, (n,); units whose prediction is not a number are left out.
        y: the effect, (n,).
        rng: of the bootstrap and the permutations.
        units: the plural that the notes use for the units.
        n_resamples: of the bootstrap and the permutations each.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    assert x.shape == y.shape and x.ndim == 1, f"expected two vectors of one length, got {x.shape} and {y.shape}"
    notes = []
    has_score = ~np.isnan(x)
    if not has_score.all():
        notes.append(f"{(~has_score).sum()} {units} without a score left out")
        x, y = x[has_score], y[has_score]
    finite = np.isfinite(y)
    if not finite.all():
        notes.append(f"infinite or undefined effects, ranked as the largest: {(~finite).sum()}")
        y = np.where(finite, y, np.inf)
    obstacle = _obstacle(x, y, units)
    if obstacle:
        return Agreement(n=len(x), note="; ".join([*notes, obstacle]))
    if len(x) < ROUGH_UNITS:
        notes.append(f"only {len(x)} {units}: the interval is rough")
    interval = rho_interval(x, y, rng, n_resamples)
    top_n = default_top_n(len(x))
    return Agreement(
        n=len(x),
        spearman=spearman_rho(x, y),
        ci_low=interval.low,
        ci_high=interval.high,
        p_value=permutation_p_value(x, y, rng, n_resamples),
        kendall_tau_b=kendall_tau_b(x, y),
        weighted_tau=weighted_tau(x, y),
        rbo=rank_biased_overlap(x, y),
        top_n=top_n,
        precision_at_n=precision_at_n(x, y, top_n),
        note="; ".join(notes),
    )


def _obstacle(x: np.ndarray, y: np.ndarray, units: str) -> str:
    """Why the units allow no rank correlation; empty if they do."""
    if len(x) < MIN_UNITS:
        return f"{len(x)} {units} are too few for a rank correlation (at least {MIN_UNITS})"
    if np.all(x == x[0]):
        return f"the scores of all {len(x)} {units} are equal: no rank correlation"
    if np.all(y == y[0]):
        return f"the effects of all {len(x)} {units} are equal: no rank correlation"
    return ""


def default_top_n(n: int) -> int:
    """Five, or a third of the units if that is fewer."""
    return max(1, min(5, n // 3))


def kendall_tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b, (C - D) / sqrt((C + D + T_x)(C + D + T_y)) (Kendall 1945). x and y: (n,)."""
    return float(stats.kendalltau(stats.rankdata(x), stats.rankdata(y), variant="b").statistic)


def weighted_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Weighted tau with additive hyperbolic weights, averaged over both rankings (Vigna 2015). x and y: (n,)."""
    return float(stats.weightedtau(stats.rankdata(x), stats.rankdata(y)).statistic)


def rank_biased_overlap(x: np.ndarray, y: np.ndarray, p: float = PERSISTENCE) -> float:
    """Extrapolated rank-biased overlap of the two orders, largest first (Webber, Moffat & Zobel 2010).

    RBO_ext = A_n p^n + (1 - p)/p * sum_d A_d p^d, where A_d is the share common to the first d of both.
    Equal values keep the order in which the units came. x and y: (n,).
    """
    order_x, order_y = _descending(x), _descending(y)
    n = len(order_x)
    rank_in_y = np.empty(n, dtype=int)
    rank_in_y[order_y] = np.arange(n)
    # A unit is common to the first d of both orders from the larger of its two ranks on (from 0).
    common_from = np.maximum(np.arange(n), rank_in_y[order_x])
    depths = np.arange(1, n + 1)
    overlap = np.cumsum(np.bincount(common_from, minlength=n)) / depths  # A_d, (n,)
    return float(overlap[-1] * p**n + (1 - p) / p * np.sum(overlap * p**depths))


def precision_at_n(x: np.ndarray, y: np.ndarray, n: int) -> float:
    """Share of the ``n`` units of largest ``x`` that are among the ``n`` of largest ``y`` (the top-n overlap)."""
    common = np.intersect1d(_descending(x)[:n], _descending(y)[:n])
    return float(len(common) / n)


def _descending(values: np.ndarray) -> np.ndarray:
    """The indices of the values, largest first; equal values keep their order."""
    return np.argsort(-np.asarray(values, dtype=float), kind="stable")
