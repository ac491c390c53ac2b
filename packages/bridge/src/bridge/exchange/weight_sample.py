"""Which single weights to measure: a random sample over every order of magnitude of rank, of known probability.

Among the N weights of a model a few hundred can be set to zero one by one. Drawn uniformly they would nearly all be
weights that do nothing; the highest ones alone say nothing about the others. So one weight is thought of as drawn like
this: with probability 1/2 any weight of the model; else a metric, then one of its half decades of rank (1 to 3, 4 to 9,
10 to 31, ... to the last), then any weight in it. What each weight's probability is follows from its ranks, whichever
metrics are compared, and estimates that divide by it speak of all weights.

A discovery draws some thousands in this way and writes them down with their probabilities; a validation draws from
those again, by the metrics that it compares.
"""

from typing import NamedTuple

import numpy as np

UNIFORM_SHARE = 0.5  # of the draws; the others go to the half decades of each metric equally


class WeightSample(NamedTuple):
    """The weights drawn, ascending positions among the candidates, and the probability with which each was."""

    chosen: np.ndarray  # (n,)
    inclusion: np.ndarray  # (n,)


def half_decade(ranks: np.ndarray) -> np.ndarray:
    """floor(2 log10 rank), for ranks from 1: 0 for 1 to 3, 1 for 4 to 9, 2 for 10 to 31."""
    stratum: np.ndarray = np.floor(2 * np.log10(np.maximum(ranks, 1))).astype(int)
    return stratum


def half_decade_sizes(n_weights: int) -> np.ndarray:
    """How many of the ranks 1 to ``n_weights`` each half decade holds.

    >>> half_decade_sizes(100).tolist()
    [3, 6, 22, 68, 1]
    """
    starts = np.ceil(10 ** (np.arange(half_decade(np.array([n_weights]))[0] + 1) / 2))
    return np.diff(np.append(starts, n_weights + 1)).astype(int)


def draw_probability(ranks: np.ndarray, n_weights: int) -> np.ndarray:
    """Each weight's probability of being the next one drawn; over all weights of the model they add up to 1.

    p_i = a / N + (1 - a) / (M H) sum_m 1 / N_h, with a = ``UNIFORM_SHARE``, M metrics, H half decades of rank, and N_h
    the number of ranks in the half decade that holds weight i's rank by metric m.

    Args:
        ranks: of the candidates among all weights by each metric, from 1 = highest, (m, M); an estimated rank may be
            a fraction.
        n_weights: N, the number of weights of the model.
    """
    sizes = half_decade_sizes(n_weights)
    strata = np.minimum(half_decade(ranks), len(sizes) - 1)
    stratified = (1 / sizes)[strata].mean(axis=1) / len(sizes)
    probability: np.ndarray = UNIFORM_SHARE / n_weights + (1 - UNIFORM_SHARE) * stratified
    return probability


def draw_weights(probability: np.ndarray, so_far: np.ndarray, n: int, rng: np.random.Generator) -> WeightSample:
    """Exactly ``n`` of the candidates, weight i with inclusion probability min(pi_i, t p_i).

    Sequential Poisson sampling (Ohlsson 1998): with U_i uniform on (0, pi_i), the n smallest U_i / p_i are taken, and
    t is the next one, so that a weight's probability depends on the others alone (Duffield, Lund & Thorup 2007). Being
    a candidate is part of it: pi_i is the probability with which chance made i a candidate.

    Args:
        probability: p_i of ``draw_probability``, (m,).
        so_far: pi_i, each candidate's probability of being one, (m,).
        n: how many; all candidates if there are no more.
        rng: gives the U_i.
    """
    if n >= len(probability):
        return WeightSample(np.arange(len(probability)), so_far.copy())
    key = rng.uniform(size=len(probability)) * so_far / probability
    order = np.argsort(key, kind="stable")
    chosen = np.sort(order[:n])
    return WeightSample(chosen, np.minimum(so_far, key[order[n]] * probability)[chosen])
