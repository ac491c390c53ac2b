"""How much of a model's score hangs on how few of its weights or layers."""

from typing import NamedTuple

import numpy as np

TOP_FRACTION = 1e-4  # of all weights, whose share of the score is compared across models


class SampledScores(NamedTuple):
    """The scores of sampled weights, whose ranks among all weights are known.

    Attributes:
        scores: (m,)
        shares: for each the share of all weights that score at least as high, (m,).
    """

    scores: np.ndarray
    shares: np.ndarray


def gini(values: np.ndarray) -> float:
    """Gini coefficient sum_i (2 i - n - 1) x_i / (n sum x) of non-negative values, sorted upwards (Gini 1912).

    0 when all are equal, (n - 1) / n when one holds everything; NaN when all are 0. values: (n,).
    """
    x = np.sort(np.asarray(values, dtype=float))
    n = len(x)
    assert n and x[0] >= 0, "expected at least one value, none of them negative"
    total = x.sum()
    if total <= 0:
        return float("nan")
    ranks = np.arange(1, n + 1)
    return float(((2 * ranks - n - 1) * x).sum() / (n * total))


def top_score_share(
    top_scores: np.ndarray, total: float, n_weights: int, sampled: SampledScores | None = None
) -> float:
    """The share of all score that the highest ``TOP_FRACTION`` of the weights hold.

    The scores of the ranks within the exact top-K are added. Beyond, log score is interpolated linearly in log
    rank between sampled weights of known rank, and the scores of the ranks are added.

    Args:
        top_scores: the scores of the global top-K, (K,).
        total: the score of all weights.
        n_weights: how many weights there are.
        sampled: scores further down; without them only the top-K is known.

    Returns:
        Between 0 and 1; NaN where the scores are not known so far down, or their total is 0.
    """
    n_top = max(1, round(TOP_FRACTION * n_weights))
    exact = np.sort(top_scores)[::-1]
    score = exact[:n_top].sum()
    if total <= 0:
        return float("nan")
    if n_top > len(exact):
        if sampled is None:
            return float("nan")
        sampled_ranks = sampled.shares * n_weights
        beyond = (sampled_ranks > len(exact)) & (sampled.scores > 0)
        ranks = np.sort(np.append(sampled_ranks[beyond], len(exact)))
        scores = np.sort(np.append(sampled.scores[beyond], exact[-1]))[::-1]
        if exact[-1] <= 0 or ranks[-1] < n_top:
            return float("nan")
        score += _sum_between(ranks, scores, len(exact), n_top)
    return float(min(1.0, score / total))


def _sum_between(ranks: np.ndarray, scores: np.ndarray, first: int, last: int) -> float:
    """The sum of the interpolated scores over the ranks first + 1 to last, in up to 2,000 pieces.

    Args:
        ranks: at which scores are known, ascending, (m,).
        scores: the scores there, descending, (m,).
        first: the rank before the first that is added.
        last: the last rank that is added.
    """
    edges = np.unique(np.geomspace(first, last, 2000).round())  # every rank is in one piece
    middles = (edges[1:] + edges[:-1] + 1) / 2
    heights = np.exp(np.interp(np.log(middles), np.log(ranks), np.log(scores)))
    return float((heights * np.diff(edges)).sum())
