"""The one rule by which a number becomes a claim; every sentence that says what was shown asks here.

A claim needs an adjusted p-value below 5 % (below 2.5 % where it was not named beforehand), enough units, and its
direction is that of the estimate. What is not shown is not shown to be absent: absence is claimed only where an
interval lies within a margin named beforehand, and every "not shown" carries the smallest effect that would have been
seen.
"""

from enum import StrEnum
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

SIGNIFICANCE = 0.05
EXPLORATORY_SIGNIFICANCE = 0.025  # of what was not named beforehand: a report makes both kinds of claims
LEVEL = 1 - SIGNIFICANCE  # of every interval
POWER = 0.80
MIN_UNITS = 6  # fewer give no interval and no claim
MIN_DEGREES = 5  # units beyond what was fitted, fewer have no smallest detectable rho
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
    level: float = SIGNIFICANCE,
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
        level: what the adjusted p-value must be below.
    """
    if np.isnan(rho) or np.isnan(p_adjusted) or n_units < MIN_UNITS:
        return Claim(Verdict.NOT_SHOWN, np.nan)
    detectable = detectable_rho(n_units, n_fitted, level / n_tests)
    if p_adjusted < level:
        return Claim(Verdict.BETTER if rho > 0 else Verdict.WRONG_WAY, detectable)
    if interval is not None and -margin < interval[0] and interval[1] < margin:
        return Claim(Verdict.ABSENT, detectable, margin)
    return Claim(Verdict.NOT_SHOWN, detectable)


class Basis(NamedTuple):
    """The columns of CORRELATIONS that a claim goes by."""

    rho: str
    low: str
    high: str
    p_value: str


WITHIN_KINDS = Basis("within_rho", "within_low", "within_high", "within_p")
POPULATION = Basis("population_rho", "population_low", "population_high", "population_p")
MEASURED = Basis("spearman", "ci_low", "ci_high", "p_value")


def is_weighted(row: pd.Series) -> bool:
    """Whether the units of a row of CORRELATIONS were drawn with different probabilities, each counting 1/pi times."""
    return bool(row["n_effective"] < row["n"] * (1 - 1e-9))


def basis_of_claim(row: pd.Series) -> Basis:
    """Which figures of a row of CORRELATIONS a claim goes by.

    Where layers are of several kinds, chance is a shuffle within kinds: what counts is rho given kind and depth. Else,
    where units were drawn with different probabilities, what counts is the estimate for all of them: rho over the
    measured ones is a figure of the choice.
    """
    if row["n_kinds"] > 1:
        return WITHIN_KINDS
    return POPULATION if is_weighted(row) else MEASURED


def claim_of_row(row: pd.Series) -> Claim:
    """What a row of CORRELATIONS shows; every sentence and table of a report that claims something asks here."""
    basis = basis_of_claim(row)
    interval = None if pd.isna(row[basis.low]) else (float(row[basis.low]), float(row[basis.high]))
    return claim(
        rho=float(row[basis.rho]),
        p_adjusted=float(row["p_adjusted"]),
        n_units=float(row["n_effective"]) if is_weighted(row) else int(row["n"]),
        n_fitted=int(row["n_fitted"]),
        n_tests=int(row["n_tests"]),
        interval=interval,
        level=SIGNIFICANCE if row["primary"] else EXPLORATORY_SIGNIFICANCE,
    )


def detectable_rho(n_units: float, n_fitted: int = 1, level: float = SIGNIFICANCE, power: float = POWER) -> float:
    """The smallest rho that a two-sided test at ``level`` shows with probability ``power``.

    tanh((t_(1 - level/2) + t_power) sqrt(1.06 / (n - c - 2))): arctanh of Spearman's rho is nearly normal with variance
    1.06 / (n - 3) (Fieller, Hartley & Pearson 1957), n less by one for each further number fitted; quantiles of
    Student's t with n - c - 1 degrees of freedom, because the variance is estimated. NaN where n - c - 2 is below
    ``MIN_DEGREES``: so few units have too few shuffles for a rule.
    """
    degrees = n_units - n_fitted - 2
    if degrees < MIN_DEGREES:
        return np.nan
    reach = stats.t.ppf(1 - level / 2, degrees + 1) + stats.t.ppf(power, degrees + 1)
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
