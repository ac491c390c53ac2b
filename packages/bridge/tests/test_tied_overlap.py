import itertools

import numpy as np
import pytest
import reference
from bridge.analysis.tied_overlap import expected_precision, expected_rank_biased_overlap
from synthetic import points


def orders(values):
    """Every order of the units, largest first, that the values allow."""
    units = sorted(range(len(values)), key=lambda i: -values[i])
    groups = [list(group) for _, group in itertools.groupby(units, key=lambda i: values[i])]
    for arranged in itertools.product(*(itertools.permutations(group) for group in groups)):
        yield [unit for group in arranged for unit in group]


def mean_over_orders(x, y, figure):
    return np.mean([figure(first, second) for first in orders(x) for second in orders(y)])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_precision_is_the_mean_over_all_orders_of_ties(n):
    x, y = [3, 2, 2, 2, 1, 0], [np.inf, np.inf, 1, np.inf, 1, 0]
    literal = mean_over_orders(x, y, lambda a, b: len(set(a[:n]) & set(b[:n])) / n)
    assert expected_precision(np.array(x), np.array(y), n) == pytest.approx(literal)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_rank_biased_overlap_is_the_mean_over_all_orders_of_ties(p):
    x, y = [3, 2, 2, 2, 1, 0], [5, 5, 1, 5, 1, 0]
    literal = mean_over_orders(x, y, lambda a, b: reference.rank_biased_overlap(a, b, p))
    assert expected_rank_biased_overlap(np.array(x), np.array(y), p) == pytest.approx(literal)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_without_ties_it_is_the_infinite_sum(p):
    x, y = points(15, seed=4)
    first, second = ([int(i) for i in np.argsort(-v)] for v in (x, y))
    assert expected_rank_biased_overlap(x, y, p) == pytest.approx(reference.rank_biased_overlap(first, second, p))
    by_default = reference.rank_biased_overlap(first, second, 0.9)
    assert expected_rank_biased_overlap(x, y) == pytest.approx(by_default)
    assert expected_precision(x, y, 4) == len(set(first[:4]) & set(second[:4])) / 4


def test_rank_biased_overlap_looks_at_the_largest_first():
    x = np.arange(20.0)
    top, bottom = x.copy(), x.copy()
    top[[18, 19]], bottom[[0, 1]] = [19, 18], [1, 0]
    assert expected_rank_biased_overlap(x, top) < expected_rank_biased_overlap(x, bottom)
    assert expected_rank_biased_overlap(x, x**3) == pytest.approx(1)


def test_four_of_five_infinite_effects_give_a_score_of_noise_what_chance_gives():
    x = np.arange(30.0)[::-1]  # the table is sorted by score
    y = np.full(30, np.inf)
    y[::5] = np.arange(6)
    assert expected_precision(x, y, 5) == pytest.approx(4 * (5 / 24) / 5)
    order = np.random.default_rng(0).permutation(30)
    assert expected_rank_biased_overlap(x[order], y[order]) == expected_rank_biased_overlap(x, y)
