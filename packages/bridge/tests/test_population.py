import numpy as np
import pytest
from bridge.analysis.population import population_precision, population_ratio
from scipy import stats


def test_of_a_census_precision_is_the_share_of_the_common_head():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=200), rng.normal(size=200)
    common = set(np.argsort(-x)[:40]) & set(np.argsort(-y)[:40])
    estimate = population_precision(x, y, np.ones(200), 0.2)
    assert (estimate.value, estimate.n_effective) == (pytest.approx(len(common) / 40), pytest.approx(40))
    wilson = stats.binomtest(len(common), 40).proportion_ci(method="wilson")
    assert estimate.low == pytest.approx(wilson.low, abs=0.02) and estimate.high == pytest.approx(wilson.high, abs=0.02)
    assert estimate.low < wilson.low < wilson.high < estimate.high  # t for z
    z = stats.t.ppf(0.975, 39)  # the ends p solve (p - value)^2 = z^2 p (1 - p) / 40
    ends = np.roots([1 + z**2 / 40, -2 * estimate.value - z**2 / 40, estimate.value**2])
    assert [estimate.low, estimate.high] == pytest.approx(sorted(ends))


def test_a_unit_stands_for_as_many_as_its_probability_says():
    x, y = np.array([3.0, 2, 1, 0]), np.array([0.0, 3, 2, 1])
    weights = np.array([1, 2, 3, 4])
    repeated = population_precision(np.repeat(x, weights), np.repeat(y, weights), np.ones(10), 0.3)
    assert population_precision(x, y, 1 / weights, 0.3).value == pytest.approx(repeated.value)


def test_units_that_tie_share_the_head():
    estimate = population_precision(np.zeros(30), np.arange(30.0), np.ones(30), 0.4)
    assert estimate.value == pytest.approx(0.4)


def test_small_heads_have_no_interval():
    estimate = population_precision(np.arange(30.0), np.arange(30.0), np.ones(30), 0.1)
    assert estimate.value == 1 and np.isnan([estimate.low, estimate.high]).all()


def test_a_ratio_has_the_interval_of_its_linearization():
    rng = np.random.default_rng(1)
    score, inclusion = rng.exponential(size=40), rng.uniform(0.1, 0.9, 40)
    effect = score * rng.uniform(0.5, 1.5, 40)
    estimate = population_ratio(score, effect, inclusion)
    ratio = (effect / inclusion).sum() / (score / inclusion).sum()
    parts = np.sqrt(1 - inclusion) * (effect - ratio * score) / inclusion / (score / inclusion).sum()
    degrees = (parts**2).sum() ** 2 / (parts**4).sum()
    half = stats.t.ppf(0.975, degrees) * np.sqrt(40 / 39 * (parts**2).sum())
    assert list(estimate) == pytest.approx([ratio, ratio - half, ratio + half, degrees])


def test_few_units_or_an_infinite_effect_give_no_ratio():
    ones = np.ones(6)
    assert population_ratio(ones, ones, 0.5 * ones).value == 1
    assert np.isnan(population_ratio(ones[:5], ones[:5], 0.5 * ones[:5])).all()
    assert np.isnan(population_ratio(ones, np.array([1, 1, 1, 1, 1, np.inf]), 0.5 * ones)).all()


def test_a_total_score_of_zero_gives_no_ratio_and_one_of_one_does():
    effect, score = np.arange(6.0), np.array([1.0, -1, 2, -2, 3, -3])
    assert np.isnan(population_ratio(score, effect, np.full(6, 0.5))).all()
    score[0] = 1.5
    estimate = population_ratio(score, effect, np.full(6, 0.5))
    assert estimate.value == 30 and estimate.low < 30 < estimate.high
    assert population_ratio(-score, effect, np.full(6, 0.5)).value == -30


def test_a_census_and_an_effect_in_proportion_have_a_ratio_without_an_interval():
    score = np.arange(1.0, 7)
    for effect, inclusion, ratio in ((score**2, 1.0, 91 / 21), (3 * score, 0.5, 3.0)):
        estimate = population_ratio(score, effect, np.full(6, inclusion))
        assert estimate.value == pytest.approx(ratio) and np.isnan(estimate[1:]).all()


def test_an_overlap_of_none_and_of_all_ends_at_zero_and_one_exactly():
    x = np.arange(64.0)
    none, whole = (population_precision(x, y, np.ones(64), 0.25) for y in (-x, x))
    z = stats.t.ppf(0.975, 15)
    assert none == (0, 0, pytest.approx(z**2 / (16 + z**2)), 16)
    assert whole == (1, pytest.approx(16 / (16 + z**2)), 1, 16)


def test_a_head_of_exactly_ten_units_has_an_interval():
    x = np.arange(40.0)
    estimate = population_precision(x, x, np.ones(40), 0.25)
    assert estimate.n_effective == 10
    assert np.isnan(population_precision(x[:36], x[:36], np.ones(36), 0.25)[1:3]).all()  # nine
    assert 0 < estimate.low < estimate.value == 1
