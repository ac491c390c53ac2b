import math

import numpy as np
import pandas as pd
import pytest
from llm_perturb.intervals import MIN_CLUSTERS, ratio_interval
from llm_perturb.top_against_random import (
    COLUMNS,
    MIN_DRAWS,
    can_reach,
    compare,
    difference_interval,
    draws_needed,
    rank_p_value,
    shrunk_spread,
    smallest_p_value,
)
from scipy import optimize, stats

N = 12
TOKENS = np.arange(3, 3 + N)


def rows_of(selections, differences, seeds=None, **more):
    table = pd.DataFrame(
        {
            "target_layer": "a.b",
            "parameter": "a.b.weight",
            "selection": selections,
            "perturbation": "zero",
            "k": 5,
            "seed": pd.array(seeds or [None] * len(selections), dtype="Int64"),
            "row": pd.array([None] * len(selections), dtype="Int64"),
            "col": pd.array([None] * len(selections), dtype="Int64"),
            "delta_nll": differences.sum(1) / TOKENS.sum(),
        }
    )
    return table.assign(**more)


@pytest.fixture
def differences():
    return np.random.default_rng(3).normal(size=(6, N)) + np.array([2.0, 0, 0, 0, 0, 0])[:, None] * TOKENS / 5


TOP_AND_RANDOM = ["top_obd", *["random"] * 5]


def test_the_effect_is_set_against_the_draws_of_the_same_target(differences):
    (row,) = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS).itertuples()
    effects = [sum(d) / sum(TOKENS) for d in differences.tolist()]
    assert (row.selection, row.control, row.n_draws, row.n_beaten) == ("top_obd", "random", 5, 5)
    assert row.delta_nll == pytest.approx(effects[0], rel=1e-12)
    assert row.control_mean == pytest.approx(sum(effects[1:]) / 5, rel=1e-12)
    assert (row.control_low, row.control_high) == pytest.approx((min(effects[1:]), max(effects[1:])), rel=1e-12)
    assert row.difference == pytest.approx(effects[0] - sum(effects[1:]) / 5, rel=1e-12)
    assert (row.ci_low, row.ci_high) == difference_interval(differences[:1], differences[1:], TOKENS)
    assert row.ci_low < row.difference < row.ci_high
    excess = np.abs(differences[0] - differences[1:].mean(0))
    assert row.n_eff == pytest.approx(excess.sum() ** 2 / (excess**2).sum(), rel=1e-12)
    assert (row.unbounded_share, row.control_unbounded_share) == (0, 0)


@pytest.mark.parametrize("worse", range(6))
def test_the_p_value_counts_draws_that_do_as_much(worse):
    top, drawn = np.array([3.0]), np.array([3.0] * worse + [1.0] * (5 - worse))
    assert rank_p_value(top, drawn) == (1 + worse) / 6


def test_p_values_of_many_worlds_are_computed_at_once():
    top, drawn = np.array([[3.0, 3, 3, 3], [5, 1, 5, 1]]), np.array([[3.0, 2, 4, 1], [2, 2, 2, 2]])
    assert rank_p_value(top, drawn).tolist() == [3 / 5, 3 / 5]
    assert rank_p_value(top[:, :1], drawn).tolist() == [3 / 5, 1 / 5]


def test_effects_that_are_not_finite_rank_as_the_largest():
    drawn = np.array([1.0, math.nan, math.inf, -math.inf, 2])
    assert rank_p_value(np.array([5.0]), drawn) == 4 / 6
    assert rank_p_value(np.array([math.nan]), drawn) == 4 / 6  # tied with three


def test_a_p_value_is_given_where_it_can_reach_one_in_twenty():
    assert draws_needed() == 19
    assert draws_needed(0.01) == 99
    assert draws_needed(0.03) == 33  # 1 / 34 is below, 1 / 33 above
    assert draws_needed(1 / 49) == 48  # although 1 / (1 / 49) is above 49
    assert [draws_needed(1 / (20 + above)) for above in (4e-10, 6e-10)] == [19, 20]  # less than a billionth is rounding
    assert [can_reach(n) for n in (3, 18, 19, 20)] == [False, False, True, True]
    assert smallest_p_value(19) == 0.05
    for n_draws in (18, 19):
        differences = np.ones((n_draws + 1, N)) * np.linspace(2, 1, n_draws + 1)[:, None]
        table = rows_of(["top_obd", *["random"] * n_draws], differences)
        (row,) = compare(table, differences, TOKENS).itertuples()
        assert row.n_beaten == n_draws
        if n_draws == 19:
            assert (row.p_value, row.note) == (0.05, "")
        else:
            assert math.isnan(row.p_value)
            assert row.note == "no p: with 18 draws it cannot be below 0.053 (19 are needed)"


@pytest.mark.parametrize("column", ["target_layer", "parameter", "perturbation", "k"])
def test_draws_of_something_else_do_not_count(differences, column):
    table = rows_of(TOP_AND_RANDOM, differences)
    table[column] = table[column].astype(object)
    table.loc[1:, column] = 7 if column == "k" else "other"
    assert compare(table, differences, TOKENS).empty
    assert list(compare(table, differences, TOKENS)) == COLUMNS


def test_each_kind_has_its_own_control(differences):
    selections = ["top_obd", "random", "matched_obd", "matched_magnitude", "row", "random_row"]
    comparisons = compare(rows_of(selections, differences), differences, TOKENS)
    assert list(zip(comparisons["selection"], comparisons["control"], strict=True)) == [
        ("top_obd", "random"),
        ("top_obd", "matched_obd"),
        ("row", "random_row"),
    ]
    assert comparisons["ci_low"].isna().all()
    assert comparisons["p_value"].isna().all()
    assert comparisons["note"].str.startswith("one draw tells nothing of other draws; no p").all()


def test_each_row_of_a_matrix_is_compared_on_its_own(differences):
    table = rows_of(["row", "row", *["random_row"] * 4], differences, row=pd.array([7, 3, 1, 2, 4, 5], dtype="Int64"))
    comparisons = compare(table, differences, TOKENS)
    assert comparisons["row"].tolist() == [7, 3]
    assert comparisons["n_draws"].tolist() == [4, 4]
    assert comparisons["delta_nll"].tolist() == table["delta_nll"].tolist()[:2]


def test_a_seeded_perturbation_is_compared_seed_by_seed(differences):
    """Three draws of the top against the three random sets of the same seeds, in whatever order they stand."""
    table = rows_of(["top_obd"] * 3 + ["random"] * 3, differences, seeds=[0, 1, 2, 2, 0, 1])
    (row,) = compare(table, differences, TOKENS).itertuples()
    effects = table["delta_nll"].to_numpy()
    pairs = [(0, 4), (1, 5), (2, 3)]
    assert row.n_draws == 3
    assert row.n_beaten == sum(effects[top] > effects[drawn] for top, drawn in pairs)
    assert row.delta_nll == pytest.approx(effects[:3].mean(), rel=1e-12)
    assert row.difference == pytest.approx(effects[:3].mean() - effects[3:].mean(), rel=1e-12)
    expected = difference_interval(differences[:3], differences[[4, 5, 3]], TOKENS)
    assert (row.ci_low, row.ci_high) == expected
    assert (row.ci_low, row.ci_high) != difference_interval(differences[:3], differences[3:], TOKENS)


def test_seeds_without_a_random_set_are_left_out(differences):
    table = rows_of(["top_obd"] * 3 + ["random"] * 3, differences, seeds=[0, 1, 2, 1, 2, 9])
    (row,) = compare(table, differences, TOKENS).itertuples()
    assert row.n_draws == 2
    assert row.delta_nll == pytest.approx(table["delta_nll"][1:3].mean(), rel=1e-12)
    table = rows_of(["top_obd"] * 3 + ["random"] * 3, differences, seeds=[0, 1, 2, 7, 8, 9])
    assert compare(table, differences, TOKENS).empty


def test_a_loss_that_is_not_finite_is_the_largest(differences):
    differences[0, 4] = math.nan
    (row,) = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS).itertuples()
    assert (row.delta_nll, row.difference, row.n_beaten, row.unbounded_share) == (math.inf, math.inf, 5, 1)
    assert math.isnan(row.ci_low)
    assert math.isnan(row.n_eff)
    assert row.note.startswith("a loss is not finite")
    differences[3, 0] = math.inf
    (row,) = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS).itertuples()
    assert (row.n_beaten, row.control_high, row.control_unbounded_share) == (4, math.inf, 0.2)
    assert math.isnan(row.difference)


def test_the_draws_range_from_the_smallest_to_the_largest_with_the_unbounded_share_beside():
    differences = np.outer([5.0, 1, 2, math.nan, 3, 4], TOKENS)
    (row,) = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS).itertuples()
    assert (row.control_low, row.control_high) == (1, math.inf)
    assert (row.unbounded_share, row.control_unbounded_share) == (0, 0.2)
    assert row.note.startswith("a loss is not finite; no p")


def test_a_draw_that_does_as_much_is_not_beaten():
    differences = np.outer([3.0, 3, 2, 4, 3, 1], TOKENS)
    (row,) = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS).itertuples()
    assert row.n_beaten == 2


def test_sequences_of_one_text_count_as_one(differences):
    clusters = np.array([3, 3, 0, 0, 9, 9, 1, 2, 2, 4, 5, 5])  # eleven sequences of seven texts
    ids = [0, 1, 2, 3, 4, 5, 9]
    sums, tokens = (np.stack([a[..., clusters == i].sum(-1) for i in ids], -1) for a in (differences, TOKENS))
    (row,) = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS, clusters).itertuples()
    assert (row.ci_low, row.ci_high) == pytest.approx(difference_interval(sums[:1], sums[1:], tokens), rel=1e-12)
    excess = np.abs(sums[0] - sums[1:].mean(0))
    assert row.n_eff == pytest.approx(excess.sum() ** 2 / (excess**2).sum(), rel=1e-12)


def test_the_table_has_its_columns_in_order(differences):
    table = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS)
    assert list(table) == [
        "target_layer", "parameter", "selection", "perturbation", "k", "row", "col", "control", "n_draws",
        "delta_nll", "control_mean", "control_low", "control_high", "difference", "ci_low", "ci_high", "n_eff",
        "n_beaten", "p_value", "unbounded_share", "control_unbounded_share", "note",
    ]  # fmt: skip


def test_few_texts_have_no_interval(differences):
    table = rows_of(TOP_AND_RANDOM, differences)
    (row,) = compare(table, differences[:, :5], TOKENS[:5]).itertuples()
    assert math.isnan(row.ci_low)
    assert row.note.startswith("5 texts are too few for an interval (at least 6)")
    clusters = np.array([0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 4])
    (row,) = compare(table, differences, TOKENS, clusters).itertuples()
    assert math.isnan(row.ci_low)
    assert row.note.startswith("5 texts")
    assert row.n_eff <= 5


def naive_interval(top, drawn, n_tokens):
    """Both variances written out: texts left out one at a time, draws by their variance, their skewness twice."""
    n, n_draws, total = len(n_tokens), len(drawn), sum(n_tokens)

    def difference(left_out=None):
        kept = [i for i in range(n) if i != left_out]
        tokens = sum(n_tokens[i] for i in kept)
        return sum(sum(top[b][i] - drawn[b][i] for i in kept) / tokens for b in range(n_draws)) / n_draws

    value, without = difference(), [difference(i) for i in range(n)]
    mean = sum(without) / n
    texts = [math.sqrt((n - 1) / n) * (mean - w) for w in without]
    effects = [sum(top[b][i] - drawn[b][i] for i in range(n)) / total for b in range(n_draws)]
    draws = [(e - value) / math.sqrt(n_draws * (n_draws - 1)) for e in effects]
    parts = [sum(v * v for v in part) for part in (texts, draws)]
    freedom = [total**2 / sum(t * t for t in n_tokens) - 1, n_draws - 1]
    variance = sum(parts)
    dof = variance**2 / sum(part**2 / f for part, f in zip(parts, freedom, strict=True))
    q = stats.t.ppf(0.975, dof)
    between = n_draws * parts[1]  # s_B²
    third = sum((e - value) ** 3 for e in effects) * n_draws / (n_draws - 1) / max(1, n_draws - 2)
    shrunk = (n_draws * third - 5 * 1.5 * between**1.5) / (n_draws + 5) / n_draws**2
    ends = [[], []]
    for moment in (sum(v**3 for v in draws), shrunk):
        skewness = (sum(v**3 for v in texts) + moment) / variance**1.5

        def g(t, skewness=skewness):
            return t + skewness * t * t / 3 + skewness**2 * t**3 / 27 + skewness / 6

        upper, lower = (optimize.brentq(lambda t, x=x: g(t) - x, -1e4, 1e4, xtol=1e-13) for x in (q, -q))
        ends[0].append(value - max(q, upper) * math.sqrt(variance))
        ends[1].append(value - min(-q, lower) * math.sqrt(variance))
    return min(ends[0]), max(ends[1])


@pytest.mark.parametrize("n_draws", [2, 3, 5])
def test_the_interval_adds_the_variances_of_texts_and_draws(differences, n_draws):
    drawn = differences[1 : 1 + n_draws]
    expected = naive_interval([differences[0].tolist()] * n_draws, drawn.tolist(), TOKENS.tolist())
    assert difference_interval(differences[:1], drawn, TOKENS) == pytest.approx(expected, rel=1e-8)
    top = differences[0] + np.arange(n_draws)[:, None]
    expected = naive_interval(top.tolist(), drawn.tolist(), TOKENS.tolist())
    assert difference_interval(top, drawn, TOKENS) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n_draws", [5, 20])
def test_each_end_is_the_outer_one_by_the_skewness_of_the_draws_or_a_shrunk_one(sign, n_draws):
    """One draw does much more, or less, than the others: of 5 their own skewness gives the outer end, of 20 not."""
    noise = np.random.default_rng(1).normal(size=(21, N)) / 10
    one_else = sign * np.array([1.0] * (n_draws - 1) + [30])
    top, drawn = noise[:1] + 2 * TOKENS, noise[1 : n_draws + 1] + np.outer(one_else, TOKENS)
    expected = naive_interval(top.tolist() * n_draws, drawn.tolist(), TOKENS.tolist())
    assert difference_interval(top, drawn, TOKENS) == pytest.approx(expected, rel=1e-8)


def test_draws_that_all_do_the_same_leave_the_interval_of_the_texts(differences):
    same = np.outer(np.ones(4), TOKENS + np.sin(TOKENS))
    found = difference_interval(differences[:1], same, TOKENS)
    assert found == pytest.approx(ratio_interval(differences[0] - same[0], TOKENS), rel=1e-9)


def test_texts_that_all_show_the_same_leave_the_interval_of_the_draws():
    """By t on the side of more damage; further out on the other, where few draws may have missed much damage."""
    low, high = difference_interval(5.0 * TOKENS[None], np.outer([1.0, 2, 3], TOKENS), TOKENS)
    half = stats.t.ppf(0.975, 2) * 1 / math.sqrt(3)
    assert high == pytest.approx(3 + half, rel=1e-9)
    assert low < 3 - 1.5 * half


def test_the_skewness_of_few_draws_is_shrunk_towards_that_of_damage():
    few, many = (np.concatenate([[2.0], np.full(n - 1, -2.0 / (n - 1))]) for n in (3, 3000))
    spread = shrunk_spread(few)
    assert spread.variance == pytest.approx(few.var(ddof=1) / 3)
    assert spread.dof == 2
    third = 3 * (few**3).sum() / 2
    assert spread.third == pytest.approx((3 * third - 7.5 * few.var(ddof=1) ** 1.5) / 8 / 9)
    assert shrunk_spread(many).third * 3000**2 == pytest.approx((many**3).mean(), rel=0.01)
    assert shrunk_spread(np.array([-1.0, 1])).third == pytest.approx(-7.5 * 2**1.5 / 7 / 4)


def test_one_draw_has_no_interval(differences):
    assert all(math.isnan(end) for end in difference_interval(differences[:1], differences[1:2], TOKENS))


def test_many_worlds_are_computed_at_once(differences):
    drawn = np.stack([differences[1:], differences[1:] ** 2])
    n_tokens = np.stack([TOKENS, TOKENS[::-1] ** 2])
    low, high = difference_interval(differences[:1], drawn, TOKENS)
    low_too, high_too = difference_interval(differences[:1], drawn, n_tokens)
    for world in range(2):
        assert (low[world], high[world]) == difference_interval(differences[:1], drawn[world], TOKENS)
        expected = difference_interval(differences[:1], drawn[world], n_tokens[world])
        assert (low_too[world], high_too[world]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [MIN_CLUSTERS, 10])
@pytest.mark.parametrize("n_draws", [MIN_DRAWS, 5])
def test_exactly_so_many_texts_and_draws_have_an_interval(differences, n, n_draws):
    table = rows_of(TOP_AND_RANDOM, differences).head(1 + n_draws)
    few = differences[: 1 + n_draws, :n]
    (row,) = compare(table, few, TOKENS[:n]).itertuples()
    expected = naive_interval([few[0].tolist()] * n_draws, few[1:].tolist(), TOKENS[:n].tolist())
    assert (row.ci_low, row.ci_high) == pytest.approx(expected, rel=1e-8)
    assert row.note == f"no p: with {n_draws} draws it cannot be below {1 / (1 + n_draws):.2g} (19 are needed)"
