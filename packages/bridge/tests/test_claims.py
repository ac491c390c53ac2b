import numpy as np
import pandas as pd
import pytest
import reference
from bridge.analysis.claims import (
    MEASURED,
    POPULATION,
    WITHIN_KINDS,
    Verdict,
    adjusted_p_values,
    basis_of_claim,
    claim,
    claim_of_row,
    detectable_rho,
    is_weighted,
)
from scipy import stats


@pytest.mark.parametrize(
    ("rho", "p_adjusted", "n_units", "verdict"),
    [
        (0.5, 0.049, 20, Verdict.BETTER),
        (-0.5, 0.049, 20, Verdict.WRONG_WAY),
        (0.9, 0.05, 20, Verdict.NOT_SHOWN),
        (0.9, 1e-9, 5, Verdict.NOT_SHOWN),
        (0.9, 1e-9, 6, Verdict.BETTER),
        (np.nan, 0.01, 20, Verdict.NOT_SHOWN),
        (0.9, np.nan, 20, Verdict.NOT_SHOWN),
    ],
)
def test_a_claim_takes_a_p_value_a_direction_and_units(rho, p_adjusted, n_units, verdict):
    assert claim(rho, p_adjusted, n_units).verdict is verdict


def test_absence_takes_an_interval_within_the_margin():
    assert claim(0.0, 0.9, 200, interval=(-0.19, 0.19)) == (Verdict.ABSENT, detectable_rho(200), 0.2)
    assert claim(0.0, 0.9, 200, interval=(-0.21, 0.1)).verdict is Verdict.NOT_SHOWN
    assert claim(0.0, 0.9, 200, interval=(-0.1, 0.2)).verdict is Verdict.NOT_SHOWN
    assert claim(0.15, 0.01, 200, interval=(0.1, 0.19)).verdict is Verdict.BETTER
    assert claim(0.0, 0.9, 200).verdict is Verdict.NOT_SHOWN


def test_the_detectable_rho_is_seen_with_80_percent_power():
    quantiles = stats.t.ppf([0.975, 0.8], 28).sum()
    assert detectable_rho(30) == pytest.approx(np.tanh(quantiles * np.sqrt(1.06 / 27)))
    assert detectable_rho(30, n_fitted=8) == detectable_rho(23)
    assert detectable_rho(30, level=0.01) > detectable_rho(30)
    assert np.isnan(detectable_rho(14, n_fitted=8)) and detectable_rho(15, n_fitted=8) < 1
    assert claim(0.1, 0.5, 30, n_fitted=8, n_tests=10).detectable == detectable_rho(30, 8, 0.005)


def test_all_but_the_primary_p_value_are_one_family():
    p_values = np.array([0.04, 0.01, np.nan, 0.03, 0.02])
    primary = np.array([True, False, False, False, False])
    adjusted = adjusted_p_values(p_values, primary)
    assert adjusted[0] == 0.04 and np.isnan(adjusted[2])
    assert adjusted[[1, 3, 4]].tolist() == pytest.approx(reference.benjamini_hochberg([0.01, 0.03, 0.02]))
    assert adjusted_p_values(np.array([np.nan, 0.2]), np.array([False, True])).tolist()[1] == 0.2


def row(**changes):
    values = {"primary": 1, "n": 30, "n_kinds": 5, "n_fitted": 8, "n_tests": 1, "p_adjusted": 0.01}
    values |= {"spearman": 0.9, "ci_low": 0.8, "ci_high": 0.95, "within_rho": -0.5, "within_low": -0.7}
    values |= {"within_high": -0.2, "n_effective": 30.0, "population_rho": -0.4}
    values |= {"population_low": -0.1, "population_high": 0.1}
    return pd.Series(values | changes)


def test_a_row_is_judged_within_kinds_where_there_are_several():
    assert claim_of_row(row()).verdict is Verdict.WRONG_WAY
    assert claim_of_row(row(n_kinds=1)).verdict is Verdict.BETTER
    assert claim_of_row(row()).detectable == detectable_rho(30, 8)
    within = row(p_adjusted=0.5, within_low=-0.1, within_high=0.1)
    assert claim_of_row(within).verdict is Verdict.ABSENT
    assert claim_of_row(row(p_adjusted=0.5, within_low=-0.1, within_high=0.1, n_kinds=1)).verdict is Verdict.NOT_SHOWN
    assert claim_of_row(row(p_adjusted=0.5, within_low=np.nan)).verdict is Verdict.NOT_SHOWN
    assert claim_of_row(row(p_adjusted=0.5, within_low=-0.3, within_high=0.1)).verdict is Verdict.NOT_SHOWN
    assert claim_of_row(row(p_adjusted=0.5, within_low=-0.1, within_high=0.3)).verdict is Verdict.NOT_SHOWN


def test_units_of_different_probabilities_are_judged_by_the_estimate_for_all():
    numbers = (20.0, 29.5, 30 * (1 - 1e-12), 30.0, np.nan)
    assert [is_weighted(row(n_effective=n)) for n in numbers] == [True] * 2 + [False] * 3
    assert basis_of_claim(row(n_effective=20.0)) is WITHIN_KINDS
    assert basis_of_claim(row(n_kinds=1)) is MEASURED
    weighted = row(n_kinds=1, n_effective=20.0)
    assert basis_of_claim(weighted) is POPULATION
    assert claim_of_row(weighted) == (Verdict.WRONG_WAY, detectable_rho(20, 8), np.nan)
    assert claim_of_row(row(n_kinds=1, n_effective=20.0, p_adjusted=0.5)).verdict is Verdict.ABSENT
    for n_effective in (20.0, 30.0):
        for low, high in ((-0.3, 0.1), (-0.1, 0.3)):
            ends = {"population_low": low, "population_high": high, "ci_low": low, "ci_high": high}
            unsure = row(n_kinds=1, n_effective=n_effective, p_adjusted=0.5, **ends)
            assert claim_of_row(unsure).verdict is Verdict.NOT_SHOWN
    few = claim_of_row(row(n_kinds=1, n_effective=5.9, p_adjusted=1e-6))
    assert few.verdict is Verdict.NOT_SHOWN and np.isnan(few.detectable)
    assert claim_of_row(row(n_effective=20.0)).detectable == detectable_rho(20, 8)


@pytest.mark.parametrize("changes", [{"n_kinds": 2}, {"n_kinds": 1}, {"n_kinds": 1, "n_effective": 20.0}])
def test_the_direction_is_that_of_the_estimate_and_not_of_an_end(changes):
    for sign, verdict in ((1, Verdict.BETTER), (-1, Verdict.WRONG_WAY)):
        low, high = sorted([-0.1 * sign, 0.5 * sign])
        figures = {"within_rho": 0.3, "population_rho": 0.3, "spearman": 0.3}
        figures = {name: sign * rho for name, rho in figures.items()}
        figures |= {f"{name}_low": low for name in ("within", "population", "ci")}
        figures |= {f"{name}_high": high for name in ("within", "population", "ci")}
        assert claim_of_row(row(**changes, **figures)).verdict is verdict


def test_an_exploratory_row_takes_half_the_p_value_of_the_primary_one():
    verdicts = [claim_of_row(row(primary=primary, p_adjusted=0.03)).verdict for primary in (0, 1)]
    assert verdicts == [Verdict.NOT_SHOWN, Verdict.WRONG_WAY]
    assert claim_of_row(row(primary=0, p_adjusted=0.024)).verdict is Verdict.WRONG_WAY
    assert claim_of_row(row(primary=0, n_tests=4)).detectable == detectable_rho(30, 8, 0.025 / 4)
