"""How far a rho over layers would vary with other texts: the uncertainty that remains when every layer was measured."""

import numpy as np
from scipy import stats

from bridge.analysis.claims import LEVEL, MIN_UNITS
from bridge.analysis.weighted_rho import weighted_rho


def rho_over_texts(
    scores: np.ndarray,
    effects: np.ndarray,
    n_tokens: np.ndarray,
    weights: np.ndarray | None = None,
    covariates: np.ndarray | None = None,
    level: float = LEVEL,
) -> tuple[float, float, float]:
    """Rho of the scores with the effects over all texts, and its interval over texts.

    Each text is left out in turn, and the effects sum_t d_lt / sum_t n_t and rho are computed again; arctanh(rho) gets
    Student's t interval (T - 1 degrees of freedom) with the jackknife's standard error (Tukey 1958). The interval is
    for the mean of rho over sets of as many texts of the same sort. Noise in the effects lowers every such rho: more
    texts would give a larger one, which this interval does not aim at.

    Args:
        scores: of the layers, (L,), computed on other texts or fixed otherwise.
        effects: summed loss after minus before of each layer on each text (or cluster of texts), nats, (L, T); infinite
            or NaN where the loss overflowed, which ranks as the largest.
        n_tokens: predicted tokens of each text, (T,).
        weights: of the layers, (L,).
        covariates: as in ``weighted_rho``.
        level: of the interval.

    Returns:
        rho and the ends of its interval, which are NaN for fewer than ``MIN_UNITS`` texts.
    """
    bounded = np.isfinite(effects)
    sums = np.where(bounded, effects, 0).sum(axis=1)
    n_unbounded = (~bounded).sum(axis=1)
    total = n_tokens.sum()

    def rho(summed: np.ndarray, tokens: float, overflowed: np.ndarray) -> float:
        effect = np.where(overflowed > 0, np.inf, summed / tokens)
        return weighted_rho(scores, effect, weights, covariates).rho

    whole = rho(sums, total, n_unbounded)
    n_texts = len(n_tokens)
    if n_texts < MIN_UNITS or np.isnan(whole):
        return whole, np.nan, np.nan
    without = [
        rho(sums - np.where(bounded[:, t], effects[:, t], 0), total - n_tokens[t], n_unbounded - ~bounded[:, t])
        for t in range(n_texts)
    ]
    replicates = np.arctanh(np.clip(without, -1 + 1e-12, 1 - 1e-12))
    error = np.sqrt((n_texts - 1) * replicates.var())
    half = stats.t.ppf((1 + level) / 2, n_texts - 1) * error
    centre = np.arctanh(np.clip(whole, -1 + 1e-12, 1 - 1e-12))
    return whole, float(np.tanh(centre - half)), float(np.tanh(centre + half))
