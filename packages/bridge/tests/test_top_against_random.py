import math

import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.top_against_random import layers_above_random, top_against_random


@pytest.fixture(scope="module")
def measurements():
    return synthetic.measurements()


def test_top_is_compared_with_each_random_draw_of_its_target(measurements):
    table = top_against_random(measurements, synthetic.comparisons(measurements)).set_index(["target_layer", "metric"])
    assert len(table) == 31 * 3
    row = table.loc[("ALL", "grad_x_weight")]
    drawn = measurements[(measurements["target_layer"] == "ALL") & (measurements["selection"] == "random")]["delta_nll"]
    assert row["n_random"] == 3
    assert [row["random_low"], row["random_mean"], row["random_high"]] == pytest.approx(
        [drawn.min(), drawn.mean(), drawn.max()]
    )
    assert (row["n_draws"], row["n_beaten"]) == (3, 3)
    assert row["difference_low"] < row["difference"] == row["delta_nll"] - drawn.mean() < row["difference_high"]


def test_the_columns_of_the_table(measurements):
    columns = "target_layer metric perturbation k delta_nll ci_low ci_high random_mean random_low random_high n_random"
    columns += " n_draws n_beaten difference difference_low difference_high n_eff p_value unbounded_share"
    columns += " control_unbounded_share note"
    assert list(top_against_random(measurements, synthetic.comparisons(measurements))) == columns.split()


def test_only_the_comparison_with_random_sets_is_taken(measurements):
    compared = synthetic.comparisons(measurements)
    matched = compared.assign(control="matched_obd", difference=7.0)
    table = top_against_random(measurements, pd.concat([matched, compared]))
    assert len(table) == 31 * 3
    assert not (table["difference"] == 7).any()


def test_top_without_random_draws_has_no_range(measurements):
    alone = measurements[measurements["selection"] != "random"]
    table = top_against_random(alone, synthetic.comparisons(alone))
    assert table[["n_draws", "difference", "p_value"]].isna().all().all()
    assert (table["n_random"] == 0).all()
    assert table[["random_mean", "random_low", "random_high"]].isna().all().all()


def test_seeds_of_a_random_perturbation_are_averaged():
    table = synthetic.measurements(n=1, metrics=("obd",), with_all=False)
    tops = table[table["selection"] == "top_obd"].assign(delta_nll=3.0, ci_low=1.0, ci_high=4.0)
    more = tops.assign(seed=1, delta_nll=4.0, ci_low=2.0, ci_high=7.0)
    row = top_against_random(pd.concat([tops, more]), synthetic.comparisons(tops)).iloc[0]
    assert row[["delta_nll", "ci_low", "ci_high"]].tolist() == [3.5, 1.5, 5.5]


def test_layers_above_every_draw_are_counted_against_chance():
    n_beaten = np.array([3] * 3 + [2] * 9)
    above = layers_above_random(n_beaten, np.full(12, 3))
    assert (above.n, above.wins, above.draws, above.expected) == (12, 3, 3, 3.0)
    tail = sum(math.comb(12, wins) * 0.25**wins * 0.75 ** (12 - wins) for wins in range(3, 13))
    assert above.p_value == pytest.approx(tail)


def test_layers_without_draws_are_not_counted():
    above = layers_above_random(np.array([5, 0, 2]), np.array([5, 0, 3]))
    assert (above.n, above.wins, above.draws, above.expected) == (2, 1, 3, 0.5)
    none = layers_above_random(np.array([0]), np.array([0]))
    assert none[:3] == (0, 0, 0) and np.isnan(none[3:]).all()


def test_each_perturbation_is_compared_with_its_own_draws():
    table = synthetic.measurements(n=2, metrics=("obd",), perturbations=("zero", "sign_flip"))
    both = top_against_random(table, synthetic.comparisons(table))
    assert both["perturbation"].tolist() == ["zero"] * 3 + ["sign_flip"] * 3
    for perturbation, rows in both.groupby("perturbation"):
        alone = table[table["perturbation"] == perturbation]
        expected = top_against_random(alone, synthetic.comparisons(alone))
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), expected, check_exact=True)


def test_the_fewest_draws_of_any_layer_give_the_chance():
    above = layers_above_random(np.array([1, 5]), np.array([1, 5]))
    assert (above.draws, above.expected, above.p_value) == (1, 1.0, pytest.approx(0.25))
