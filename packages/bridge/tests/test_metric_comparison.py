import numpy as np
import pandas as pd
import pytest
from bridge.analysis.metric_comparison import Difference, Standing, compare_metrics, holm, standing, standing_of_row
from bridge.analysis.weighted_rho import weighted_rho
from scipy import stats


def rhos(n, seed, **noise):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n)
    return {metric: weighted_rho(y + size * rng.normal(size=n), y) for metric, size in noise.items()}


def test_all_pairs_are_compared_by_the_spread_of_their_influence():
    compared = rhos(50, 1, a=0.3, b=0.6, c=3)
    pairs = compare_metrics(compared)
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    pair = pairs[0]
    assert pair.difference == compared["a"].rho - compared["b"].rho
    parts = (compared["a"].influence - compared["b"].influence) / 50 / (1 - 1 / 50)
    error = np.sqrt((parts**2).sum())
    assert pair.p_value == pytest.approx(2 * stats.t.sf(pair.difference / error, 48))
    assert pair.high - pair.difference == pytest.approx(stats.t.ppf(0.975, 48) * error)
    adjusted = holm(np.array([pair.p_value for pair in pairs]))
    assert [pair.p_adjusted for pair in pairs] == adjusted.tolist()


def test_the_error_of_a_difference_is_about_that_of_the_jackknife():
    rng = np.random.default_rng(2)
    y = rng.normal(size=80)
    x = {"a": y + 0.5 * rng.normal(size=80), "b": y + rng.normal(size=80)}
    (pair,) = compare_metrics({metric: weighted_rho(values, y) for metric, values in x.items()})
    without = []
    for i in range(80):
        first, second = (stats.spearmanr(np.delete(values, i), np.delete(y, i)).statistic for values in x.values())
        without.append(first - second)
    jackknife = np.sqrt(79 / 80 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert (pair.high - pair.low) / 2 / stats.t.ppf(0.975, 78) == pytest.approx(jackknife, rel=0.05)


@pytest.mark.parametrize("turned", [False, True])
def test_the_larger_number_fitted_and_the_larger_leverage_count(turned):
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=12), rng.normal(size=12)
    kinds = np.eye(3)[[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]]
    weights = rng.uniform(1, 2, 12)
    within, plain = weighted_rho(x, y, weights, kinds), weighted_rho(y + x, y, weights)
    rhos_of = {"plain": plain, "within": within} if turned else {"within": within, "plain": plain}
    (pair,) = compare_metrics(rhos_of, weights)
    of_kind = kinds @ (kinds.T @ weights)
    assert within.leverage == pytest.approx(weights / of_kind)  # larger than weights / weights.sum()
    parts = weights / weights.sum() * (within.influence - plain.influence) / (1 - weights / of_kind)
    error, degrees = np.sqrt((parts**2).sum()), weights.sum() ** 2 / (weights**2).sum() - 3 - 1
    assert pair.difference == (-1 if turned else 1) * (within.rho - plain.rho)
    assert pair.high - pair.difference == pytest.approx(stats.t.ppf(0.975, degrees) * error)
    assert pair.difference - pair.low == pytest.approx(stats.t.ppf(0.975, degrees) * error)
    assert pair.p_value == pytest.approx(2 * stats.t.sf(abs(pair.difference) / error, degrees))


@pytest.mark.parametrize(("n", "n_kinds", "tell"), [(6, 1, True), (5, 1, False), (8, 6, True), (8, 7, False)])
def test_six_units_and_one_degree_of_freedom_tell(n, n_kinds, tell):
    rng = np.random.default_rng(6)
    y, kinds = rng.normal(size=n), np.eye(n_kinds)[np.minimum(np.arange(n), n_kinds - 1)]
    both = {metric: weighted_rho(rng.normal(size=n), y, covariates=kinds) for metric in "ab"}
    (pair,) = compare_metrics(both)
    assert np.isfinite([pair.low, pair.high, pair.p_value, pair.p_adjusted]).all() == tell


def test_holm_is_the_literal_procedure():
    p_values = np.array([0.04, 0.01, np.nan, 0.03, 0.005])
    ordered = sorted(p for p in p_values if p == p)
    literal = {p: max(min(1, (4 - j) * ordered[j]) for j in range(i + 1)) for i, p in enumerate(ordered)}
    assert holm(p_values)[[0, 1, 3, 4]].tolist() == [literal[p] for p in p_values if p == p]
    assert np.isnan(holm(p_values)[2])
    assert holm(np.array([0.6, 0.9, 0.1])).tolist() == pytest.approx([1, 1, 0.3])
    assert holm(np.array([0.2, 0.21, 0.2])).tolist() == pytest.approx([0.6, 0.6, 0.6])


def test_a_primary_pair_keeps_its_p_value():
    compared = rhos(50, 1, a=0.3, b=0.6, c=3)
    pairs = compare_metrics(compared, primary=("b", "a"))
    assert pairs[0].p_adjusted == pairs[0].p_value
    assert [pair.p_adjusted for pair in pairs[1:]] == holm(np.array([pair.p_value for pair in pairs[1:]])).tolist()


def test_equal_metrics_differ_by_nothing_and_few_units_tell_nothing():
    compared = rhos(20, 3, a=1)
    (pair,) = compare_metrics({"a": compared["a"], "b": compared["a"]})
    assert (pair.difference, pair.p_value) == (0, 1)
    (pair,) = compare_metrics(rhos(5, 3, a=1, b=2))
    assert np.isnan([pair.low, pair.high, pair.p_value, pair.p_adjusted]).all()


def test_a_metric_without_a_rho_is_told_apart_from_none_and_does_not_count():
    compared = rhos(20, 3, a=1, b=2)
    compared["equal"] = weighted_rho(np.ones(20), np.arange(20.0))
    pairs = compare_metrics(compared)
    assert np.isnan([[pair.difference, pair.low, pair.p_value, pair.p_adjusted] for pair in pairs[1:]]).all()
    assert pairs[0].p_adjusted == pairs[0].p_value


def pair(first, second, difference, p):
    return Difference(first, second, difference, np.nan, np.nan, np.nan, p)


def test_a_metric_stands_where_the_pairs_put_it():
    pairs = [pair("a", "b", 0.3, 0.01), pair("a", "c", 0.4, 0.049), pair("b", "c", 0.1, 0.05)]
    assert standing(pairs, "a") == Standing(("b", "c"), (), ())
    assert standing(pairs, "b") == Standing((), ("a",), ("c",))
    assert [standing(pairs, metric).is_best for metric in "abc"] == [True, False, False]
    assert standing([pair("a", "b", np.nan, np.nan)], "b") == Standing((), (), ("a",))
    assert not standing([], "a").is_best
    turned = [pair("c", "a", 0.3, 0.01), pair("d", "a", -0.2, 0.01)]
    assert standing(turned, "a") == Standing(("d",), ("c",), ())
    assert (standing(turned, "c").above, standing(turned, "d").below) == (("a",), ("a",))


def test_a_row_names_them_with_spaces_between():
    row = pd.Series({"above": "a b", "below": "", "not_told_apart": np.nan})
    assert standing_of_row(row) == Standing(("a", "b"), (), ())
