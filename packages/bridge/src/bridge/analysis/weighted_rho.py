"""Spearman's rho of a sample that was drawn with known probabilities, and how each unit moves it.

A unit drawn with inclusion probability pi counts 1/pi times, so that the estimate speaks of the population
(Hajek 1971). Where covariates are passed (kind of matrix, depth), rho is that of the residuals of the ranks: what
remains when both rankings are freed from all that is linear in the covariates. With neither it is Spearman's rho.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from bridge.analysis.claims import LEVEL, MIN_UNITS


class WeightedRho(NamedTuple):
    """A rank correlation over n units and its parts.

    Attributes:
        rho: the correlation; NaN where x or y does not vary once the covariates are taken out.
        influence: how fast rho changes as a unit gains weight, W d(rho)/d(w_i), (n,); its weighted sum is 0.
        x_residual: the ranks of x, as shares of the population, less their weighted least-squares fit, (n,).
        y_residual: the same of y.
        n_fitted: c, the number of independent covariates, the constant included.
        leverage: how far each unit's rank decides its own fit, (n,), their sum is c; 1 for the only one of its kind.
    """

    rho: float
    influence: np.ndarray
    x_residual: np.ndarray
    y_residual: np.ndarray
    n_fitted: int
    leverage: np.ndarray


class RhoInterval(NamedTuple):
    """Standard error of a rho over samples, the ends of its interval, and the two-sided p-value of rho = 0."""

    error: float
    low: float
    high: float
    p_value: float


NO_INTERVAL = RhoInterval(np.nan, np.nan, np.nan, np.nan)


def weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The share of the population below each value, plus half of the share that ties with it; values (n,).

    F(v) = sum_j w_j (1[v_j < v] + 1[v_j = v] / 2) / W, the mid-distribution function (Parzen 2004). With equal weights
    it is (mid-rank - 1/2) / n. Infinite values tie.
    """
    distinct, position = np.unique(values, return_inverse=True)
    mass = np.bincount(position, weights, minlength=len(distinct))
    ranks: np.ndarray = ((np.cumsum(mass) - mass / 2) / mass.sum())[position]
    return ranks


def weighted_rho(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None, covariates: np.ndarray | None = None
) -> WeightedRho:
    """Weighted Spearman's rho of x and y, or the partial one for the covariates, with its influence values.

    With residuals e_x, e_y of the ranks F(x), F(y): rho = C / sqrt(A B), C = sum w e_x e_y, A = sum w e_x^2,
    B = sum w e_y^2. A unit's influence has three parts: its own product, and what its weight does to the ranks of the
    others in x and in y (Croux & Dehon 2010, for rho without covariates):

        dC_i = e_xi e_yi + sum_j w_j [e_yj (k(x_j, x_i) - F(x_j)) + e_xj (k(y_j, y_i) - F(y_j))] / W

    with k(a, b) = 1[b < a] + 1[b = a] / 2; dA and dB likewise; influence W (dC / sqrt(A B) - rho (dA/A + dB/B) / 2).

    Args:
        x: one value a unit, (n,), not NaN.
        y: the same.
        weights: w = 1 / inclusion probability, (n,); equal if None.
        covariates: columns that span what is taken out, the constant among them, (n, c); the constant alone if None.
    """
    n = len(x)
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    basis = weighted_basis(np.ones((n, 1)) if covariates is None else covariates, w)
    rank_x, rank_y = weighted_ranks(x, w), weighted_ranks(y, w)
    e_x, e_y = (ranks - project(ranks, basis, w) for ranks in (rank_x, rank_y))
    xx, yy, xy = w @ e_x**2, w @ e_y**2, w @ (e_x * e_y)
    total, leverage = w.sum(), (basis**2).sum(axis=1)
    if min(xx, yy) < 1e-18 * total:  # only rounding is left of ranks between 0 and 1
        return WeightedRho(np.nan, np.full(n, np.nan), e_x, e_y, basis.shape[1], leverage)
    rho = float(np.clip(xy / np.sqrt(xx * yy), -1, 1))
    x_in_xy, x_in_xx = _through_ranks(x, rank_x, np.stack([w * e_y, w * e_x]))
    y_in_xy, y_in_yy = _through_ranks(y, rank_y, np.stack([w * e_x, w * e_y]))
    d_xy = e_x * e_y + (x_in_xy + y_in_xy) / total
    d_xx = e_x**2 + 2 * x_in_xx / total
    d_yy = e_y**2 + 2 * y_in_yy / total
    influence = total * (d_xy / np.sqrt(xx * yy) - rho * (d_xx / xx + d_yy / yy) / 2)
    return WeightedRho(rho, influence, e_x, e_y, basis.shape[1], leverage)


def weighted_basis(covariates: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Orthonormal columns Q that span sqrt(w) times the covariates, (n, rank)."""
    left, singular, _ = np.linalg.svd(np.sqrt(weights)[:, None] * covariates, full_matrices=False)
    basis: np.ndarray = left[:, singular > 1e-9 * singular[0]]
    return basis


def project(values: np.ndarray, basis: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted least-squares fit of values (..., n) by the covariates of a ``weighted_basis``."""
    root = np.sqrt(weights)
    fit: np.ndarray = ((values * root) @ basis) @ basis.T / root
    return fit


def _through_ranks(values: np.ndarray, ranks: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """sum_j c_j (k(v_j, v_i) - F(v_j)) for every unit i and each row c of the coefficients, (rows, n)."""
    distinct, position = np.unique(values, return_inverse=True)
    sums = np.stack([np.bincount(position, row, minlength=len(distinct)) for row in coefficients])
    above = sums.sum(axis=1, keepdims=True) - np.cumsum(sums, axis=1) + sums / 2
    through: np.ndarray = above[:, position] - (coefficients @ ranks)[:, None]
    return through


def effective_number(weights: np.ndarray) -> float:
    """How many equally weighted units would tell as much: W^2 / sum w^2 (Kish 1965)."""
    return float(weights.sum() ** 2 / (weights @ weights))


def rho_interval(
    result: WeightedRho, weights: np.ndarray, inclusion: np.ndarray | None = None, level: float = LEVEL
) -> RhoInterval:
    """Interval of a rho by linearization, symmetric in arctanh(rho).

    Var(rho) = n/(n - c) sum_i (1 - pi_i) (w_i influence_i / W)^2 for independent draws (Deville 1999); Student's t with
    n_eff - c - 1 degrees of freedom, n_eff of ``effective_number``. All NaN where n_eff is below ``MIN_UNITS`` or no
    degree of freedom is left.

    Args:
        result: of ``weighted_rho`` with these weights.
        weights: (n,).
        inclusion: each unit's probability of having been drawn from a finite population, (n,): the interval is for
            rho over all its units, and a unit that was certain adds nothing. If None, the units themselves are taken
            as drawn from unlimited ones like them.
        level: of the interval.
    """
    n = len(weights)
    n_eff = effective_number(weights)
    degrees = n_eff - result.n_fitted - 1
    if n_eff < MIN_UNITS or degrees <= 0 or np.isnan(result.rho):
        return NO_INTERVAL
    missed = np.ones(n) if inclusion is None else 1 - inclusion
    error = np.sqrt(n / (n - result.n_fitted) * (missed @ (weights / weights.sum() * result.influence) ** 2))
    if error == 0:
        return NO_INTERVAL  # every unit was certain: nothing was sampled; or rho is 1 exactly
    centre = np.arctanh(np.clip(result.rho, -1 + 1e-12, 1 - 1e-12))
    scale = error / (1 - np.tanh(centre) ** 2)
    half = stats.t.ppf((1 + level) / 2, degrees) * scale
    p_value = 2 * stats.t.sf(abs(centre) / scale, degrees)
    return RhoInterval(float(error), float(np.tanh(centre - half)), float(np.tanh(centre + half)), float(p_value))
