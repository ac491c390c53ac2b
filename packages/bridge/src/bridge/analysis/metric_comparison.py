"""Which metrics agree better with the effect than which others: all pairs over the same units, as one family.

The metrics share their units, and often their effects, so their rhos rise and fall together; each difference is
judged by the spread of its own influence values. All pairs are tested together: a sentence may then name any metric
as above the baseline or as best, whichever it picked after having seen the numbers.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from bridge.analysis.claims import LEVEL, MIN_UNITS, SIGNIFICANCE
from bridge.analysis.weighted_rho import WeightedRho, effective_number


class Difference(NamedTuple):
    """Rho of one metric minus rho of another over the same units.

    Attributes:
        first: the metric.
        second: the one it is compared with.
        difference: rho of the first minus rho of the second.
        low: lower end of its 95 % interval, for this pair alone.
        high: upper end.
        p_value: two-sided, of no difference.
        p_adjusted: for all pairs (Holm 1979).
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    p_value: float
    p_adjusted: float


class Standing(NamedTuple):
    """Where a metric stands among the others: names by what is shown, in the order in which they came."""

    above: tuple[str, ...]
    below: tuple[str, ...]
    not_told_apart: tuple[str, ...]

    @property
    def is_best(self) -> bool:
        """Whether it is shown to be above every other, and there is one."""
        return bool(self.above) and not self.below and not self.not_told_apart


def standing_of_row(row: pd.Series) -> Standing:
    """What a row of CORRELATIONS says of its metric among the others."""
    above, below, not_told_apart = (
        tuple(names.split()) if isinstance(names := row[column], str) else ()
        for column in ("above", "below", "not_told_apart")
    )
    return Standing(above, below, not_told_apart)


def compare_metrics(
    rhos: Mapping[str, WeightedRho],
    weights: np.ndarray | None = None,
    primary: tuple[str, str] | None = None,
) -> list[Difference]:
    """All differences of rho between two metrics, each first metric before its second in the mapping's order.

    Var(rho_a - rho_b) = sum_i (w_i / W)^2 (influence_ai - influence_bi)^2 / (1 - h_i)^2 with h_i the leverage of unit i
    (HC3 of MacKinnon & White 1985, close to leaving out one unit at a time); Student's t with n_eff - c - 1 degrees of
    freedom; p-values adjusted over all pairs by Holm's method. A difference is NaN where one of its rhos is,
    its interval and p-values also where fewer than ``MIN_UNITS`` units (or none beyond what was fitted) tell.

    Args:
        rhos: for each metric its ``weighted_rho`` over the same units in the same order.
        weights: of the units, (n,); equal if None.
        primary: a pair of metrics whose comparison was named before anything was measured; it stands outside the
            family and keeps its p-value.
    """
    pairs = [_difference(first, second, rhos, weights) for first, second in combinations(rhos, 2)]
    family = [i for i, pair in enumerate(pairs) if {pair.first, pair.second} != set(primary or ())]
    adjusted = np.array([pair.p_value for pair in pairs])
    adjusted[family] = holm(adjusted[family])
    return [pair._replace(p_adjusted=float(p)) for pair, p in zip(pairs, adjusted, strict=True)]


def _difference(first: str, second: str, rhos: Mapping[str, WeightedRho], weights: np.ndarray | None) -> Difference:
    one, other = rhos[first], rhos[second]
    difference = one.rho - other.rho
    n = len(one.influence)
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    n_eff, n_fitted = effective_number(w), max(one.n_fitted, other.n_fitted)
    degrees = n_eff - n_fitted - 1
    if n_eff < MIN_UNITS or degrees <= 0 or np.isnan(difference):
        return Difference(first, second, difference, np.nan, np.nan, np.nan, np.nan)
    share = w / w.sum() * (one.influence - other.influence)
    kept = 1 - np.maximum(one.leverage, other.leverage)  # a unit alone of its kind has none, and no influence
    share = np.divide(share, kept, out=np.zeros(n), where=kept > 1e-9)
    error = np.sqrt(share @ share)
    half = stats.t.ppf((1 + LEVEL) / 2, degrees) * error
    p_value = 2 * stats.t.sf(abs(difference) / error, degrees) if error > 0 else 1.0
    return Difference(first, second, difference, difference - half, difference + half, float(p_value), np.nan)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted so that any false claim among them has at most the level's probability (Holm 1979).

    NaN stays NaN and does not count.
    """
    adjusted = np.full(len(p_values), np.nan)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * p_values[order]))
    return adjusted


def standing(differences: list[Difference], metric: str) -> Standing:
    """Which metrics this one is shown to be above, shown to be below, and not told apart from."""
    above, below, not_told_apart = [], [], []
    for pair in differences:
        if metric not in (pair.first, pair.second):
            continue
        other = pair.second if metric == pair.first else pair.first
        difference = pair.difference if metric == pair.first else -pair.difference
        if not pair.p_adjusted < SIGNIFICANCE:
            not_told_apart.append(other)
        elif difference > 0:
            above.append(other)
        else:
            below.append(other)
    return Standing(tuple(above), tuple(below), tuple(not_told_apart))
