import math

import numpy as np
import pandas as pd
import pytest
from llm_perturb.top_against_random import COLUMNS, compare, difference_interval

N = 12
TOKENS = np.arange(3, 3 + N)


def rows_of(selections, differences, **more):
    table = pd.DataFrame(
        {
            "target_layer": "a.b",
            "parameter": "a.b.weight",
            "selection": selections,
            "perturbation": "zero",
            "k": 5,
            "seed": pd.array([None] * len(selections), dtype="Int64"),
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
    assert (row.selection, row.control, row.n_draws, row.note) == ("top_obd", "random", 5, "")
    assert row.delta_nll == pytest.approx(effects[0], rel=1e-12)
    assert row.control_mean == pytest.approx(sum(effects[1:]) / 5, rel=1e-12)
    assert (row.control_low, row.control_high) == pytest.approx((min(effects[1:]), max(effects[1:])), rel=1e-12)
    assert row.difference == pytest.approx(effects[0] - sum(effects[1:]) / 5, rel=1e-12)
    assert row.ci_low < row.difference < row.ci_high
    assert row.p_value == 1 / 6


@pytest.mark.parametrize("worse", range(6))
def test_the_p_value_counts_draws_that_do_as_much(worse):
    differences = np.ones((6, N)) * np.array([3.0, *[5.0] * worse, *[1.0] * (5 - worse)])[:, None]
    (row,) = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS).itertuples()
    assert row.p_value == (1 + worse) / 6


@pytest.mark.parametrize("column", ["target_layer", "parameter", "perturbation", "k"])
def test_draws_of_something_else_do_not_count(differences, column):
    table = rows_of(TOP_AND_RANDOM, differences)
    table[column] = table[column].astype(object)
    table.loc[1:, column] = 7 if column == "k" else "other"
    assert compare(table, differences, TOKENS).empty
    assert list(compare(table, differences, TOKENS)) == COLUMNS


def test_each_kind_has_its_own_control(differences):
    selections = ["top_obd", "random", "matched_obd", "matched_magnitude", "row", "random_row"]
    found = compare(rows_of(selections, differences), differences, TOKENS)
    assert list(zip(found["selection"], found["control"], strict=True)) == [
        ("top_obd", "random"),
        ("top_obd", "matched_obd"),
        ("row", "random_row"),
    ]
    assert found["ci_low"].isna().all()
    assert (found["note"] == "one draw tells nothing of other draws").all()
    assert (found["p_value"] >= 0.5).all()


def test_a_loss_that_is_not_finite_is_the_largest(differences):
    differences[0, 4] = math.nan
    (row,) = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS).itertuples()
    assert (row.delta_nll, row.difference, row.p_value) == (math.inf, math.inf, 1 / 6)
    assert math.isnan(row.ci_low)
    assert row.note == "a loss is not finite"
    differences[3, 0] = math.inf
    (row,) = compare(rows_of(TOP_AND_RANDOM, differences), differences, TOKENS).itertuples()
    assert row.p_value == 2 / 6
    assert math.isnan(row.difference)


def test_few_sequences_have_no_interval(differences):
    table = rows_of(TOP_AND_RANDOM, differences)
    (row,) = compare(table, differences[:, :9], TOKENS[:9]).itertuples()
    assert math.isnan(row.ci_low)
    assert row.note == "9 sequences are too few for an interval"


def naive_interval(effect, drawn, n_tokens, n_resamples, seed):
    """One resample at a time, with plain loops."""
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(n_resamples):
        texts = [int(rng.integers(len(effect))) for _ in effect]
        sets = [int(rng.integers(len(drawn))) for _ in drawn]
        control = sum(drawn[b][i] for b in sets for i in texts) / len(sets)
        ratios.append((sum(effect[i] for i in texts) - control) / sum(n_tokens[i] for i in texts))
    ratios.sort()
    return ratios[int(0.025 * n_resamples)], ratios[int(0.975 * n_resamples)]


def test_the_interval_is_that_of_drawing_texts_and_sets(differences):
    found = difference_interval(differences[0], differences[1:], TOKENS, n_resamples=20_000)
    expected = naive_interval(differences[0].tolist(), differences[1:].tolist(), TOKENS.tolist(), 4000, 8)
    width = found.high - found.low
    assert found.low == pytest.approx(expected[0], abs=0.05 * width)
    assert found.high == pytest.approx(expected[1], abs=0.05 * width)


def test_the_interval_carries_both_uncertainties():
    """With the same effect in each text, only the draws differ; with the same draws, only the texts do."""
    even, uneven = np.outer([1.0, 2, 3], TOKENS), np.outer([1.0, 1, 1], TOKENS + np.sin(TOKENS))
    draws_only = difference_interval(5.0 * TOKENS, even, TOKENS)
    assert draws_only.low == pytest.approx(2.0)  # all three draws the largest: a 27th, above 2.5 %
    assert draws_only.high == pytest.approx(4.0)
    texts_only = difference_interval(5.0 * TOKENS, uneven, TOKENS)
    assert 0 < texts_only.high - texts_only.low < 0.5


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Texts and sets both random, 15 of each: 95 % intervals, which are a little narrow for so few."""
    rng = np.random.default_rng(11)
    n, covered = 15, 0
    for _ in range(200):
        sets, texts = rng.normal(size=(n, 1)), rng.normal(size=(1, n))
        effect = (2.0 + texts[0] + rng.normal(size=n)) * 10
        drawn = (sets + texts + rng.normal(size=(n, n))) * 10
        interval = difference_interval(effect, drawn, np.full(n, 10), n_resamples=500)
        covered += interval.low <= 2.0 <= interval.high
    assert 0.86 <= covered / 200 <= 0.99
