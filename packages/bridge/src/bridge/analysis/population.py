"""Figures of a whole population from a sample with known inclusion probabilities: overlap of heads, calibration.

Each sampled unit stands for 1/pi units of the population (Horvitz & Thompson 1952); shares and means divide by the
estimated size rather than the known one, which varies less (Hajek 1971). The rank correlation is in ``weighted_rho``.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from bridge.analysis.claims import LEVEL, MIN_UNITS
from bridge.analysis.weighted_rho import effective_number

MIN_HEAD = 10  # effective units in the head below which its overlap has no interval


class Estimate(NamedTuple):
    """A figure of the population with the ends of its interval, and how many units it effectively rests on."""

    value: float
    low: float
    high: float
    n_effective: float


def population_precision(x: np.ndarray, y: np.ndarray, inclusion: np.ndarray, share: float) -> Estimate:
    """How much of the population's top ``share`` by y is among its top ``share`` by x; chance gives ``share``.

    sum w a b / sum w b, a_i and b_i being how much of unit i's weight w_i = 1/pi_i lies in the top share by x and by y:
    1 above the weighted quantile, 0 below, and for all units that tie at it the same part, so that the heads have
    exactly that share. Interval: Wilson's (1927) for the effective number of units in the head by y.

    Args:
        x: predictions, (n,).
        y: effects, (n,); infinite ones tie as the largest.
        inclusion: probability of each unit's having been drawn, (n,).
        share: of the population, between 0 and 1.
    """
    w = 1 / inclusion
    in_x, in_y = _head(x, w, share), _head(y, w, share)
    mass = w * in_y
    value = float(mass @ in_x / mass.sum())
    n_effective = effective_number(mass)
    if n_effective < MIN_HEAD:
        return Estimate(value, np.nan, np.nan, n_effective)
    z = stats.t.ppf((1 + LEVEL) / 2, n_effective - 1)
    centre = (value + z**2 / (2 * n_effective)) / (1 + z**2 / n_effective)
    half = z / (1 + z**2 / n_effective) * np.sqrt(value * (1 - value) / n_effective + z**2 / (4 * n_effective**2))
    return Estimate(value, float(max(0.0, centre - half)), float(min(1.0, centre + half)), n_effective)


def _head(values: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """How much of each unit belongs to the top ``share`` of the weight, from 0 to 1, (n,)."""
    distinct, position = np.unique(-np.asarray(values, dtype=float), return_inverse=True)
    mass = np.bincount(position, weights, minlength=len(distinct))
    before = np.cumsum(mass) - mass
    head: np.ndarray = np.clip((share * mass.sum() - before) / mass, 0, 1)[position]
    return head


def population_ratio(score: np.ndarray, effect: np.ndarray, inclusion: np.ndarray) -> Estimate:
    """Calibration: the population's total effect divided by its total score, with the interval of the ratio estimator.

    r = sum w y / sum w x; Var(r) = n/(n - 1) sum u^2 with u = sqrt(1 - pi) w (y - r x) / sum w x (Sarndal, Swensson &
    Wretman 1992, sec. 5.6); Student's t with (sum u^2)^2 / sum u^4 degrees of freedom, fewer where few units decide
    (Satterthwaite 1946). That number is the estimate's ``n_effective``.
    """
    w = 1 / inclusion
    n, total = len(w), w @ score
    if n < MIN_UNITS or total == 0 or not np.isfinite(effect).all():
        return Estimate(np.nan, np.nan, np.nan, np.nan)
    ratio = float(w @ effect / total)
    parts = np.sqrt(1 - inclusion) * w * (effect - ratio * score) / total
    variance = parts @ parts
    if variance == 0:
        return Estimate(ratio, np.nan, np.nan, np.nan)
    degrees = float(variance**2 / (parts**4).sum())
    half = stats.t.ppf((1 + LEVEL) / 2, degrees) * np.sqrt(n / (n - 1) * variance)
    return Estimate(ratio, float(ratio - half), float(ratio + half), degrees)
