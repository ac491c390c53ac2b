"""How sure a measured effect is: intervals over texts, and what a sample of texts cannot show.

The unit of sampling is the cluster: the text, document or file that sequences come from. Tokens of one text are not
independent, nor are windows of one article, so all sums are taken by cluster first.

The arrays of every function have the sequences on their last axis; each leading index is computed on its own. Nothing
is drawn at random.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

MIN_CLUSTERS = 6
LEVEL = 0.95
FEW_TEXTS_SHARE = 0.25  # of the clusters: below this effective share, few texts decide


class Interval(NamedTuple):
    """The ends of a 95 % confidence interval; NaN where none can be computed."""

    low: float | np.ndarray
    high: float | np.ndarray


NO_INTERVAL = Interval(math.nan, math.nan)


class Spread(NamedTuple):
    """The estimated sampling distribution of a statistic.

    Attributes:
        variance: its variance.
        third: its third central moment; 0 for a symmetric distribution.
        dof: degrees of freedom of the variance.
    """

    variance: float | np.ndarray
    third: float | np.ndarray
    dof: float | np.ndarray


def ratio_interval(differences: np.ndarray, n_tokens: np.ndarray, clusters: np.ndarray | None = None) -> Interval:
    """The interval of Σ d_i / Σ T_i: delta_nll, or any other sum over texts per predicted token.

    How the ratio changes when one cluster is left out (``ratio_changes``) gives its variance and skewness
    (``jackknife_spread``), these its ends (``interval_around``). For ``ppl_ratio`` take exp of both ends.

    Args:
        differences: d_i, nats that sequence i costs more than before, (..., n).
        n_tokens: T_i, predicted tokens of sequence i, (..., n).
        clusters: which text, document or file sequence i comes from, (n,); without, each sequence its own.

    Returns:
        NaN ends with fewer than ``MIN_CLUSTERS`` clusters or a difference that is not finite.
    """
    d, tokens = by_cluster(differences, clusters), by_cluster(n_tokens, clusters)
    spread = jackknife_spread(ratio_changes(d, tokens), tokens)
    return interval_around(ratio(d, tokens), spread, d.shape[-1])


def perplexity_interval(losses: np.ndarray, n_tokens: np.ndarray, clusters: np.ndarray | None = None) -> Interval:
    """The interval of exp(Σ S_i / Σ T_i), a perplexity: of other texts the loss before the change differs, too.

    The loss after a change, L + delta_nll, is itself a ratio of sums over texts, so that its interval carries the
    uncertainty of both terms and their correlation. It is as wide before a change as after one without effect.

    Args:
        losses: S_i, summed nats of sequence i, (..., n).
        n_tokens: T_i, (..., n).
        clusters: as in ``ratio_interval``.
    """
    nll = ratio_interval(losses, n_tokens, clusters)
    with np.errstate(over="ignore"):
        return Interval(np.exp(nll.low), np.exp(nll.high))


def perplexity_change_interval(
    before: np.ndarray, after: np.ndarray, n_tokens: np.ndarray, clusters: np.ndarray | None = None
) -> Interval:
    """The interval of delta_ppl = exp(L + delta_nll) - exp(L), with both terms varying over texts.

    Computed by the jackknife for asinh(delta_ppl / p), p = exp(L) as measured, and transformed back. asinh is linear
    for changes that are small against the perplexity and logarithmic for large ones, whose distribution is as
    skewed as that of exp(delta_nll).

    Args:
        before: S_i before the change, (..., n).
        after: S_i after it, (..., n).
        n_tokens: T_i, (..., n).
        clusters: as in ``ratio_interval``.
    """
    base, tokens = by_cluster(before, clusters), by_cluster(n_tokens, clusters)
    d = by_cluster(np.subtract(after, before), clusters)
    nll, delta = ratio(base, tokens), ratio(d, tokens)
    with np.errstate(over="ignore", invalid="ignore"):
        relative = np.exp(ratio_changes(base, tokens)) * np.expm1(delta[..., None] + ratio_changes(d, tokens))
        change = np.arcsinh(np.expm1(delta))
        spread = jackknife_spread(np.arcsinh(relative) - change[..., None], tokens)
        low, high = interval_around(change, spread, d.shape[-1])
        return Interval(np.exp(nll) * np.sinh(low), np.exp(nll) * np.sinh(high))


def effective_number(differences: np.ndarray, clusters: np.ndarray | None = None) -> float | np.ndarray:
    """n_eff = (Σ |d_c|)² / Σ d_c²: how many texts of equal effect would spread it as these do.

    n where all texts change alike, 1 where one text makes the whole effect; NaN where there is no effect or one that
    is not finite.
    """
    sizes = np.abs(by_cluster(differences, clusters))
    with np.errstate(divide="ignore", invalid="ignore"):
        number: float | np.ndarray = sizes.sum(-1) ** 2 / (sizes**2).sum(-1)
    return number


def few_texts_decide(differences: np.ndarray, clusters: np.ndarray | None = None) -> bool | np.ndarray:
    """Whether n_eff is below a quarter of the number of texts, so that a few of them make the effect.

    False where n_eff is undefined. What no text shows, this cannot see: ``unseen_share`` says how much that may be.
    """
    n = by_cluster(differences, clusters).shape[-1]
    few: bool | np.ndarray = effective_number(differences, clusters) < FEW_TEXTS_SHARE * n
    return few


def unseen_share(n_clusters: int) -> float:
    """The largest share of texts that may behave unlike any of the n measured: 1 - 0.05^(1/n), about 3/n.

    The upper end of an exact one-sided 95 % interval of a proportion when none of n shows it (the "rule of three",
    Hanley & Lippman-Hand 1983). Damage that strikes a smaller share of texts is missed with a probability above 5 %,
    and no interval can then cover it: the sample looks like one of a harmless change.
    """
    return 1 - float((1 - LEVEL) ** (1 / n_clusters))


def by_cluster(values: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """Sums of the last axis by cluster, (..., n) to (..., number of clusters), in the order of the cluster ids."""
    values = np.asarray(values)
    if clusters is None:
        return values
    order = np.argsort(clusters, kind="stable")
    _, starts = np.unique(np.asarray(clusters)[order], return_index=True)
    return np.add.reduceat(values[..., order], starts, axis=-1)


def ratio(sums: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """Σ sums_c / Σ T_c, (..., n) to (...)."""
    quotient: np.ndarray = sums.sum(-1) / n_tokens.sum(-1)
    return quotient


def ratio_changes(sums: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """The ratio without cluster c minus that of all, -(s_c - r T_c) / (N - T_c), (..., n)."""
    with np.errstate(invalid="ignore"):
        residuals = sums - ratio(sums, n_tokens)[..., None] * n_tokens
    changes: np.ndarray = -residuals / (n_tokens.sum(-1)[..., None] - n_tokens)
    return changes


def jackknife_spread(changes: np.ndarray, n_tokens: np.ndarray) -> Spread:
    """Variance and skewness of a statistic over texts, by leaving one cluster out at a time.

    (n-1)/n Σ (change_c - mean)² is the jackknife's variance (Efron & Tibshirani 1993, ch. 11); the third moment is that
    of the same deviations. The degrees of freedom are those of the effective number of texts of unequal length,
    (Σ T)² / Σ T² - 1 (Kish 1965; Carter, Schnepel & Steigerwald 2017), n - 1 where all are equally long, at least 1.

    Args:
        changes: the statistic without cluster c minus that with all, (..., n).
        n_tokens: T_c, (..., n).
    """
    n = changes.shape[-1]
    with np.errstate(invalid="ignore"):
        deviations = changes - changes.mean(-1, keepdims=True)
    kish = n_tokens.sum(-1) ** 2 / (n_tokens**2).sum(-1)
    return spread_of(-math.sqrt((n - 1) / n) * deviations, np.maximum(kish - 1, 1))


def spread_of(contributions: np.ndarray, dof: float | np.ndarray) -> Spread:
    """The spread of a sum of independent contributions, each given by its deviation: moments add up."""
    return Spread((contributions**2).sum(-1), (contributions**3).sum(-1), dof)


def combined_spread(first: Spread, second: Spread) -> Spread:
    """The spread of a sum of two independent terms: moments add up, degrees of freedom by Satterthwaite (1946)."""
    variance = first.variance + second.variance
    with np.errstate(divide="ignore", invalid="ignore"):
        dof = variance**2 / (first.variance**2 / first.dof + second.variance**2 / second.dof)
    return Spread(variance, first.third + second.third, dof)


def interval_around(estimate: float | np.ndarray, spread: Spread, n_clusters: int) -> Interval:
    """Student's t interval, each end moved outward, never inward, to where skewness puts it.

    Where a few texts have large effects the t interval misses on their side: a sample that lacks them has both a
    small mean and a small standard error. Hall's transformation of t = (estimate - truth) / SE,

        g(t) = t + λ (2 t² + 1) / 6 + λ² t³ / 27,    λ = third / variance^1.5 (the skewness of the estimate),

    is symmetric to second order (Hall 1992, J. R. Stat. Soc. B 54, 221, after Johnson 1978); its inverse of the
    quantiles ±q of Student's t gives the corrected ends. With few texts λ itself is uncertain, and for symmetric
    effects with heavy tails the corrected interval alone covers too little: each end is the outer one of the two.

    Args:
        estimate: the statistic.
        spread: its sampling distribution.
        n_clusters: how many texts it is from.

    Returns:
        NaN ends with fewer than ``MIN_CLUSTERS`` clusters or an estimate that is not finite; the estimate itself
        where there is no spread.
    """
    if n_clusters < MIN_CLUSTERS:
        return NO_INTERVAL
    q = np.asarray(stats.t.ppf((1 + LEVEL) / 2, spread.dof))
    se = np.sqrt(spread.variance)
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness = spread.third / se**3
        low = estimate - np.maximum(q, _hall_inverse(q, skewness)) * se
        high = estimate - np.minimum(-q, _hall_inverse(-q, skewness)) * se
    constant = spread.variance == 0
    return Interval(np.where(constant, estimate, low)[()], np.where(constant, estimate, high)[()])


def _hall_inverse(x: np.ndarray, skewness: np.ndarray) -> np.ndarray:
    """The t with g(t) = x: 3/λ ((1 + λ x - λ²/6)^(1/3) - 1), and x - λ (2 x² + 1) / 6 in the limit of small λ."""
    small = np.abs(skewness) < 1e-5
    safe = np.where(small, 1.0, skewness)
    exact = 3 / safe * (np.cbrt(1 + safe * x - safe**2 / 6) - 1)
    inverse: np.ndarray = np.where(small, x - skewness * (2 * x**2 + 1) / 6, exact)
    return inverse
