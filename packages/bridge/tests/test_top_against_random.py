import math

import numpy as np
import pytest
import synthetic
from bridge.analysis.top_against_random import layers_above_random, top_against_random


@pytest.fixture(scope="module")
def measurements():
    return synthetic.measurements()


def test_top_is_compared_with_each_random_draw_of_its_target(measurements):
    table = top_against_random(measurements).set_index(["target_layer", "metric"])
    assert len(table) == 31 * 3
    row = table.loc[("ALL", "grad_x_weight")]
    drawn = measurements[(measurements["target_layer"] == "ALL") & (measurements["selection"] == "random")]["delta_nll"]
    assert row["n_random"] == 3
    assert [row["random_low"], row["random_mean"], row["random_high"]] == pytest.approx(
        [drawn.min(), drawn.mean(), drawn.max()]
    )


def test_top_without_random_draws_has_no_range(measurements):
    table = top_against_random(measurements[measurements["selection"] != "random"])
    assert (table["n_random"] == 0).all()
    assert table[["random_mean", "random_low", "random_high"]].isna().all().all()


def test_layers_above_every_draw_are_counted_against_chance():
    effects = np.ones(12)
    largest_draws = np.array([0.5] * 3 + [2.0] * 9)
    above = layers_above_random(effects, largest_draws, np.full(12, 3))
    assert (above.n, above.wins, above.draws, above.expected) == (12, 3, 3, 3.0)
    tail = sum(math.comb(12, wins) * 0.25**wins * 0.75 ** (12 - wins) for wins in range(3, 13))
    assert above.p_value == pytest.approx(tail)


def test_layers_without_draws_are_not_counted():
    above = layers_above_random(np.array([1.0, 1.0, 1.0]), np.array([0.5, np.nan, 2.0]), np.array([5, 0, 3]))
    assert (above.n, above.wins, above.draws, above.expected) == (2, 1, 3, 0.5)
    assert layers_above_random(np.array([1.0]), np.array([np.nan]), np.array([0])).n == 0
