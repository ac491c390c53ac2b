import math

import numpy as np
import pytest
from llm_perturb.intervals import MIN_SEQUENCES, ratio_interval
from reference import naive_bootstrap


def sample(n, seed=0):
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(5, 200, n)
    return rng.normal(0.3, 0.4, n) * n_tokens, n_tokens


@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_ends_are_those_of_a_bootstrap_written_out(n, seed):
    differences, n_tokens = sample(n, seed)
    found = ratio_interval(differences, n_tokens)
    expected = naive_bootstrap(differences.tolist(), n_tokens.tolist(), 4000, seed=1)
    width = expected[1] - expected[0]
    assert found.low == pytest.approx(expected[0], abs=0.08 * width)
    assert found.high == pytest.approx(expected[1], abs=0.08 * width)


def test_the_effect_lies_between_the_ends():
    differences, n_tokens = sample(30)
    found = ratio_interval(differences, n_tokens)
    assert found.low < differences.sum() / n_tokens.sum() < found.high


def test_long_sequences_weigh_more():
    """One long text at +1 nat per token among short ones at 0: the mean of ratios would stay near 0.05."""
    n_tokens = np.array([1000] + [10] * 19)
    differences = np.array([1000.0] + [0.0] * 19)
    found = ratio_interval(differences, n_tokens)
    assert found.low == 0.0  # a draw without the long text
    assert found.high > 0.9


def test_equal_effects_per_token_have_no_spread_whatever_the_lengths():
    n_tokens = np.arange(3, 23)
    found = ratio_interval(0.25 * n_tokens, n_tokens)
    assert found.low == pytest.approx(0.25, rel=1e-12)
    assert found.high == pytest.approx(0.25, rel=1e-12)


def test_too_few_sequences_have_no_interval():
    differences, n_tokens = sample(MIN_SEQUENCES)
    assert MIN_SEQUENCES == 10
    assert all(math.isfinite(end) for end in ratio_interval(differences, n_tokens))
    assert all(math.isnan(end) for end in ratio_interval(differences[:-1], n_tokens[:-1]))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_overflowed_has_no_interval(value):
    differences, n_tokens = sample(20)
    differences[7] = value
    assert all(math.isnan(end) for end in ratio_interval(differences, n_tokens))


def test_no_effect_at_all_is_exactly_zero():
    assert ratio_interval(np.zeros(20), np.arange(1, 21)) == (0.0, 0.0)


def test_the_same_effects_have_the_same_ends_and_twice_the_effects_twice_the_ends():
    differences, n_tokens = sample(25)
    first, again = ratio_interval(differences, n_tokens), ratio_interval(differences.copy(), n_tokens)
    assert first == again
    double = ratio_interval(2 * differences, n_tokens)
    assert double == pytest.approx((2 * first.low, 2 * first.high), rel=1e-12)
    mirrored = ratio_interval(-differences, n_tokens)
    assert mirrored == pytest.approx((-first.high, -first.low), rel=1e-12)
