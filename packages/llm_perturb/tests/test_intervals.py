"""The intervals against a reference written with loops and root finding, and what must hold for any of them."""

import math

import numpy as np
import pytest
from llm_perturb import intervals
from llm_perturb.intervals import (
    MIN_CLUSTERS,
    Spread,
    combined_spread,
    effective_number,
    few_texts_decide,
    perplexity_change_interval,
    perplexity_interval,
    ratio_interval,
    unseen_share,
)
from scipy import integrate, optimize, special


def sample(n, seed=0, skewed=False):
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(5, 200, n)
    effects = rng.lognormal(-1.5, 1.2, n) if skewed else rng.normal(0.3, 0.4, n)
    return effects * n_tokens, n_tokens


def naive_quantile(dof):
    """The 97.5 % quantile of Student's t, by integrating its density."""

    def density(x):
        log = special.gammaln((dof + 1) / 2) - special.gammaln(dof / 2) - 0.5 * math.log(dof * math.pi)
        return math.exp(log - (dof + 1) / 2 * math.log1p(x * x / dof))

    return optimize.brentq(lambda q: integrate.quad(density, 0, q)[0] - 0.475, 0.5, 40, xtol=1e-12)


def naive_interval(statistic, columns, n_tokens):
    """One text left out at a time; Hall's g(t) = ±q solved for t; the outer end on each side."""
    n = len(n_tokens)
    value = statistic(*columns, n_tokens)
    without = [statistic(*(c[:i] + c[i + 1 :] for c in columns), n_tokens[:i] + n_tokens[i + 1 :]) for i in range(n)]
    mean = sum(without) / n
    se = math.sqrt((n - 1) / n * sum((w - mean) ** 2 for w in without))
    # a text that raises the statistic lowers it when it is left out
    second, third = (sum((mean - w) ** power for w in without) / n for power in (2, 3))
    skewness = third / second**1.5 / math.sqrt(n)
    q = naive_quantile(max(1, sum(n_tokens) ** 2 / sum(t * t for t in n_tokens) - 1))

    def g(t):
        return t + skewness * t * t / 3 + skewness**2 * t**3 / 27 + skewness / 6

    upper, lower = (optimize.brentq(lambda t, x=x: g(t) - x, -1e4, 1e4, xtol=1e-13) for x in (q, -q))
    return value - max(q, upper) * se, value - min(-q, lower) * se


def ratio(d, t):
    return sum(d) / sum(t)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("n", [6, 12, 40])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_are_those_of_leaving_out_one_text_at_a_time(n, skewed, sign):
    differences, n_tokens = sample(n, seed=n, skewed=skewed)
    expected = naive_interval(ratio, [(sign * differences).tolist()], n_tokens.tolist())
    assert ratio_interval(sign * differences, n_tokens) == pytest.approx(expected, rel=1e-8)


def test_with_texts_of_one_length_and_symmetric_effects_it_is_the_t_interval():
    effects = np.array([-3.0, -2, -1, 0, 1, 2, 3])
    low, high = ratio_interval(10 * effects, np.full(7, 10))
    half = naive_quantile(6) * math.sqrt(28 / 6 / 7)
    assert (low, high) == pytest.approx((-half, half), rel=1e-9)


def test_the_end_on_the_side_of_a_long_tail_lies_further_out_and_the_other_stays():
    differences, n_tokens = np.array([1.0] * 11 + [40.0]), np.full(12, 10)
    low, high = ratio_interval(differences, n_tokens)
    value, se = 51 / 120, np.std(differences, ddof=1) / math.sqrt(12) / 10
    assert low == pytest.approx(value - naive_quantile(11) * se, rel=1e-9)
    assert high > value + 5 * se


CLUSTERS_OF_14 = np.repeat(list("bahgfcde"), [1, 2, 1, 4, 2, 2, 1, 1])


@pytest.mark.parametrize("clusters", [None, CLUSTERS_OF_14])
def test_every_leading_index_is_computed_on_its_own(clusters):
    differences, n_tokens = sample(14)
    three = np.stack([differences, differences[::-1] ** 2 / 100, np.eye(14)[5]])
    before = 3.0 * n_tokens + np.sin(n_tokens)
    for function, rows in {
        lambda d: ratio_interval(d, n_tokens, clusters): three,
        lambda losses: perplexity_interval(losses, n_tokens, clusters): before + three,
        lambda after: perplexity_change_interval(before, after, n_tokens, clusters): before + three,
        lambda d: [effective_number(d, clusters)]: three,
        lambda d: [few_texts_decide(d, clusters)]: three,
    }.items():
        alone = np.transpose([function(row) for row in rows])
        np.testing.assert_allclose(function(rows), alone, rtol=1e-12)
        assert len(np.unique(alone[0])) > 1


def test_long_texts_count_by_their_tokens_and_leave_few_degrees_of_freedom():
    """One long text at +1 nat per token among short ones at 0: nothing is known of other long texts."""
    n_tokens = np.array([1000] + [10] * 19)
    differences = np.array([1000.0] + [0.0] * 19)
    low, high = ratio_interval(differences, n_tokens)
    assert low < 0 < 1 < high
    assert (low, high) == pytest.approx(naive_interval(ratio, [differences.tolist()], n_tokens.tolist()), rel=1e-8)


def test_equal_effects_per_token_have_no_spread_whatever_the_lengths():
    n_tokens = np.arange(3, 23)
    assert ratio_interval(0.25 * n_tokens, n_tokens) == pytest.approx((0.25, 0.25), rel=1e-12)


def test_windows_of_one_text_are_one_cluster():
    differences, n_tokens = sample(24)
    clusters = np.tile(["b", "a", "d", "c", "f", "e", "h", "g"], 3)  # neither sorted nor side by side
    sums = [sum(differences[clusters == name]) for name in "abcdefgh"]
    lengths = [sum(n_tokens[clusters == name]) for name in "abcdefgh"]
    assert ratio_interval(differences, n_tokens, clusters) == pytest.approx(
        ratio_interval(np.array(sums), np.array(lengths)), rel=1e-12
    )
    assert perplexity_interval(differences, n_tokens, clusters) == pytest.approx(
        perplexity_interval(np.array(sums), np.array(lengths)), rel=1e-12
    )
    assert perplexity_change_interval(n_tokens * 2.0, differences, n_tokens, clusters) == pytest.approx(
        perplexity_change_interval(np.array(lengths) * 2.0, np.array(sums), np.array(lengths)), rel=1e-12
    )
    assert effective_number(differences, clusters) == pytest.approx(effective_number(np.array(sums)), rel=1e-12)
    assert ratio_interval(differences, n_tokens, np.arange(24)) == ratio_interval(differences, n_tokens)


def test_two_independent_terms_have_the_moments_of_both_and_degrees_of_freedom_between():
    """Satterthwaite: 6² / (4² / 3 + 2² / 6) = 36 / 6."""
    assert combined_spread(Spread(4.0, 1.0, 3), Spread(2.0, -0.5, 6)) == pytest.approx((6, 0.5, 6), rel=1e-15)
    assert combined_spread(Spread(2.0, -0.5, 6), Spread(4.0, 1.0, 3)) == pytest.approx((6, 0.5, 6), rel=1e-15)
    assert combined_spread(Spread(4.0, 1.0, 3), Spread(0.0, 0.0, 7)) == (4, 1, 3)


def test_fewer_than_six_texts_have_no_interval():
    differences, n_tokens = sample(6)
    assert MIN_CLUSTERS == 6
    assert all(math.isfinite(end) for end in ratio_interval(differences, n_tokens))
    assert all(math.isnan(end) for end in ratio_interval(differences[:5], n_tokens[:5]))
    assert all(math.isnan(end) for end in ratio_interval(differences, n_tokens, np.array([0, 0, 1, 2, 3, 4])))
    assert all(math.isnan(end) for end in perplexity_interval(differences[:5], n_tokens[:5]))
    assert all(math.isnan(end) for end in perplexity_change_interval(differences[:5], differences[:5], n_tokens[:5]))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_overflowed_has_no_interval(value):
    differences, n_tokens = sample(20)
    differences[7] = value
    assert all(math.isnan(end) for end in ratio_interval(differences, n_tokens))
    assert all(math.isnan(end) for end in perplexity_interval(differences, n_tokens))
    assert all(math.isnan(end) for end in perplexity_change_interval(n_tokens * 3.0, differences, n_tokens))


def test_no_effect_at_all_is_exactly_zero():
    n_tokens = np.arange(1, 21)
    assert ratio_interval(np.zeros(20), n_tokens) == (0.0, 0.0)
    assert perplexity_change_interval(3.0 * n_tokens + 1, 3.0 * n_tokens + 1, n_tokens) == (0.0, 0.0)


def test_twice_the_effects_have_twice_the_ends_and_mirrored_effects_mirrored_ones():
    differences, n_tokens = sample(25, skewed=True)
    low, high = ratio_interval(differences, n_tokens)
    assert ratio_interval(2 * differences, n_tokens) == pytest.approx((2 * low, 2 * high), rel=1e-12)
    assert ratio_interval(-differences, n_tokens) == pytest.approx((-high, -low), rel=1e-12)
    assert ratio_interval(differences + 3 * n_tokens, n_tokens) == pytest.approx((low + 3, high + 3), rel=1e-10)


@pytest.mark.parametrize("skewness", [0.0, 1e-7, 0.9e-5, 1.1e-5, -1.1e-5, 0.3, -0.3, 2.5])
@pytest.mark.parametrize("x", [-2.2, 2.2])
def test_hall_inverse_undoes_the_transformation(skewness, x):
    t = float(intervals._hall_inverse(x, np.array(skewness)))
    g = t + skewness * (2 * t * t + 1) / 6 + skewness**2 * t**3 / 27
    assert g == pytest.approx(x, abs=1e-9)


@pytest.mark.parametrize("skewness", [0.9e-5, -0.9e-5, 1e-5, 1.1e-5, -1.1e-5])
def test_hall_inverse_is_linear_in_a_small_skewness(skewness):
    """The exact formula loses as many digits there as the limit is wrong."""
    limit = 2.2 - skewness * (2 * 2.2**2 + 1) / 6
    assert (intervals._hall_inverse(np.array(2.2), np.array(skewness)) == limit) == (abs(skewness) < 1e-5)


@pytest.mark.parametrize("effect", [-0.4, 1e-4, 0.5, 6.0])
def test_perplexities_carry_the_uncertainty_of_the_baseline(effect):
    rng = np.random.default_rng(5)
    n_tokens = rng.integers(50, 200, 15)
    before = n_tokens * rng.normal(3.4, 0.5, 15)
    after = before + n_tokens * effect * rng.normal(1, 0.3, 15)
    columns = [before.tolist(), after.tolist()]
    nll = naive_interval(ratio, [columns[1]], n_tokens.tolist())
    assert perplexity_interval(after, n_tokens) == pytest.approx([math.exp(end) for end in nll], rel=1e-7)

    unit = math.exp(ratio(before, n_tokens))

    def change(b, a, t):
        return math.asinh((math.exp(ratio(a, t)) - math.exp(ratio(b, t))) / unit)

    ends = naive_interval(change, columns, n_tokens.tolist())
    expected = [unit * math.sinh(end) for end in ends]
    assert perplexity_change_interval(before, after, n_tokens) == pytest.approx(expected, rel=1e-6)


def test_a_tiny_effect_leaves_the_perplexity_as_uncertain_as_it_was():
    rng = np.random.default_rng(6)
    n_tokens = np.full(30, 100)
    before = 100 * rng.normal(3.4, 0.5, 30)
    unchanged, changed = (perplexity_interval(losses, n_tokens) for losses in (before, before + 1e-4))
    assert changed == pytest.approx(unchanged, rel=1e-5)
    low, high = perplexity_change_interval(before, before + 1e-4, n_tokens)
    assert 0 < low < high < 1e-4


def test_a_perplexity_beyond_a_float_is_infinite():
    n_tokens = np.full(8, 10)
    losses = 10 * np.linspace(800, 900, 8)
    assert perplexity_interval(losses, n_tokens) == (math.inf, math.inf)


def test_n_eff_is_n_of_equal_effects_and_one_of_a_single_one():
    assert effective_number(np.full(12, -0.3)) == pytest.approx(12)
    assert effective_number(np.array([0, 0, 5.0, 0])) == 1
    assert effective_number(np.array([1.0, -1, 2])) == pytest.approx(16 / 6)
    assert math.isnan(effective_number(np.zeros(5)))
    assert math.isnan(effective_number(np.array([1, math.inf])))


def test_few_texts_decide_below_a_quarter_of_them():
    assert not few_texts_decide(np.array([1.0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]))  # 3 of 12
    assert few_texts_decide(np.array([1.0, 1, 0.9, 0, 0, 0, 0, 0, 0, 0, 0, 0]))  # 2.99 of 12
    assert few_texts_decide(np.array([1.0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), np.arange(12) // 2)  # 1 of 6
    assert not few_texts_decide(np.array([1.0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), np.arange(12) // 2)  # 2 of 6
    assert not few_texts_decide(np.zeros(12))


@pytest.mark.parametrize("n", [1, 12, 100])
def test_what_strikes_the_unseen_share_of_texts_is_missed_once_in_twenty(n):
    assert (1 - unseen_share(n)) ** n == pytest.approx(0.05)


@pytest.mark.parametrize("correlation", [0.3, 0.6])
def test_windows_of_long_texts_are_covered_when_the_texts_are_known(correlation):
    """20 texts of 5 windows each, normal effects of mean 0.5; 2000 worlds, true coverage 95 %."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(20), 5)
    shared = rng.normal(size=(2000, 20)).repeat(5, axis=1)
    effects = 0.5 + np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.normal(size=(2000, 100))
    covered = {}
    for name, known in {"texts": clusters, "windows": None}.items():
        low, high = ratio_interval(effects * 50, np.full(effects.shape, 50), known)
        covered[name] = ((low <= 0.5) & (high >= 0.5)).mean()
    assert 0.93 < covered["texts"] < 0.975
    assert covered["windows"] < 0.85


@pytest.mark.parametrize("n", [MIN_CLUSTERS, 10])
def test_exactly_so_many_texts_have_all_intervals(n):
    differences, n_tokens = sample(n, seed=n)
    before = 3.0 * n_tokens + np.sin(n_tokens)
    for low, high in (
        ratio_interval(differences, n_tokens),
        perplexity_interval(before, n_tokens),
        perplexity_change_interval(before, before + differences, n_tokens),
    ):
        assert math.isfinite(low) and low < high < math.inf
