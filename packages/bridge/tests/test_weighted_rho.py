import numpy as np
import pytest
from bridge.analysis.weighted_rho import effective_number, rho_interval, weighted_ranks, weighted_rho
from scipy import stats
from synthetic import points


@pytest.mark.parametrize("ties", [False, True])
def test_equal_weights_give_spearmans_rho(ties):
    x, y = points(30, seed=1, ties=ties)
    assert weighted_rho(x, y).rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert weighted_rho(x, y, np.full(30, 7.0)).rho == pytest.approx(stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize("ties", [False, True])
def test_a_weight_of_three_is_a_unit_three_times(ties):
    x, y = points(20, seed=2, ties=ties)
    weights = np.random.default_rng(0).integers(1, 5, 20)
    repeated = stats.spearmanr(np.repeat(x, weights), np.repeat(y, weights)).statistic
    assert weighted_rho(x, y, weights).rho == pytest.approx(repeated)
    ranks = (stats.rankdata(np.repeat(x, weights)) - 0.5) / weights.sum()
    assert weighted_ranks(x, weights) == pytest.approx(ranks[np.cumsum(weights) - 1])


@pytest.mark.parametrize("n", [5, 6, 7, 9])
def test_rounding_leads_beyond_no_rho(n):
    units = np.arange(n)
    assert weighted_rho(units, -units).rho == -1  # -1.0000000000000002 without a limit
    assert weighted_rho(units, units).rho == 1


def test_infinite_values_tie():
    assert weighted_ranks(np.array([1, np.inf, np.inf, 0]), np.ones(4)).tolist() == [0.375, 0.75, 0.75, 0.125]


def test_covariates_are_taken_out_by_least_squares():
    x, y = points(40, seed=3)
    z = np.column_stack([np.ones(40), np.arange(40) % 3 == 0, np.linspace(0, 1, 40) ** 2])
    residuals = []
    for values in (x, y):
        ranks = stats.rankdata(values)
        residuals.append(ranks - z @ np.linalg.lstsq(z, ranks, rcond=None)[0])
    result = weighted_rho(x, y, covariates=z)
    assert result.rho == pytest.approx(np.corrcoef(*residuals)[0, 1])
    assert result.n_fitted == 3
    assert [result.x_residual * 40, result.y_residual * 40] == [pytest.approx(each) for each in residuals]
    hat = z @ np.linalg.inv(z.T @ z) @ z.T
    assert result.leverage == pytest.approx(np.diag(hat))


def test_covariates_that_others_span_are_not_fitted_twice():
    x, y = points(20, seed=3)
    kinds = np.eye(3)[np.arange(20) % 3]
    alone, redundant = (weighted_rho(x, y, covariates=z) for z in (kinds, np.hstack([kinds, np.ones((20, 1)), kinds])))
    assert (alone.n_fitted, redundant.n_fitted) == (3, 3)
    assert redundant.rho == pytest.approx(alone.rho)
    assert redundant.leverage == pytest.approx(alone.leverage)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("with_covariates", [False, True])
def test_influence_is_the_derivative_of_rho_by_a_weight(ties, with_covariates):
    x, y = points(25, seed=4, ties=ties)
    weights = np.random.default_rng(1).uniform(0.5, 3, 25)
    z = np.column_stack([np.ones(25), np.arange(25) % 2]) if with_covariates else None
    result = weighted_rho(x, y, weights, z)
    for unit in (0, 7, 24):
        step = np.zeros(25)
        step[unit] = 1e-6
        slope = (weighted_rho(x, y, weights + step, z).rho - weighted_rho(x, y, weights - step, z).rho) / 2e-6
        assert result.influence[unit] / weights.sum() == pytest.approx(slope, rel=1e-4, abs=1e-8)
    assert weights @ result.influence == pytest.approx(0, abs=1e-9)


def test_what_does_not_vary_has_no_rho():
    x, y = points(10, seed=5)
    constant = weighted_rho(np.ones(10), y)
    assert np.isnan(constant.rho) and np.isnan(constant.influence).all()
    assert constant.x_residual == pytest.approx(np.zeros(10))
    assert constant.y_residual == pytest.approx((stats.rankdata(y) - 5.5) / 10)
    assert (constant.n_fitted, constant.leverage.tolist()) == (1, pytest.approx([0.1] * 10))
    assert np.isnan(weighted_rho(x, np.ones(10)).rho)
    assert np.isnan(weighted_rho(x, y, covariates=np.eye(10)).rho)
    assert np.isnan(rho_interval(weighted_rho(np.ones(10), y), np.ones(10))).all()


def test_the_standard_error_is_that_of_the_jackknife():
    x, y = points(300, seed=6)
    without = [stats.spearmanr(np.delete(x, i), np.delete(y, i)).statistic for i in range(300)]
    jackknife = np.sqrt(299 / 300 * ((np.array(without) - np.mean(without)) ** 2).sum())
    interval = rho_interval(weighted_rho(x, y), np.ones(300))
    assert interval.error == pytest.approx(jackknife, rel=0.02)
    z, rho = stats.t.ppf(0.975, 298), stats.spearmanr(x, y).statistic
    half = z * interval.error / (1 - rho**2)
    assert [interval.low, interval.high] == pytest.approx(np.tanh(np.arctanh(rho) + np.array([-half, half])))
    p_value = 2 * stats.t.sf(np.arctanh(rho) * (1 - rho**2) / interval.error, 298)
    assert interval.p_value == pytest.approx(p_value) and p_value < 1e-6
    mirrored = rho_interval(weighted_rho(x, -y), np.ones(300))
    assert mirrored == pytest.approx((interval.error, -interval.high, -interval.low, p_value))


def test_the_p_value_has_the_effective_degrees_of_freedom():
    x, y = points(14, seed=12)
    weights, z = np.linspace(1, 2, 14), np.column_stack([np.ones(14), np.arange(14) % 2])
    result = weighted_rho(x, y, weights, z)
    parts = weights / weights.sum() * result.influence
    error = np.sqrt(14 / 12 * (parts**2).sum())
    degrees = weights.sum() ** 2 / (weights**2).sum() - 2 - 1
    scale = error / (1 - result.rho**2)
    half = stats.t.ppf(0.9, degrees) * scale
    p_value = 2 * stats.t.sf(abs(np.arctanh(result.rho)) / scale, degrees)
    assert 0.001 < p_value < 0.9
    expected = (error, np.tanh(np.arctanh(result.rho) - half), np.tanh(np.arctanh(result.rho) + half), p_value)
    assert rho_interval(result, weights, level=0.8) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_rho_of_one_is_taken_as_one_less_a_trifle(sign):
    result = weighted_rho(np.arange(8.0), sign * np.arange(8.0))
    interval = rho_interval(result._replace(influence=np.full(8, 4e-12)), np.ones(8))
    error = np.sqrt(8 / 7 * 8 * (4e-12 / 8) ** 2)
    centre = np.arctanh(1 - 1e-12)
    scale = error / (1 - np.tanh(centre) ** 2)
    nearer = np.arctanh(interval.low if sign > 0 else -interval.high)
    assert nearer == pytest.approx(centre - stats.t.ppf(0.975, 6) * scale, rel=1e-4)
    assert interval.p_value == pytest.approx(2 * stats.t.sf(centre / scale, 6), rel=1e-6, abs=0)


def test_units_that_were_certain_add_nothing_to_the_interval():
    x, y = points(30, seed=7)
    weights, result = np.ones(30), weighted_rho(*points(30, seed=7))
    half_certain = np.where(np.arange(30) < 15, 1.0, 0.5)
    missed = (1 - half_certain) @ (result.influence / 30) ** 2
    assert rho_interval(result, weights, half_certain).error == pytest.approx(np.sqrt(30 / 29 * missed))
    assert np.isnan(rho_interval(weighted_rho(x, y), weights, np.ones(30))).all()


def test_fewer_than_six_effective_units_have_no_interval():
    x, y = points(20, seed=8)
    lopsided = np.where(np.arange(20) < 2, 100.0, 1.0)
    assert effective_number(lopsided) == pytest.approx(218**2 / 20018)
    assert np.isnan(rho_interval(weighted_rho(x, y, lopsided), lopsided)).all()
    assert np.isnan(rho_interval(weighted_rho(x[:5], y[:5]), np.ones(5))).all()
    assert np.isfinite(rho_interval(weighted_rho(x[:6], y[:6]), np.ones(6))).all()
    for n_kinds, tell in ((6, True), (7, False)):  # one degree of freedom, none
        kinds = np.eye(n_kinds)[np.minimum(np.arange(8), n_kinds - 1)]
        uneven = np.linspace(1, 4, 8)  # fewer than none
        assert effective_number(uneven) > 6
        assert np.isnan(rho_interval(weighted_rho(x[:8], y[:8], uneven, kinds), uneven)).all()
        interval = rho_interval(weighted_rho(x[:8], y[:8], covariates=kinds), np.ones(8))
        assert np.isfinite(interval).all() if tell else np.isnan(interval).all()
