import numpy as np
import pytest
from bridge.exchange.weight_sample import draw_probability, draw_weights, half_decade, half_decade_sizes


def test_half_decades_of_rank():
    assert half_decade(np.array([1, 3, 4, 9, 10, 31, 32, 100])).tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
    assert half_decade(np.array([0.25, 1 - 1e-9, 1])).tolist() == [0, 0, 0]  # of estimated ranks
    for n in (1, 3, 100, 12345):
        sizes = half_decade_sizes(n)
        assert sizes.tolist() == np.bincount(half_decade(np.arange(1, n + 1))).tolist()


def test_the_probabilities_of_all_weights_add_up_to_one():
    rng = np.random.default_rng(0)
    ranks = np.column_stack([rng.permutation(5000) + 1 for _ in range(3)])
    probability = draw_probability(ranks, 5000)
    assert probability.sum() == pytest.approx(1)
    one = draw_probability(np.array([[1], [5000]]), 5000)
    sizes = half_decade_sizes(5000)
    assert one.tolist() == pytest.approx([0.5 / 5000 + 0.5 / len(sizes) / size for size in (sizes[0], sizes[-1])])


def test_weighting_by_the_inverse_probability_gives_the_population_back():
    rng = np.random.default_rng(1)
    values = np.exp(rng.normal(size=400))
    probability = draw_probability(np.argsort(np.argsort(-values))[:, None] + 1, 400)
    so_far = np.where(np.arange(400) % 2, 1.0, 0.5)
    estimates = []
    for _ in range(3000):
        candidates = np.flatnonzero(rng.uniform(size=400) < so_far)
        sample = draw_weights(probability[candidates], so_far[candidates], 40, rng)
        assert len(sample.chosen) == 40
        estimates.append((values[candidates][sample.chosen] / sample.inclusion).sum())
    assert np.mean(estimates) == pytest.approx(values.sum(), rel=4 * np.std(estimates) / values.sum() / np.sqrt(3000))


def test_all_candidates_are_taken_where_there_are_no_more():
    sample = draw_weights(np.full(3, 0.1), np.array([0.5, 1, 0.2]), 3, np.random.default_rng(0))
    assert (sample.chosen.tolist(), sample.inclusion.tolist()) == ([0, 1, 2], [0.5, 1, 0.2])


class Draws:
    """A generator that gives the numbers it was made with."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = numbers

    def uniform(self, size: int) -> np.ndarray:
        assert size == len(self.numbers)
        return np.array(self.numbers)


def test_the_smallest_keys_are_taken_and_the_next_one_is_the_threshold():
    probability, so_far = np.array([0.1, 0.2, 0.4, 0.1, 0.2]), np.array([1, 1, 0.5, 0.25, 1])
    rng = Draws(0.4, 0.2, 0.8, 0.8, 0.6)  # keys: 4, 1, 1, 2, 3
    two = draw_weights(probability, so_far, 2, rng)
    assert two.chosen.tolist() == [1, 2]
    assert two.inclusion.tolist() == pytest.approx([0.4, 0.5])  # the threshold is 2; the second would be 0.8
    three = draw_weights(probability, so_far, 3, rng)
    assert three.chosen.tolist() == [1, 2, 3]
    assert three.inclusion.tolist() == pytest.approx([0.6, 0.5, 0.25])  # 3
    assert draw_weights(probability, so_far, 4, rng).inclusion.tolist() == pytest.approx([0.8, 0.5, 0.25, 0.8])  # 4


def test_each_metric_and_each_half_decade_has_an_equal_part():
    n = 100
    first, second = np.arange(1, n + 1), np.arange(n, 0, -1)
    probability = draw_probability(np.column_stack([first, second]), n)
    sizes = [3, 6, 22, 68, 1]
    assert half_decade_sizes(n).tolist() == sizes
    expected = 0.5 / 100 + 0.5 / (2 * 5) * (1 / 3 + 1 / 1)  # rank 1 by one metric, 100 by the other
    assert probability[0] == pytest.approx(expected)
    expected = 0.5 / 100 + 0.5 / (2 * 5) * (1 / 22 + 1 / 68)  # ranks 10 and 91
    assert probability[9] == pytest.approx(expected)


def test_an_estimated_rank_below_the_last_is_in_the_last_half_decade():
    assert draw_probability(np.array([[100.0], [400.0]]), 99).tolist() == pytest.approx([0.5 / 99 + 0.5 / 4 / 68] * 2)
