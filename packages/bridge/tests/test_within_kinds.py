import itertools

import numpy as np
import pytest
from bridge.analysis import within_kinds as module
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


def literal_p(x, y, kinds, covariates, weights, seed, n):
    """Each shuffle on its own: residuals of y shuffled within kinds, fitted anew, correlated with those of x."""
    root, n_units = np.sqrt(weights), len(x)

    def residuals(values):
        return values - covariates @ np.linalg.lstsq(root[:, None] * covariates, root * values, rcond=None)[0]

    def rho(first, second):
        norm = np.sqrt(weights @ second**2)
        return (weights * first) @ second / (np.sqrt(weights @ first**2) * norm) if norm > 1e-9 else 0.0

    def ranks(values):
        return [
            sum(w * ((v < value) + (v == value) / 2) for v, w in zip(values, weights, strict=True)) for value in values
        ]

    rng = np.random.default_rng(seed)
    order = np.tile(np.arange(n_units), (n, 1))
    for kind in sorted(set(kinds)):
        units = [unit for unit in range(n_units) if kinds[unit] == kind]
        order[:, units] = rng.permuted(order[:, units], axis=1)
    left_x, left_y = residuals(np.array(ranks(x))), residuals(np.array(ranks(y)))
    observed = rho(left_x, left_y)
    rhos = np.array([rho(left_x, residuals(left_y[shuffled])) for shuffled in order])
    at_least, at_most = (rhos >= observed - 1e-9).sum(), (rhos <= observed + 1e-9).sum()
    return min(1.0, 2 * (1 + min(at_least, at_most)) / (n + 1))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("weighted", [False, True])
def test_p_is_that_of_the_same_shuffles_one_by_one(sign, weighted):
    """Among so few units many a shuffle changes nothing, and ties with what was observed."""
    x, y, depths = np.array([2.0, 1, 3, 4, 5, 6, 7]), np.array([1.0, 2, 3, 4, 6, 5, 7]), [None] * 7
    weights = np.array([1.0, 2, 1, 3, 1, 1, 2]) if weighted else None
    kinds = ["query", "down"] * 2 + ["down"] * 2 + ["query"]
    rng = np.random.default_rng(8)
    p = within_kinds(x, sign * y, kinds, depths, rng, weights, n_resamples=200).p_value
    columns = np.array([[kind == "down", kind == "query"] for kind in kinds], dtype=float)
    w = np.ones(7) if weights is None else weights
    assert p == pytest.approx(literal_p(x, sign * y, kinds, columns, w, 8, 200), rel=1e-12)
    assert 2 / 201 < p < 0.5


def test_p_is_one_at_most():
    x, y = np.array([2.0, 0, 0, 0]), np.array([1.0, 2, 1, 0])  # rho is 0, and that of half of all shuffles
    kinds_apart = within_kinds(x, y, ["a"] * 4, [None] * 4, np.random.default_rng(0), n_resamples=50)
    assert (kinds_apart.result.rho, kinds_apart.p_value) == (0, 1)


def test_p_given_the_depth_is_that_of_the_same_shuffles():
    x, y = points(21, seed=4)
    kinds, depths = ["a", "b", "c"] * 7, [unit // 3 for unit in range(21)]
    p = within_kinds(x, y, kinds, depths, np.random.default_rng(5), n_resamples=100).p_value
    waves = [[np.cos(np.pi * j * (depth + 0.5) / 7) for j in (1, 2)] for depth in depths]
    columns = np.hstack([np.tile(np.eye(3), (7, 1)), waves])
    assert kind_and_depth(kinds, depths) == pytest.approx(columns)
    assert p == pytest.approx(literal_p(x, y, kinds, columns, np.ones(21), 5, 100), rel=1e-12)


def test_a_shuffle_that_the_depth_explains_is_no_agreement():
    """Four layers of one kind at two depths: of six shuffles of two high effects, two leave nothing but the depth."""
    kinds, depths = ["a"] * 4 + list("bcdefghijklm"), [0, 0, 1, 1] + [0] * 12
    x, y = np.random.default_rng(2).permutation(16), np.array([0, 1, 0, 1] + [0] * 12)
    p = within_kinds(x, y, kinds, depths, np.random.default_rng(9), n_resamples=100).p_value
    columns = kind_and_depth(kinds, depths)
    assert columns.shape == (16, 13 + 1)
    assert p == pytest.approx(literal_p(x, y, kinds, columns, np.ones(16), 9, 100), rel=1e-12)


def test_p_does_not_depend_on_the_size_of_the_blocks(monkeypatch):
    x, y = points(10, seed=7)
    p_values = set()
    for size in (module.BLOCK_SIZE, 35, 5):  # all shuffles at once, three, and less than one
        monkeypatch.setattr(module, "BLOCK_SIZE", size)
        p_values.add(within_kinds(x, y, ["a"] * 10, [None] * 10, np.random.default_rng(3), n_resamples=200).p_value)
    assert len(p_values) == 1


def test_kinds_that_differ_are_no_agreement():
    rng = np.random.default_rng(5)
    kinds = np.repeat(["a", "b", "c", "d"], 15)
    level = np.repeat([0.0, 10, 20, 30], 15)
    x, y = level + rng.normal(size=60), level + rng.normal(size=60)
    assert stats.spearmanr(x, y).pvalue < 1e-20
    assert within_kinds(x, y, kinds, [None] * 60, rng, n_resamples=999).p_value > 0.05
    agreeing = within_kinds(x, x + rng.normal(size=60), kinds, [None] * 60, rng, n_resamples=999)
    assert agreeing.p_value == 2 / 1000 and agreeing.interval.low > 0.2
    by_default = within_kinds(x, x, kinds, [None] * 60, rng)
    assert by_default.p_value == 2 / 10_000


def test_a_course_over_depth_is_taken_out():
    depths = list(range(30)) * 2
    kinds = ["a"] * 30 + ["b"] * 30
    columns = kind_and_depth(kinds, depths)
    assert columns.shape == (60, 2 + 60 // 7 - 1)
    smooth = np.cos(np.pi * (np.array(depths) + 0.5) / 30)
    fit = columns @ np.linalg.lstsq(columns, smooth, rcond=None)[0]
    assert fit == pytest.approx(smooth)
    assert kind_and_depth(["a", "b"] * 3, [0, 1, 2, 0, 1, 2]).shape == (6, 2)
    assert kind_and_depth(["a"] * 28, [0, 1, 2, 5] * 7).shape == (28, 1 + 3)  # three terms span four depths
    assert kind_and_depth(["a"] * 28, [0, 5] * 14).shape == (28, 1 + 1)
    assert kind_and_depth(["a"] * 28, [3] * 28).shape == (28, 1)


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
