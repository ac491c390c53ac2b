"""The one rule by which a number becomes a claim; every sentence that says what was shown asks here.

A claim needs an adjusted p-value below 5 %, enough units, and its direction is that of the estimate. What is not
shown is not shown to be absent: absence is claimed only where an interval lies within a margin named beforehand, and
every "not shown" carries the smallest effect that would have been seen.
"""

from enum import StrEnum
from typing import NamedTuple

import numpy as np
from scipy import stats

SIGNIFICANCE = 0.05
LEVEL = 1 - SIGNIFICANCE  # of every interval
POWER = 0.80
MIN_UNITS = 6  # fewer give no interval and no claim
MARGIN = 0.2  # of a rho: what is smaller counts as no agreement where equivalence is claimed


class Verdict(StrEnum):
    """What may be said of a rank agreement."""

    BETTER = "better than chance"
    WRONG_WAY = "the wrong way round"
    NOT_SHOWN = "not shown"
    ABSENT = "absent"


class Claim(NamedTuple):
    """A verdict and what limits it.

    Attributes:
        verdict: what may be said.
        detectable: the smallest true rho that would have been shown with 80 % probability; NaN for too few units.
        margin: for ``ABSENT``, the size that rho is shown to be below; NaN otherwise.
    """

    verdict: Verdict
    detectable: float
    margin: float = np.nan


def claim(
    rho: float,
    p_adjusted: float,
    n_units: float,
    n_fitted: int = 1,
    n_tests: int = 1,
    interval: tuple[float, float] | None = None,
    margin: float = MARGIN,
) -> Claim:
    """What a rank correlation shows.

    Args:
        rho: the estimate; NaN if there is none.
        p_adjusted: its two-sided p-value, adjusted for the family that it was chosen from.
        n_units: how many units it is over, the effective number where they have weights.
        n_fitted: how many numbers were fitted to each ranking (1: the mean).
        n_tests: the size of the family, for the smallest detectable rho.
        interval: the 95 % interval of rho, where absence may be claimed: it must lie within the margin on both sides
            (two one-sided tests at 2.5 % each, Schuirmann 1987).
        margin: of that absence.
    """
    if np.isnan(rho) or np.isnan(p_adjusted) or n_units < MIN_UNITS:
        return Claim(Verdict.NOT_SHOWN, np.nan)
    detectable = detectable_rho(n_units, n_fitted, SIGNIFICANCE / n_tests)
    if p_adjusted < SIGNIFICANCE:
        return Claim(Verdict.BETTER if rho > 0 else Verdict.WRONG_WAY, detectable)
    if interval is not None and -margin < interval[0] and interval[1] < margin:
        return Claim(Verdict.ABSENT, detectable, margin)
    return Claim(Verdict.NOT_SHOWN, detectable)


def detectable_rho(n_units: float, n_fitted: int = 1, level: float = SIGNIFICANCE, power: float = POWER) -> float:
    """The smallest rho that a two-sided test at ``level`` shows with probability ``power``.

    tanh((z_(1 - level/2) + z_power) sqrt(1.06 / (n - c - 2))): arctanh of Spearman's rho is nearly normal with variance
    1.06 / (n - 3) (Fieller, Hartley & Pearson 1957), n less by one for each further number fitted. NaN where nothing
    is left to be seen.
    """
    degrees = n_units - n_fitted - 2
    if degrees <= 0:
        return np.nan
    reach = stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power)
    return float(np.tanh(reach * np.sqrt(1.06 / degrees)))


def adjusted_p_values(p_values: np.ndarray, primary: np.ndarray) -> np.ndarray:
    """p-values of a whole table as one family, the primary analysis outside of it.

    The primary one was named before anything was measured and keeps its p-value; all others are exploratory and
    controlled together for their false discovery rate (Benjamini & Hochberg 1995), over units, metrics, perturbations
    and k alike. If nothing is there to be found, any claim among them is false, and is made in at most 5 %.

    Args:
        p_values: (m,), NaN where there is none.
        primary: whether a row is the primary analysis, (m,).
    """
    adjusted = np.array(p_values, dtype=float)
    family = ~np.isnan(adjusted) & ~np.asarray(primary, dtype=bool)
    if family.any():
        adjusted[family] = stats.false_discovery_control(adjusted[family])
    return adjusted
