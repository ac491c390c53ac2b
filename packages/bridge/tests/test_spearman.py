import numpy as np
import pytest
import reference
from bridge.analysis import bootstrap, spearman
from synthetic import points


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [4, 7, 30])
def test_rho_is_the_literal_definition(n, ties):
    x, y = points(n, seed=n, ties=ties)
    assert spearman.spearman_rho(x, y) == pytest.approx(reference.spearman(x, y))


@pytest.mark.parametrize("seed", range(4))
def test_permutation_p_of_few_points_is_exact(seed):
    x, y = points(6, seed, ties=seed == 3)
    p = spearman.permutation_p_value(x, y, np.random.default_rng(0))
    assert p == pytest.approx(reference.permutation_p(list(x), list(y)))


def test_permutation_p_of_many_points_is_close_to_the_exact_one():
    x, y = points(7, seed=11)  # 5040 pairings, more than are drawn
    p = spearman.permutation_p_value(x, y, np.random.default_rng(0), n_resamples=3000)
    assert p == pytest.approx(reference.permutation_p(list(x), list(y)), abs=0.03)


def test_permutation_p_is_never_zero():
    x = np.arange(40.0)
    assert spearman.permutation_p_value(x, x, np.random.default_rng(0), n_resamples=999) == pytest.approx(2 / 1000)


def test_p_values_are_uniform_without_a_relation():
    rng = np.random.default_rng(5)
    p = [spearman.permutation_p_value(*rng.normal(size=(2, 12)), rng, n_resamples=199) for _ in range(200)]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.06)


def test_interval_contains_rho_and_is_that_of_a_loop():
    x, y = points(25, seed=6)
    low, high = spearman.rho_interval(x, y, np.random.default_rng(1), n_resamples=4000)
    loop = np.random.default_rng(2)
    rhos = [reference.spearman(x[i], y[i]) for i in (loop.integers(0, 25, 25) for _ in range(600))]
    assert low < reference.spearman(x, y) < high
    assert [low, high] == pytest.approx(np.percentile(rhos, [2.5, 97.5]), abs=0.08)


def test_interval_does_not_depend_on_the_size_of_the_blocks(monkeypatch):
    x, y = points(10, seed=7)
    whole = spearman.rho_interval(x, y, np.random.default_rng(3), n_resamples=500)
    for size in (70, 5):  # seven units at a time, and less than one
        monkeypatch.setattr(bootstrap, "BLOCK_SIZE", size)
        assert spearman.rho_interval(x, y, np.random.default_rng(3), n_resamples=500) == whole


def test_p_does_not_depend_on_the_size_of_the_blocks(monkeypatch):
    x, y = points(10, seed=7)
    p_values = set()
    for size in (spearman.BLOCK_SIZE, 70, 5):
        monkeypatch.setattr(spearman, "BLOCK_SIZE", size)
        p_values.add(spearman.permutation_p_value(x, y, np.random.default_rng(3), n_resamples=300))
    assert len(p_values) == 1


def test_by_default_9999_pairings_are_drawn():
    x = np.arange(9.0)
    p_value = spearman.permutation_p_value(x, x, np.random.default_rng(0))
    assert p_value == pytest.approx(2 / 10_000)


def test_resamples_without_a_rho_are_left_out_of_the_interval():
    """Of four units, many a resample draws one unit alone, or two that are equal in x."""
    x, y = np.array([1.0, 1, 1, 2]), np.array([1.0, 2, 3, 4])
    low, high = spearman.rho_interval(x, y, np.random.default_rng(0), n_resamples=2000)
    assert -1 <= low <= spearman.spearman_rho(x, y) <= high <= 1
    two = np.array([0.0, 1])
    assert spearman.rho_interval(two, -two, np.random.default_rng(0), n_resamples=50) == (-1, -1)


@pytest.mark.parametrize(("level", "percentiles"), [(0.95, [2.5, 97.5]), (0.5, [25, 75])])
def test_the_ends_are_the_percentiles_of_the_same_draws(level, percentiles):
    x, y = points(8, seed=2)
    interval = spearman.rho_interval(x, y, np.random.default_rng(4), n_resamples=200, level=level)
    draws = np.random.default_rng(4).integers(0, 8, size=(200, 8))
    expected = np.percentile([reference.spearman(x[drawn], y[drawn]) for drawn in draws], percentiles)
    assert [*interval] == pytest.approx(expected.tolist(), rel=1e-12)
