"""Worlds of single weights, and claims about all weights of a model from a sample of known probability."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
from bridge.analysis.claims import SIGNIFICANCE
from bridge.analysis.metric_comparison import compare_metrics
from bridge.analysis.population import population_precision, population_ratio
from bridge.analysis.weighted_rho import rho_interval, weighted_rho
from bridge.exchange.weight_sample import draw_probability, draw_weights
from scipy import stats

from simulations.rates import ANY, FALSE, Rate, claim, generator

N_WEIGHTS = 400_000
N_MEASURED, N_TABLE = 200, 1_500  # weights set to zero one by one, of so many in the table of the discovery

WEIGHT_WORLDS = (
    "two equal metrics",
    "two equal metrics, the second blind among its highest 2 %",
    "the second better, but blind among its highest 7 %",
    "a fifth of the first metric's scores tie at zero",
    "noise",
)


def weight_population(world: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores by two metrics (N, 2) and sizes of the effects (N,) of all weights of a model, lognormal."""
    effect, noise, order = rng.normal(size=N_WEIGHTS), rng.normal(size=(N_WEIGHTS, 2)), rng.uniform(size=N_WEIGHTS)
    correlations = {WEIGHT_WORLDS[2]: (0.6, 0.75), WEIGHT_WORLDS[3]: (0.8, 0.5), WEIGHT_WORLDS[4]: (0.0, 0.0)}
    pearson = np.array(correlations.get(world, (0.69, 0.69)))
    scores = effect[:, None] * pearson + noise * np.sqrt(1 - pearson**2)  # (N, 2)
    if "blind" in world:
        start = 2.0 if "2 %" in world else 1.5
        scores[:, 1] = np.where(scores[:, 1] > start, start + order, scores[:, 1])
    if "tie" in world:
        scores[order < 0.2, 0] = scores[:, 0].min()
    return np.exp(1.5 * scores), np.exp(1.5 * effect)


def ranks_among_all(scores: np.ndarray) -> np.ndarray:
    """Ranks from 1 = highest, by each metric, (N, M); ties in the order in which they come."""
    ranks = np.empty(scores.shape)
    for at, column in enumerate(scores.T):
        ranks[np.argsort(-column, kind="stable"), at] = np.arange(1, len(column) + 1)
    return ranks


class Candidates(NamedTuple):
    """What one pass over a model keeps of its weights: from these the table of a discovery is drawn."""

    index: np.ndarray  # (m,)
    inclusion: np.ndarray  # (m,): the probability with which each was kept
    ranks: np.ndarray  # (m, M): among all weights, estimated below the head


def candidates(scores: np.ndarray, true_ranks: np.ndarray, rng: np.random.Generator) -> Candidates:
    """As one pass can keep them: the 100 highest, the highest 512 of every 32nd weight, and 2,000 of all.

    Ranks beyond the head are not known; a candidate's is estimated by how many weights the candidates that score at
    least as high stand for.
    """
    n_head, n_middle, middle_share, n_uniform = 100, 512, 1 / 32, 2_000
    drawn = rng.choice(len(scores), int(len(scores) * middle_share), replace=False)
    bounds = np.sort(scores[drawn], axis=0)[-n_middle]
    in_head, in_middle = (true_ranks <= n_head).any(axis=1), (scores >= bounds).any(axis=1)
    kept = in_head.copy()
    kept[drawn[in_middle[drawn]]] = True
    kept[drawn[:n_uniform]] = True
    index = np.flatnonzero(kept)
    inclusion = np.where(in_middle[index], middle_share, n_uniform / len(scores))
    inclusion[in_head[index]] = 1.0
    ranks = np.empty((len(index), scores.shape[1]))
    for at, column in enumerate(scores[index].T):
        order = np.argsort(-column, kind="stable")
        position = np.arange(1, len(order) + 1)
        estimate = np.cumsum(1 / inclusion[order])
        ranks[order, at] = np.where(position <= n_head, position, np.maximum(position, estimate))
    return Candidates(index, inclusion, ranks)


@claim("drawn for", fast={"worlds": WEIGHT_WORLDS[1:2]}, cost=50)
def all_weights(replications: int, worlds: tuple[str, ...] = WEIGHT_WORLDS) -> Iterator[Rate]:
    """Intervals for all weights of a model from 200 single ones cover the truth, whichever metric they were drawn for.

    400,000 weights, scores and sizes of effects lognormal, two metrics. 200 are drawn for the first metric, the second
    or both, from a table of 1,500 that one pass over the model keeps: half uniform, half by half-decades of rank. Rho
    is weighted by the inverse of each weight's probability; so are the overlap of the highest 10 % and the ratio of all
    effect to all score. Of noise, p < 0.05 is claimed.
    """
    for world, metrics in product(worlds, ((0,), (1,), (0, 1))):
        rng = generator("all weights", world)
        scores, effects = weight_population(world, rng)
        true_ranks = ranks_among_all(scores)
        truth = np.array([stats.spearmanr(column, effects).statistic for column in scores.T])
        overlaps = [_overlap(column, effects, 0.1) for column in scores.T]
        ratios = effects.sum() / scores.sum(axis=0)
        covered = np.zeros((replications, 2, 3), dtype=bool)  # by metric: rho, overlap, ratio
        of_difference = np.zeros(replications, dtype=bool)
        claimed = np.zeros((replications, 2, 2), dtype=bool)  # by metric: better than chance, the wrong way round
        for repeat in range(replications):
            if repeat % 5 == 0:
                kept = candidates(scores, true_ranks, rng)
            table = draw_weights(draw_probability(kept.ranks, N_WEIGHTS), kept.inclusion, N_TABLE, rng)
            ranks = kept.ranks[table.chosen][:, list(metrics)]
            sample = draw_weights(draw_probability(ranks, N_WEIGHTS), table.inclusion, N_MEASURED, rng)
            index, weights = kept.index[table.chosen][sample.chosen], 1 / sample.inclusion
            x, y = scores[index], effects[index]
            results = {str(at): weighted_rho(x[:, at], y, weights) for at in range(2)}
            for at, result in enumerate(results.values()):
                interval = rho_interval(result, weights, sample.inclusion)
                claimed[repeat, at] = [interval.p_value < SIGNIFICANCE and sign * result.rho > 0 for sign in (1, -1)]
                head = population_precision(x[:, at], y, sample.inclusion, 0.1)
                total = population_ratio(x[:, at], y, sample.inclusion)
                covered[repeat, at] = [
                    interval.low <= truth[at] <= interval.high,
                    head.low <= overlaps[at] <= head.high,
                    total.low <= ratios[at] <= total.high,
                ]
            pair = compare_metrics(results, weights)[0]
            of_difference[repeat] = pair.low <= truth[0] - truth[1] <= pair.high
        setting = "both" if len(metrics) == 2 else ("the first", "the second")[metrics[0]]
        for number, (what, band) in enumerate({"rho": (0.9, 1), "overlap": (0.9, 1), "ratio": ANY}.items()):
            yield Rate(f"{world}: {what}", setting, covered[:, :, number].ravel(), band)
        yield Rate(f"{world}: difference of two rhos", setting, of_difference, (0.9, 1))
        if world == "noise":
            yield Rate(f"{world}: better than chance", setting, claimed[:, :, 0].ravel(), FALSE)
            yield Rate(f"{world}: the wrong way round", setting, claimed[:, :, 1].ravel(), FALSE)


def _overlap(x: np.ndarray, y: np.ndarray, share: float) -> float:
    size = round(share * len(x))
    heads = [np.argpartition(-values, size)[:size] for values in (x, y)]
    return len(np.intersect1d(*heads)) / size
