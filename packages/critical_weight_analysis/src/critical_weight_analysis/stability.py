"""Would other texts have named the same weights? The corpus is halved at random, and each half discovered.

How many of the top-K two discoveries share is measured by the Jaccard overlap |A ∩ B| / |A ∪ B| (Jaccard 1901), how
alike they order what they share by Spearman's rho over A ∩ B (Spearman 1904; of top-K lists, which leave the
ranks of all other weights unknown, see Fagin, Kumar & Sivakumar 2003). That rho says nothing of the weights that
only one list has, and its range is restricted: it is to be read beside the overlap, not instead of it.

Halves of one split share no sequence. First halves of two splits share about half of theirs and agree better.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from bridge.exchange.tables import STABILITY
from scipy import stats
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from critical_weight_analysis.discovery import Engine, needs_of, scores_of
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.ranking import Ranking

MIN_SEQUENCES = 4  # two in each half
MIN_COMMON = 3  # two weights are always in the same or the opposite order
Rankings = dict[str, Ranking]  # by metric
Halves = tuple[Rankings, Rankings]


def halves(n: int, seed: int, split: int) -> tuple[list[int], list[int]]:
    """The numbers 0 to n - 1 in two random halves, each ascending; the second has one more where n is odd."""
    order = np.random.default_rng([seed, split, *b"halves of the corpus"]).permutation(n)
    return sorted(order[: n // 2].tolist()), sorted(order[n // 2 :].tolist())


def discover_halves(
    engine: Engine,
    model: PreTrainedModel,
    sequences: list[Tensor],
    parameters: dict[str, Parameter],
    metrics: Sequence[str],
    k: int,
    n_splits: int,
    *,
    seed: int = 0,
    settings: Settings = Settings(),  # noqa: B008 - frozen
) -> Iterator[Halves]:
    """For each of ``n_splits`` splits the global top-K of both halves. One split costs one pass over the corpus.

    The arguments are those of ``discovery.discover``.

    Raises:
        RunError: a loss or a score is not finite.
    """
    needs = needs_of(metrics, engine, settings)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}

    def top_of(members: list[int]) -> Rankings:
        rankings = {metric: Ranking(shapes, k, per_layer=False) for metric in metrics}
        half = [sequences[i] for i in members]
        _, stream = engine.sensitivities(model, half, list(parameters), needs, settings)
        for sensitivity in stream:
            for metric, ranking in rankings.items():
                ranking.update(sensitivity.name, sensitivity.weight, scores_of(metric, sensitivity))
        return rankings

    for split in range(n_splits):
        first, second = halves(len(sequences), seed, split)
        yield top_of(first), top_of(second)


def table(full: Rankings, splits: Sequence[Halves], ks: Sequence[int], n_weights: int) -> pd.DataFrame:
    """The rows of STABILITY: halves of each split, first halves of two splits, and pairs of metrics.

    Args:
        full: the rankings of the whole corpus.
        splits: what ``discover_halves`` gave.
        ks: sizes of the sets.
        n_weights: scalar weights in scope.
    """
    rows = []
    for k in ks:
        chance = chance_jaccard(k, n_weights)
        for kind, metric, other, seeds, one, two in _pairs(full, splits):
            row = {"kind": kind, "metric": metric, "other": other, "k": k, "seed": seeds[0], "other_seed": seeds[1]}
            rows.append(row | {"jaccard_chance": chance} | overlap(places(one, k), places(two, k)))
    return pd.DataFrame(rows, columns=list(STABILITY.columns)).astype({"seed": "Int64", "other_seed": "Int64"})


def _pairs(
    full: Rankings, splits: Sequence[Halves]
) -> Iterator[tuple[str, str, str, tuple[int | None, int | None], Ranking, Ranking]]:
    """Kind, metric, other metric, the splits' numbers, and the two rankings to compare."""
    for metric in full:
        for seed, (first, second) in enumerate(splits):
            yield "halves", metric, metric, (seed, seed), first[metric], second[metric]
        for (seed, one), (other_seed, two) in combinations(enumerate(splits), 2):
            yield "seeds", metric, metric, (seed, other_seed), one[0][metric], two[0][metric]
    for metric, other in combinations(full, 2):
        yield "metrics", metric, other, (None, None), full[metric], full[other]


def places(ranking: Ranking, k: int) -> Tensor:
    """The top-K, highest first: parameter number and flat index, int64 (K, 2)."""
    best = ranking.best(k)
    return torch.stack([best.parameter, best.index], dim=1)


def overlap(one: Tensor, two: Tensor) -> dict[str, float]:
    """Jaccard overlap, number in common, and Spearman's rho of the ranks of those in common.

    Rho is NaN with fewer than ``MIN_COMMON`` in common.

    Args:
        one: different places, best first, (K, 2).
        two: the same of the other list.
    """
    _, number = torch.cat([one, two]).unique(dim=0, return_inverse=True)
    first, second = number[: len(one)].numpy(), number[len(one) :].numpy()
    common, at, at_other = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    n = len(common)
    rho = float(stats.spearmanr(at, at_other).statistic) if n >= MIN_COMMON else np.nan
    return {"jaccard": n / (len(one) + len(two) - n), "n_common": n, "rank_correlation": rho}


def chance_jaccard(k: int, n_weights: int) -> float:
    """Expected Jaccard overlap of two sets of K drawn independently from n weights: E[X / (2K - X)].

    X, the number in common, is hypergeometric; for K much below n this is about K / 2n.
    """
    common = np.arange(max(0, 2 * k - n_weights), k + 1)
    probabilities = np.exp(stats.hypergeom(n_weights, k, k).logpmf(common))  # pmf takes seconds for billions of weights
    return float((probabilities * common / (2 * k - common)).sum())
