import numpy as np
import pytest
from bridge.analysis.layer_sample import draw_layers

KINDS = np.array(["a"] * 40 + ["b"] * 20 + ["c"])
SCORES = np.random.default_rng(0).normal(size=61)


def test_every_layer_is_drawn_with_the_probability_that_is_told():
    rng = np.random.default_rng(1)
    counts = np.zeros(61)
    for _ in range(4000):
        sample = draw_layers(SCORES, KINDS, 15, rng)
        assert len(sample.chosen) == 15 and (np.diff(sample.chosen) > 0).all()
        assert sample.inclusion.tolist() == [15 / 61] * 15
        counts[sample.chosen] += 1
    assert counts / 4000 == pytest.approx(np.full(61, 15 / 61), abs=4 * np.sqrt(0.19 / 4000))


def test_kinds_and_the_range_of_the_score_are_met_in_proportion():
    rng = np.random.default_rng(2)
    high = np.median(SCORES[:40]) < SCORES
    for _ in range(50):
        chosen = draw_layers(SCORES, KINDS, 15, rng).chosen
        kinds = KINDS[chosen]
        assert 9 <= (kinds == "a").sum() <= 10 and 4 <= (kinds == "b").sum() <= 6
        assert 4 <= high[chosen][kinds == "a"].sum() <= 6


def test_the_highest_are_certain_and_the_others_share_the_rest():
    sample = draw_layers(SCORES, KINDS, 10, np.random.default_rng(3), n_top=5)
    top = set(np.argsort(-SCORES)[:5])
    assert top <= set(sample.chosen) and len(sample.chosen) == 15
    for layer, inclusion in zip(sample.chosen, sample.inclusion, strict=True):
        assert inclusion == (1 if layer in top else 10 / 56)


def test_a_census_is_certain():
    sample = draw_layers(SCORES, KINDS, 100, np.random.default_rng(4))
    assert sample.chosen.tolist() == list(range(61)) and set(sample.inclusion) == {1.0}
    assert draw_layers(SCORES, KINDS, 0, np.random.default_rng(4), n_top=2).inclusion.tolist() == [1, 1]
