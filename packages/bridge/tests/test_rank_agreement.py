import numpy as np
import pytest
import reference
from bridge.analysis import rank_agreement


def points(n, seed, ties=False):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=n), rng.normal(size=n)
    y = y + 0.7 * x
    return (np.round(x), np.round(y)) if ties else (x, y)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [4, 7, 30])
def test_rho_and_tau_b_are_the_literal_definitions(n, ties):
    x, y = points(n, seed=n, ties=ties)
    assert rank_agreement.spearman_rho(x, y) == pytest.approx(reference.spearman(x, y))
    assert rank_agreement.kendall_tau_b(x, y) == pytest.approx(reference.tau_b(x, y))


def test_weighted_tau_is_the_literal_definition():
    x, y = points(12, seed=3)
    assert rank_agreement.weighted_tau(x, y) == pytest.approx(reference.weighted_tau(x, y))


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_rank_biased_overlap_is_the_infinite_sum(p):
    x, y = points(15, seed=4)
    first, second = ([int(i) for i in np.argsort(-v)] for v in (x, y))
    assert rank_agreement.rank_biased_overlap(x, y, p) == pytest.approx(reference.rank_biased_overlap(first, second, p))


def test_rank_biased_overlap_of_equal_orders_is_one():
    x = np.arange(20.0)
    assert rank_agreement.rank_biased_overlap(x, x**3) == pytest.approx(1.0)


def test_rank_biased_overlap_looks_at_the_largest_first():
    x = np.arange(20.0)
    wrong_at_the_top, wrong_at_the_bottom = x.copy(), x.copy()
    wrong_at_the_top[[18, 19]] = [19, 18]
    wrong_at_the_bottom[[0, 1]] = [1, 0]
    assert rank_agreement.rank_biased_overlap(x, wrong_at_the_top) < rank_agreement.rank_biased_overlap(
        x, wrong_at_the_bottom
    )


def test_precision_at_n_counts_the_common_ones():
    x, y = np.array([5, 4, 3, 2, 1.0]), np.array([5, 1, 2, 4, 3.0])
    assert [rank_agreement.precision_at_n(x, y, n) for n in (1, 2, 3)] == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("seed", range(4))
def test_permutation_p_of_few_points_is_exact(seed):
    x, y = points(6, seed, ties=seed == 3)
    p = rank_agreement.permutation_p_value(x, y, np.random.default_rng(0))
    assert p == pytest.approx(reference.permutation_p(list(x), list(y)))


def test_permutation_p_of_many_points_is_close_to_the_exact_one():
    x, y = points(7, seed=11)  # 5040 pairings, more than are drawn
    p = rank_agreement.permutation_p_value(x, y, np.random.default_rng(0), n_resamples=3000)
    assert p == pytest.approx(reference.permutation_p(list(x), list(y)), abs=0.03)


def test_permutation_p_is_never_zero():
    x = np.arange(40.0)
    assert rank_agreement.permutation_p_value(x, x, np.random.default_rng(0), n_resamples=999) == pytest.approx(
        2 / 1000
    )


def test_p_values_are_uniform_without_a_relation():
    rng = np.random.default_rng(5)
    p = [rank_agreement.permutation_p_value(*rng.normal(size=(2, 12)), rng, n_resamples=199) for _ in range(200)]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.06)


def test_interval_contains_rho_and_is_that_of_a_loop():
    x, y = points(25, seed=6)
    low, high = rank_agreement.bootstrap_interval(x, y, np.random.default_rng(1), n_resamples=4000)
    loop = np.random.default_rng(2)
    rhos = [reference.spearman(x[i], y[i]) for i in (loop.integers(0, 25, 25) for _ in range(600))]
    assert low < reference.spearman(x, y) < high
    assert [low, high] == pytest.approx(np.percentile(rhos, [2.5, 97.5]), abs=0.08)


def test_interval_does_not_depend_on_the_size_of_the_blocks(monkeypatch):
    x, y = points(10, seed=7)
    whole = rank_agreement.bootstrap_interval(x, y, np.random.default_rng(3), n_resamples=500)
    monkeypatch.setattr(rank_agreement, "_CHUNK", 70)
    assert rank_agreement.bootstrap_interval(x, y, np.random.default_rng(3), n_resamples=500) == whole


def test_interval_of_a_difference_is_paired():
    x, y = points(30, seed=8)
    same = rank_agreement.rho_difference_interval((x, y), (x, y), np.random.default_rng(0), n_resamples=300)
    assert same == (0, 0, 0)
    difference, low, high = rank_agreement.rho_difference_interval(
        (y, y), (x, y), np.random.default_rng(0), n_resamples=300
    )
    assert difference == pytest.approx(1 - reference.spearman(x, y))
    assert 0 < low < difference < high


@pytest.mark.parametrize(
    ("x", "y", "note"),
    [
        ([1, 2, 3], [1, 2, 3], "3 layers are too few"),
        ([], [], "0 layers are too few"),
        ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5], "scores of all 5 layers are equal"),
        ([1, 2, 3, 4, 5], [2, 2, 2, 2, 2], "effects of all 5 layers are equal"),
        ([1, 2, 3, 4], [np.inf, np.nan, np.inf, np.nan], "effects of all 4 layers are equal"),
    ],
)
def test_no_estimate_without_a_note(x, y, note):
    found = rank_agreement.agreement(
        np.array(x, dtype=float), np.array(y, dtype=float), np.random.default_rng(0), "layers"
    )
    assert note in found.note
    assert np.isnan([found.spearman, found.ci_low, found.p_value, found.kendall_tau_b, found.rbo]).all()


def test_infinite_and_undefined_effects_rank_as_the_largest():
    x = np.arange(12.0)
    y = x.copy()
    y[[10, 11]] = [np.nan, np.inf]
    found = rank_agreement.agreement(x, y, np.random.default_rng(0), "layers")
    tied = np.r_[x[:10], 50, 50]
    assert found.spearman == pytest.approx(reference.spearman(x, tied))
    assert found.kendall_tau_b == pytest.approx(reference.tau_b(x, tied))
    assert "infinite or undefined effects, ranked as the largest: 2" in found.note
    assert np.isfinite([found.ci_low, found.ci_high, found.weighted_tau, found.rbo]).all()


def test_units_without_a_score_are_left_out_and_counted():
    x, y = np.r_[np.arange(11.0), np.nan], np.arange(12.0)
    found = rank_agreement.agreement(x, y, np.random.default_rng(0), "layers")
    assert (found.n, found.spearman) == (11, pytest.approx(1.0))
    assert "1 layers without a score" in found.note


def test_few_units_have_a_rough_interval():
    found = rank_agreement.agreement(np.arange(5.0), np.array([1, 0, 2, 3, 4.0]), np.random.default_rng(0), "layers")
    assert found.note == "only 5 layers: the interval is rough"
    assert found.p_value == pytest.approx(reference.permutation_p([0, 1, 2, 3, 4], [1, 0, 2, 3, 4]))


@pytest.mark.parametrize(
    ("value", "controls", "p"), [(5, [1, 2, 3], 0.25), (2, [1, 2, 3], 0.75), (np.inf, [1, np.inf], 2 / 3)]
)
def test_rank_p_value_counts_controls_that_do_as_much(value, controls, p):
    assert rank_agreement.rank_p_value(value, np.array(controls)) == pytest.approx(p)
