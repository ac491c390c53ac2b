"""Overlap of the heads of two rankings with ties: what breaking the ties at random would give on average.

Tied units have no order of their own. Taking them as they come in a table would favour the ranking that sorted
it; the expectation over all ways of breaking the ties depends on the values alone.
"""

import numpy as np

PERSISTENCE = 0.9  # of the rank-biased overlap: the first 10 ranks carry about 86 % of its weight


def expected_precision(x: np.ndarray, y: np.ndarray, n: int) -> float:
    """Expected share of the ``n`` units of largest x that are among the ``n`` of largest y; chance gives n / len(x).

    E|T_x & T_y| / n = sum_i P(i in T_x) P(i in T_y) / n, ties broken at random in each ranking by itself: units above
    the n-th largest value are in, those equal to it share the places that are left. Infinite values tie.
    """
    (in_x, edge_x, share_x), (in_y, edge_y, share_y) = _head(x, n), _head(y, n)
    both, left, right, edge = (int((a & b).sum()) for a in (in_x, edge_x) for b in (in_y, edge_y))
    return (both + left * share_y + right * share_x + edge * share_x * share_y) / n


def _head(values: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Which units are surely among the n largest, which tie for the last places, and the chance of each of these."""
    values = np.asarray(values, dtype=float)
    last = -np.sort(-values)[n - 1]
    above, tied = values > last, values == last
    return above, tied, float((n - above.sum()) / tied.sum())


def expected_rank_biased_overlap(x: np.ndarray, y: np.ndarray, p: float = PERSISTENCE) -> float:
    """Extrapolated rank-biased overlap of two rankings of the same n units, largest first, averaged over their ties.

    RBO_ext = A_n p^n + (1 - p)/p sum_d A_d p^d (Webber, Moffat & Zobel 2010). With ties (RBO^a of Corsi & Urbano 2024)
    A_d = sum_i c_i,d(x) c_i,d(y) / d, where c_i,d is the share of the orders of i's tied group that put i among the
    first d. A_d enters linearly, so this is the mean of RBO over all ways of breaking the ties.
    """
    order = np.lexsort((y, x))  # sums in an order that depends on the values alone
    n = len(order)
    overlap = (_shares_of_heads(np.asarray(x)[order]) * _shares_of_heads(np.asarray(y)[order])).sum(axis=0)  # (n,)
    depths = np.arange(1, n + 1)
    agreement = overlap / depths
    return float(agreement[-1] * p**n + (1 - p) / p * np.sum(agreement * p**depths))


def _shares_of_heads(values: np.ndarray) -> np.ndarray:
    """c[i, d - 1]: the probability that unit i is among the first d, ties broken at random, (n, n)."""
    _, group, size = np.unique(-np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    before = (np.cumsum(size) - size)[group][:, None]  # how many units are larger, (n, 1)
    depths = np.arange(1, len(values) + 1)
    return np.clip((depths - before) / size[group][:, None], 0, 1)
