import numpy as np
import pytest
from bridge.analysis.layer_sample import DEFAULT_LAYERS, draw_layers

KINDS = ["q", "v", "q", "v", "q"]
SCORES = np.array([3.0, 1.0, 1.0, 5.0, 2.0])  # q ascending: 2, 4, 0; then v descending: 3, 1


class Start:
    """A generator that gives the start it was made with."""

    def __init__(self, start: float) -> None:
        self.start = start

    def uniform(self) -> float:
        return self.start


@pytest.mark.parametrize(
    ("start", "n", "expected"),
    [
        (0.0, 2, [2, 0]),  # places 0 and 2.5 of the order 2, 4, 0, 3, 1
        (0.39, 2, [2, 3]),  # places 0.975 and 3.475
        (0.41, 2, [4, 3]),  # places 1.025 and 3.525
        (0.999999, 2, [0, 1]),  # places 2.5 and 5 less a little
        (0.1, 1, [2]),
        (0.9, 1, [1]),
        (0.5, 4, [2, 4, 3, 1]),  # places 0.625, 1.875, 3.125, 4.375
    ],
)
def test_every_nth_of_the_order_by_kind_and_score(start, n, expected):
    sample = draw_layers(SCORES, KINDS, n, Start(start))
    assert sample.chosen.tolist() == sorted(expected)
    assert sample.inclusion.tolist() == [n / 5] * n


def test_kinds_are_gone_through_up_and_down_in_turn():
    kinds, scores = list("ccbabaacb"), np.array([2.0, 1, 3, 5, 1, 4, 6, 3, 2])
    starts = (np.arange(9) + 0.5) / 9
    order = [draw_layers(scores, kinds, 1, Start(start)).chosen[0] for start in starts]
    assert order == [5, 3, 6, 2, 8, 4, 1, 0, 7]  # a: 4, 5, 6; b: 3, 2, 1; c: 1, 2, 3


@pytest.mark.parametrize("n", [5, 6, 100])
def test_all_layers_are_certain_where_there_are_no_more(n):
    sample = draw_layers(SCORES, KINDS, n, Start(0.7))
    assert sample.chosen.tolist() == [0, 1, 2, 3, 4]
    assert sample.inclusion.tolist() == [1.0] * 5


def test_forty_layers_are_drawn_by_default():
    assert DEFAULT_LAYERS == 40  # in the guide, with the agreement that so many show


def test_none():
    assert len(draw_layers(SCORES, KINDS, 0, Start(0.3)).chosen) == 0


@pytest.mark.parametrize("n", [1, 3, 7, 12])
def test_every_layer_has_the_probability_that_is_said_exactly(n):
    rng = np.random.default_rng(5)
    scores, kinds = rng.integers(0, 9, 13), rng.choice(["a", "b", "c"], 13)
    starts = (np.arange(13 * 40) + 0.5) / (13 * 40)  # the share of starts is the probability: 13/n divides the grid
    counts = np.zeros(13)
    for start in starts:
        counts[draw_layers(scores, kinds, n, Start(start)).chosen] += 1
    assert counts / len(starts) == pytest.approx(n / 13, abs=1.5 / 520)


def test_every_kind_and_every_part_of_its_range_is_met_in_proportion():
    kinds = np.repeat(["q", "k", "v", "o", "gate", "up", "down"], 30)
    scores = np.tile(np.arange(30.0), 7)
    sample = draw_layers(scores, kinds, 42, np.random.default_rng(0))
    for kind in set(kinds):
        of_kind = sample.chosen[kinds[sample.chosen] == kind]
        assert len(of_kind) == 6
        assert np.diff(np.sort(scores[of_kind])).tolist() == [5.0] * 5


def test_a_start_at_the_end_takes_no_layer_twice():
    for n in (3, 40, 209):
        sample = draw_layers(np.arange(210.0), ["q"] * 210, n, Start(np.nextafter(1, 0)))
        assert len(set(sample.chosen.tolist())) == n and sample.chosen[-1] == 209
        assert sample.inclusion[0] == n / 210
