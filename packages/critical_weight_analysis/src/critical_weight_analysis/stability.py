"""Would other texts have named the same weights? The corpus is halved at random, and each half discovered.

How many of the top-K two discoveries share is measured by the Jaccard overlap |A ∩ B| / |A ∪ B| (Jaccard 1901), how
alike they order what they share by Spearman's rho over A ∩ B (Spearman 1904; of top-K lists, which leave the
ranks of all other weights unknown, see Fagin, Kumar & Sivakumar 2003). That rho says nothing of the weights that
only one list has, and its range is restricted: it is to be read beside the overlap, not instead of it.

Halves of one split share no sequence. First halves of two splits share about half of theirs and agree better.

Two halves agree more than random sets do even where the gradients are pure noise, because a score like |θ dL/dθ| holds
the weight itself. So each overlap stands beside that of a null: within every parameter all that a half tells of the
weights (gradients, their squares, inputs) is dealt out anew to them, for each half in another random order of rows and
columns, and the weights stay where they are. What the overlap has beyond that is what the texts agree on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

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
from critical_weight_analysis.metrics import Sensitivity
from critical_weight_analysis.ranking import Ranking

MIN_SEQUENCES = 4  # two in each half
MIN_COMMON = 3  # two weights are always in the same or the opposite order
Rankings = dict[str, Ranking]  # by metric


class Halves(NamedTuple):
    """The rankings by two halves of the corpus, and by the same halves under the null."""

    first: Rankings
    second: Rankings
    null_first: Rankings
    null_second: Rankings


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
    """For each of ``n_splits`` splits the global top-K of both halves, also under the null.

    One split costs one pass over the corpus.

    The arguments are those of ``discovery.discover``.

    Raises:
        RunError: a loss or a score is not finite.
    """
    needs = needs_of(metrics, engine, settings)
    shapes: dict[str, Sequence[int]] = {name: tuple(parameter.shape) for name, parameter in parameters.items()}

    def empty() -> Rankings:
        return {metric: Ranking(shapes, k, per_layer=False) for metric in metrics}

    def top_of(members: list[int], *half: int) -> tuple[Rankings, Rankings]:
        rankings, null = empty(), empty()
        _, stream = engine.sensitivities(model, [sequences[i] for i in members], list(parameters), needs, settings)
        for sensitivity in stream:
            _update(rankings, sensitivity)
            _update(null, dealt_anew(sensitivity, [seed, *half]))
        return rankings, null

    for split in range(n_splits):
        one, other = halves(len(sequences), seed, split)
        first, null_first = top_of(one, split, 0)
        second, null_second = top_of(other, split, 1)
        yield Halves(first, second, null_first, null_second)


def _update(rankings: Rankings, sensitivity: Sensitivity) -> None:
    for metric, ranking in rankings.items():
        ranking.update(sensitivity.name, sensitivity.weight, scores_of(metric, sensitivity))


def dealt_anew(sensitivity: Sensitivity, seed: Sequence[int]) -> Sensitivity:
    """The same weights, each with what another weight of the parameter has.

    Rows and columns are put in a random order, the same for all fields. Any weight then gets what any other has with
    the same probability, and nothing larger than the parameter is needed for it.

    Args:
        sensitivity: of one parameter.
        seed: of the order, which besides depends on the parameter's name alone.
    """
    generator = np.random.default_rng([*seed, *f"null/{sensitivity.name}".encode()])
    shape, device = sensitivity.weight.shape, sensitivity.weight.device
    orders = [torch.from_numpy(generator.permutation(size)).to(device) for size in shape]
    fields: dict[str, Any] = {}
    for name, values in vars(sensitivity).items():
        if isinstance(values, Tensor) and name != "weight":
            for axis, order in enumerate(orders):
                values = values.index_select(axis, order)
            fields[name] = values
    return replace(sensitivity, **fields)


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
        for pair in _pairs(full, splits):
            row: dict[str, object] = {"kind": pair.kind, "metric": pair.metric, "other": pair.other, "k": k}
            row |= {"seed": pair.seeds[0], "other_seed": pair.seeds[1], "jaccard_chance": chance}
            row["jaccard_null"] = np.nan
            if pair.null is not None:
                row["jaccard_null"] = overlap(*(places(ranking, k) for ranking in pair.null))["jaccard"]
            rows.append(row | overlap(places(pair.one, k), places(pair.two, k)))
    return pd.DataFrame(rows, columns=list(STABILITY.columns)).astype({"seed": "Int64", "other_seed": "Int64"})


class _Pair(NamedTuple):
    """Two rankings to compare, and the same two under the null."""

    kind: str
    metric: str
    other: str
    seeds: tuple[int | None, int | None]
    one: Ranking
    two: Ranking
    null: tuple[Ranking, Ranking] | None


def _pairs(full: Mapping[str, Ranking], splits: Sequence[Halves]) -> Iterator[_Pair]:
    """Halves of each split, first halves of two splits, and pairs of metrics, which have no null."""
    for metric in full:
        for seed, split in enumerate(splits):
            null = (split.null_first[metric], split.null_second[metric])
            yield _Pair("halves", metric, metric, (seed, seed), split.first[metric], split.second[metric], null)
        for (seed, one), (other_seed, two) in combinations(enumerate(splits), 2):
            null = (one.null_first[metric], two.null_first[metric])
            yield _Pair("seeds", metric, metric, (seed, other_seed), one.first[metric], two.first[metric], null)
    for metric, other in combinations(full, 2):
        yield _Pair("metrics", metric, other, (None, None), full[metric], full[other], None)


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
