import numpy as np
import pytest
import reference
from bridge.analysis import rank_agreement
from bridge.analysis.spearman import permutation_p_value, rho_interval
from bridge.analysis.tied_overlap import expected_precision, expected_rank_biased_overlap
from synthetic import points


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [4, 7, 30])
def test_tau_b_is_the_literal_definition(n, ties):
    x, y = points(n, seed=n, ties=ties)
    assert rank_agreement.kendall_tau_b(x, y) == pytest.approx(reference.tau_b(x, y))


def test_weighted_tau_is_the_literal_definition():
    x, y = points(12, seed=3)
    assert rank_agreement.weighted_tau(x, y) == pytest.approx(reference.weighted_tau(x, y))


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
    result = rank_agreement.agreement(
        np.array(x, dtype=float), np.array(y, dtype=float), np.random.default_rng(0), "layers"
    )
    assert note in result.note
    assert (result.n, result.top_n) == (len(x), 0)
    assert np.isnan([result.spearman, result.ci_low, result.p_value, result.kendall_tau_b, result.rbo]).all()


def test_infinite_and_undefined_effects_rank_as_the_largest():
    x = np.arange(12.0)
    y = x.copy()
    y[[10, 11]] = [np.nan, np.inf]
    result = rank_agreement.agreement(x, y, np.random.default_rng(0), "layers")
    tied = np.r_[x[:10], 50, 50]
    assert result.spearman == pytest.approx(reference.spearman(x, tied))
    assert result.kendall_tau_b == pytest.approx(reference.tau_b(x, tied))
    assert "infinite or undefined effects, ranked as the largest: 2" in result.note
    assert result.unbounded_share == pytest.approx(2 / 12)
    assert np.isfinite([result.ci_low, result.ci_high, result.weighted_tau, result.rbo]).all()


def test_units_without_a_score_are_left_out_and_counted():
    x, y = np.r_[np.arange(11.0), np.nan], np.arange(12.0)
    result = rank_agreement.agreement(x, y, np.random.default_rng(0), "layers")
    assert (result.n, result.spearman) == (11, pytest.approx(1.0))
    assert result.note == "1 layers without a score left out"
    few = rank_agreement.agreement(np.r_[x[:7], np.nan, np.nan], y[:9], np.random.default_rng(0), n_resamples=50)
    assert few.note == "2 units without a score left out; only 7 units: the interval is rough"


def test_few_units_have_a_rough_interval_and_fewer_none():
    x = np.arange(6.0)
    result = rank_agreement.agreement(x, x[[1, 0, 2, 3, 4, 5]], np.random.default_rng(0), "layers")
    assert result.note == "only 6 layers: the interval is rough"
    assert np.isfinite([result.ci_low, result.ci_high]).all()
    result = rank_agreement.agreement(x[:5], x[[1, 0, 2, 3, 4]], np.random.default_rng(0), "layers")
    assert result.note == "only 5 layers: no interval and no claim (at least 6)"
    assert np.isnan([result.ci_low, result.ci_high]).all()
    assert result.p_value == pytest.approx(reference.permutation_p([0, 1, 2, 3, 4], [1, 0, 2, 3, 4]))


def test_the_interval_is_of_95_percent_its_lower_end_first():
    x, y = points(8, seed=2)
    result = rank_agreement.agreement(x, y, np.random.default_rng(4), n_resamples=200)
    draws = np.random.default_rng(4).integers(0, 8, size=(200, 8))
    expected = np.percentile([reference.spearman(x[drawn], y[drawn]) for drawn in draws], [2.5, 97.5])
    assert [result.ci_low, result.ci_high] == pytest.approx(expected.tolist(), rel=1e-12)
    rng = np.random.default_rng(4)
    rho_interval(x, y, rng, n_resamples=200)
    assert result.p_value == permutation_p_value(x, y, rng, n_resamples=200)


def test_the_other_measures_are_those_of_the_two_orders():
    x, y = points(12, seed=3, ties=True)
    result = rank_agreement.agreement(x, y, np.random.default_rng(4), n_resamples=50)
    assert (result.n, result.top_n, result.unbounded_share) == (12, 4, 0)
    assert result.precision_at_n == expected_precision(x, y, 4)
    assert result.rbo == expected_rank_biased_overlap(x, y)
    assert result.weighted_tau == rank_agreement.weighted_tau(x, y)
    assert result.kendall_tau_b == pytest.approx(reference.tau_b(x, y))


def test_the_top_is_a_third_of_the_units_and_five_at_most():
    sizes = {n: rank_agreement.default_top_n(n) for n in (4, 5, 6, 8, 9, 12, 14, 15, 18, 100)}
    assert sizes == {4: 1, 5: 1, 6: 2, 8: 2, 9: 3, 12: 4, 14: 4, 15: 5, 18: 5, 100: 5}


@pytest.mark.parametrize(("n", "note"), [(9, "only 9 units: the interval is rough"), (10, "")])
def test_ten_units_are_enough_for_an_interval_without_a_note(n, note):
    x = np.arange(float(n))
    y = x.copy()
    y[:2] = [1, 0]
    assert rank_agreement.agreement(x, y, np.random.default_rng(0), n_resamples=50).note == note


def test_four_units_have_a_rho_and_a_p_value():
    result = rank_agreement.agreement(np.arange(4.0), np.array([0.0, 1, 3, 2]), np.random.default_rng(0))
    assert result.spearman == pytest.approx(0.8)
    assert result.p_value == pytest.approx(reference.permutation_p([0, 1, 2, 3], [0, 1, 3, 2]))


def test_the_first_unit_may_be_the_largest_or_the_smallest_by_both():
    for order in ([3, 0, 2, 1], [0, 2, 3, 1]):
        result = rank_agreement.agreement(np.array(order), np.array(order), np.random.default_rng(0))
        assert result.spearman == pytest.approx(1)


def test_columns_of_objects_are_read_as_numbers():
    x, y = np.array([3, None, 1.5, 2, "4"], dtype=object), np.array([1, 2, 3, 5, None], dtype=object)
    result = rank_agreement.agreement(x, y, np.random.default_rng(0))
    assert (result.n, result.spearman) == (4, pytest.approx(reference.spearman([3, 1.5, 2, 4], [1, 3, 5, 9])))
