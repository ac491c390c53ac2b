import itertools

import numpy as np
import pytest
from bridge.analysis.within_kinds import kind_and_depth, within_kinds
from scipy import stats
from synthetic import points

KINDS = ["query"] * 3 + ["down"] * 4


def partial_rho(x, y, covariates):
    residuals = []
    for values in (x, y):
        residuals.append(values - covariates @ np.linalg.lstsq(covariates, values, rcond=None)[0])
    return float(np.corrcoef(*residuals)[0, 1])


def test_rho_is_that_of_the_ranks_less_the_mean_of_their_kind():
    x, y = points(7, seed=1)
    result = within_kinds(x, y, KINDS, [None] * 7, np.random.default_rng(0), n_resamples=99).result
    kinds = np.array([[kind == "query", kind == "down"] for kind in KINDS], dtype=float)
    assert result.rho == pytest.approx(partial_rho(stats.rankdata(x), stats.rankdata(y), kinds))
    assert result.n_fitted == 2


def test_p_is_that_of_all_shuffles_within_kinds():
    x, y = points(7, seed=3)
    kinds = np.array([[kind == "query", kind == "down"] for kind in KINDS], dtype=float)
    rank_x, rank_y = stats.rankdata(x), stats.rankdata(y)
    observed = partial_rho(rank_x, rank_y, kinds)
    rhos = []
    for first in itertools.permutations(range(3)):
        for second in itertools.permutations(range(3, 7)):
            rhos.append(partial_rho(rank_x, rank_y[[*first, *second]], kinds))
    tails = [np.mean(np.array(rhos) >= observed - 1e-9), np.mean(np.array(rhos) <= observed + 1e-9)]
    p = within_kinds(x, y, KINDS, [None] * 7, np.random.default_rng(0), n_resamples=20_000).p_value
    assert p == pytest.approx(min(1, 2 * min(tails)), abs=0.015)


def test_kinds_that_differ_are_no_agreement():
    rng = np.random.default_rng(5)
    kinds = np.repeat(["a", "b", "c", "d"], 15)
    level = np.repeat([0.0, 10, 20, 30], 15)
    x, y = level + rng.normal(size=60), level + rng.normal(size=60)
    assert stats.spearmanr(x, y).pvalue < 1e-20
    assert within_kinds(x, y, kinds, [None] * 60, rng, n_resamples=999).p_value > 0.05
    agreeing = within_kinds(x, x + rng.normal(size=60), kinds, [None] * 60, rng, n_resamples=999)
    assert agreeing.p_value == 2 / 1000 and agreeing.interval.low > 0.2


def test_a_course_over_depth_is_taken_out():
    depths = list(range(30)) * 2
    kinds = ["a"] * 30 + ["b"] * 30
    columns = kind_and_depth(kinds, depths)
    assert columns.shape == (60, 2 + 60 // 7 - 1)
    smooth = np.cos(np.pi * (np.array(depths) + 0.5) / 30)
    fit = columns @ np.linalg.lstsq(columns, smooth, rcond=None)[0]
    assert fit == pytest.approx(smooth)
    assert kind_and_depth(["a", "b"] * 3, [0, 1, 2, 0, 1, 2]).shape == (6, 2)


def test_units_outside_the_layers_have_no_depth():
    columns = kind_and_depth(["a"] * 20 + ["embedding"], [*range(20), None])
    assert columns.shape == (21, 2 + 2)
    assert (columns[20, 2:] == 0).all() and (columns[:20, 2:] != 0).any()


def test_nothing_is_left_where_every_layer_is_a_kind_of_its_own():
    x, y = points(6, seed=2)
    result = within_kinds(x, y, list("abcdef"), [0] * 6, np.random.default_rng(0), n_resamples=99)
    assert np.isnan([result.result.rho, result.p_value, result.interval.low]).all()


def test_infinite_effects_tie_as_the_largest():
    x, y = points(20, seed=6)
    broken, large = y.copy(), y.copy()
    broken[[3, 4]], large[[3, 4]] = np.inf, 1e9
    one, other = (
        within_kinds(x, z, ["a", "b"] * 10, [None] * 20, np.random.default_rng(0), n_resamples=199)
        for z in (broken, large)
    )
    assert (one.result.rho, one.p_value) == (other.result.rho, other.p_value)
