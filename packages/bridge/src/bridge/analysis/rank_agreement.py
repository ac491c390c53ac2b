"""How well two rankings of the same units agree: prediction x against effect y.

Only ranks enter. An effect that is infinite or not a number (a loss that overflowed) ranks as the largest,
tied with every other such effect. Estimates that the units do not allow are NaN, always with a note.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from bridge.analysis import claims
from bridge.analysis.bootstrap import N_RESAMPLES, Interval
from bridge.analysis.spearman import permutation_p_value, rho_interval, spearman_rho
from bridge.analysis.tied_overlap import expected_precision, expected_rank_biased_overlap

MIN_UNITS = 4  # with three units the smallest two-sided p-value is 1/3
ROUGH_UNITS = 10  # below this the percentile bootstrap covers less than it says


class Agreement(NamedTuple):
    """Agreement of a prediction with an effect over n units; NaN where the note says why.

    Attributes:
        n: number of units.
        spearman: Spearman's rho.
        ci_low: lower end of its 95 % bootstrap interval over units; none for fewer than ``claims.MIN_UNITS``.
        ci_high: upper end.
        p_value: two-sided, by permutation of the pairing.
        kendall_tau_b: Kendall's tau-b.
        weighted_tau: Vigna's weighted tau, the largest units counting most.
        rbo: extrapolated rank-biased overlap, from the largest unit down, averaged over ties.
        top_n: how many units count as the top in ``precision_at_n``.
        precision_at_n: share of the top_n predicted units that are among the top_n effects, expected over
            random orders of ties; chance gives top_n / n.
        unbounded_share: share of the effects that are infinite or undefined.
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
    unbounded_share: float = np.nan
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
    unbounded_share = float(np.isinf(y).mean()) if len(y) else np.nan
    obstacle = _obstacle(x, y, units)
    if obstacle:
        return Agreement(n=len(x), unbounded_share=unbounded_share, note="; ".join([*notes, obstacle]))
    interval = Interval(np.nan, np.nan)
    if len(x) < claims.MIN_UNITS:
        notes.append(f"only {len(x)} {units}: no interval and no claim (at least {claims.MIN_UNITS})")
    else:
        interval = rho_interval(x, y, rng, n_resamples)
        if len(x) < ROUGH_UNITS:
            notes.append(f"only {len(x)} {units}: the interval is rough")
    top_n = default_top_n(len(x))
    return Agreement(
        n=len(x),
        spearman=spearman_rho(x, y),
        ci_low=interval.low,
        ci_high=interval.high,
        p_value=permutation_p_value(x, y, rng, n_resamples),
        kendall_tau_b=kendall_tau_b(x, y),
        weighted_tau=weighted_tau(x, y),
        rbo=expected_rank_biased_overlap(x, y),
        top_n=top_n,
        precision_at_n=expected_precision(x, y, top_n),
        unbounded_share=unbounded_share,
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
    """Five, or a third of the n >= ``MIN_UNITS`` units if that is fewer."""
    return min(5, n // 3)


def kendall_tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b, (C - D) / sqrt((C + D + T_x)(C + D + T_y)) (Kendall 1945). x and y: (n,)."""
    return float(stats.kendalltau(stats.rankdata(x), stats.rankdata(y), variant="b").statistic)


def weighted_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Weighted tau with additive hyperbolic weights, averaged over both rankings (Vigna 2015). x and y: (n,)."""
    return float(stats.weightedtau(stats.rankdata(x), stats.rankdata(y)).statistic)
