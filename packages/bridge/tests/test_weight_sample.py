import numpy as np
import pytest
from bridge.analysis.weight_sample import draw_probability, draw_weights, half_decade, half_decade_sizes


def test_half_decades_of_rank():
    assert half_decade(np.array([1, 3, 4, 9, 10, 31, 32, 100])).tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
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
