import itertools

import numpy as np
import pytest
import reference
from bridge.analysis.concentration import SampledScores, gini, top_score_share

N = 2_000_000


@pytest.fixture(scope="module", params=[0.5, 2.0, 4.0])
def scores(request):
    """Scores of all weights of a model, highest first, from hardly to extremely concentrated."""
    return np.sort(np.exp(np.random.default_rng(0).normal(0, request.param, N)))[::-1]


def sampled_at(scores, ranks):
    ranks = np.array(ranks)
    return SampledScores(scores=scores[ranks - 1], shares=ranks / N)


@pytest.mark.parametrize("k", [200, 500])
def test_within_the_top_k_the_share_is_exact(scores, k):
    assert top_score_share(scores[:k], scores.sum(), N) == pytest.approx(scores[:200].sum() / scores.sum())


@pytest.mark.parametrize("k", [10, 50])
def test_beyond_it_is_interpolated_between_sampled_ranks(scores, k):
    ranks = np.unique(np.geomspace(5, N, 80).astype(int))
    share = top_score_share(scores[:k], scores.sum(), N, sampled_at(scores, ranks))
    assert share == pytest.approx(scores[:200].sum() / scores.sum(), rel=0.02)


def test_beyond_it_every_rank_counts_with_its_interpolated_score():
    """Scores 8 / rank lie on a line in log score over log rank, so that interpolation gives them back."""
    top, sampled = np.array([4.0, 8]), SampledScores(scores=np.array([8.0, 2, 0.25]), shares=np.array([1, 4, 32]) / 2e5)
    total = 8 * sum(1 / rank for rank in range(1, 21))
    assert top_score_share(top, 50.0, 200_000, sampled) == pytest.approx(total / 50, rel=1e-12)
    with_zero = SampledScores(scores=np.append(sampled.scores, 0), shares=np.append(sampled.shares, 1e-3))
    assert top_score_share(top, 50.0, 200_000, with_zero) == pytest.approx(total / 50, rel=1e-12)


def test_far_beyond_it_ranks_are_added_in_two_thousand_pieces_each_by_its_middle_rank():
    n_weights, n_top, slope = 50_000_000_000, 5_000_000, -0.3
    far = np.array([0.01])
    sampled = SampledScores(scores=16 * (far * n_weights) ** slope, shares=far)
    edges = sorted({round(n_top ** (i / 1999)) for i in range(2000)})
    total = 16.0 + sum(
        (end - start) * 16 * ((start + 1 + end) / 2) ** slope for start, end in itertools.pairwise(edges)
    )
    share = top_score_share(np.array([16.0]), 1e9, n_weights, sampled)
    assert share == pytest.approx(total / 1e9, rel=1e-12)


def test_unknown_where_nothing_is_known_so_far_down(scores):
    assert np.isnan(top_score_share(scores[:50], scores.sum(), N))
    assert np.isnan(top_score_share(scores[:50], scores.sum(), N, sampled_at(scores, [1, 60, 199])))
    assert np.isnan(top_score_share(np.zeros(50), 0.0, 50))


def test_no_share_is_interpolated_from_a_score_of_zero():
    beyond = SampledScores(scores=np.array([1.0]), shares=np.array([0.5]))
    assert np.isnan(top_score_share(np.array([5.0, 0.0]), 6.0, 30_000, beyond))


@pytest.mark.parametrize("values", [[1, 1, 1], [0, 0, 5], [1, 2, 3, 10], [0.1, 7, 7, 0, 2], [0.25, 0.75], [0.3]])
def test_gini_is_half_the_relative_mean_difference(values):
    assert gini(np.array(values)) == pytest.approx(reference.gini(values))


def test_gini_of_nothing_is_undefined():
    assert np.isnan(gini(np.zeros(3)))


@pytest.mark.parametrize("values", [[], [-1.0, 2, 3]])
def test_gini_takes_some_values_and_no_negative_one(values):
    with pytest.raises(AssertionError, match="expected at least one value, none of them negative"):
        gini(np.array(values))


def test_of_few_weights_the_highest_one_counts():
    assert top_score_share(np.array([1.0, 3.0]), 8.0, 100) == 3 / 8


def test_a_share_is_one_at_most():
    assert top_score_share(np.array([0.25, 0.5]), 0.4, 10_000) == 1


@pytest.mark.parametrize("total", [1.0, 0.8])
def test_the_share_of_a_small_total_is_known_too(total):
    assert top_score_share(np.array([0.25, 0.5]), total, 10_000) == 0.5 / total
