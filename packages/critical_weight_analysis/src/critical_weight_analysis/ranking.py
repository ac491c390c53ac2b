"""The exact top-K of scores that arrive one parameter at a time.

What is kept are arrays of at most K entries for each parameter (for all of them together where no ranking by
parameter is asked for), never an object per weight. Equal scores are ordered by (parameter order, row, col),
so a ranking has one result, whatever the order in which the parameters arrive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from llm_perturb.weights import layer_of
from torch import Tensor

_CHUNK = 1 << 22  # scores looked at together: bounds the memory of the selection, changes no result


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Flat indices of the K highest scores, highest first; equal scores in the order of their indices.

    ``torch.topk`` leaves open which of several equal scores it takes. Here a score replaces one that was found
    earlier only if it is strictly higher.

    Args:
        scores: any shape, finite.
        k: how many; all of them if there are fewer.

    Returns:
        int64 (min(k, numel),), on the CPU.
    """
    flat = scores.detach().reshape(-1)
    few = _few_candidates(flat, k)
    if few is not None:
        return few[torch.argsort(flat[few], descending=True, stable=True)[:k]].cpu()
    index = torch.empty(0, dtype=torch.int64, device=flat.device)
    best = torch.empty(0, dtype=flat.dtype, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if len(best) < k:
            candidates = torch.arange(len(chunk), device=flat.device)
        else:
            candidates = (chunk > best.min()).nonzero()[:, 0]
        best = torch.cat([best, chunk[candidates]])
        index = torch.cat([index, candidates + start])
        keep = _positions_of_highest(best, k)
        best, index = best[keep], index[keep]
    return index[torch.argsort(best, descending=True, stable=True)].cpu()


def _few_candidates(flat: Tensor, k: int) -> Tensor | None:
    """Indices, ascending, that the K highest are among; None where that does not narrow the search.

    Of equal blocks, take the maxima: the K-th highest of them is reached by at least K scores, so nothing below
    it is wanted.
    """
    size = max(1, len(flat) // (4 * k))
    n_blocks = len(flat) // size
    if n_blocks < k:
        return None
    bound = flat[: n_blocks * size].view(n_blocks, size).amax(1).topk(k).values[-1]
    reached = flat >= bound
    if int(reached.count_nonzero()) <= 64 * k:
        return reached.nonzero()[:, 0]
    above = flat > bound
    n_above = int(above.count_nonzero())
    if n_above >= k:
        return None
    return torch.cat([above.nonzero()[:, 0], _first(flat == bound, k - n_above)]).sort().values  # a mass of equal ones


def _first(mask: Tensor, n: int) -> Tensor:
    """Where a mask (m,) is true for the first n times."""
    found = [torch.empty(0, dtype=torch.int64, device=mask.device)]
    for start in range(0, len(mask), _CHUNK):
        found.append(mask[start : start + _CHUNK].nonzero()[:n, 0] + start)
        n -= len(found[-1])
        if n == 0:
            break
    return torch.cat(found)


def kth_smallest(scores: Tensor, k: int) -> float:
    """The k-th smallest of scores of any shape, k from 1."""
    flat = scores.detach().reshape(-1)
    if flat.device.type != "cpu":
        return flat.kthvalue(k).values.item()
    # numpy partitions several times as fast as torch.kthvalue, but for one value that fills much of the array,
    # as the zeros of an embedding's unseen tokens do: the lowest value is counted instead
    values = flat.numpy()
    lowest = values.min()
    rest = values[values > lowest]
    n_lowest = len(values) - len(rest)
    if k <= n_lowest:
        return float(lowest)
    rest.partition(k - n_lowest - 1)
    return float(rest[k - n_lowest - 1])


def _positions_of_highest(scores: Tensor, k: int) -> Tensor:
    """Positions of the K highest of scores (m,), ascending; of equal ones those that come first."""
    if len(scores) <= k:
        return torch.arange(len(scores), device=scores.device)
    threshold = kth_smallest(scores, len(scores) - k + 1)
    above = (scores > threshold).nonzero()[:, 0]
    level = (scores == threshold).nonzero()[: k - len(above), 0]
    return torch.cat([above, level]).sort().values


@dataclass(frozen=True)
class Entries:
    """Weights by parameter number, flat index, value and score: four arrays of one length (m,)."""

    parameter: Tensor
    index: Tensor
    value: Tensor
    score: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def take(self, positions: Tensor | slice) -> "Entries":
        """The entries at some positions."""
        return Entries(*(column[positions] for column in self.columns()))

    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four arrays."""
        return self.parameter, self.index, self.value, self.score

    @staticmethod
    def join(parts: Sequence["Entries"]) -> "Entries":
        """Several entries in a row."""
        return Entries(*(torch.cat(columns) for columns in zip(*(part.columns() for part in parts), strict=True)))


class Ranking:
    """The exact top-K of one metric, over all parameters and, if wanted, within each of them.

    Args:
        shapes: the shape of every parameter to come, in parameter order.
        k: the most that will be asked for.
        per_layer: whether each parameter's own top-K is kept as well.
    """

    def __init__(self, shapes: dict[str, Sequence[int]], k: int, per_layer: bool = True) -> None:
        self.k, self.per_layer = k, per_layer
        self._order = {name: number for number, name in enumerate(shapes)}
        names = list(shapes)
        self._names = np.array(names, dtype=object)
        self._layers = np.array([layer_of(name) for name in names], dtype=object)
        self._n_columns = np.array([int(np.prod(shape[1:], dtype=np.int64)) for shape in shapes.values()])
        self._one_dimensional = np.array([len(shape) < 2 for shape in shapes.values()])
        self._parts: dict[int, Entries] = {}  # by parameter, or all under -1

    def update(self, name: str, weight: Tensor, scores: Tensor) -> None:
        """Take in one parameter: its weights and their scores, both of its stored shape. Once for each parameter."""
        number = self._order[name]
        held = self._parts.get(-1)  # of all parameters, where only their common top-K is kept
        index = top_indices(scores, self.k) if held is None else _that_can_enter(held, scores, self.k)
        part = Entries(
            torch.full_like(index, number),
            index,
            gather(weight, index),
            gather(scores, index),
        )
        if self.per_layer:
            assert number not in self._parts, f"{name} came twice"
            self._parts[number] = part
        else:
            self._parts = {-1: _highest(Entries.join([part] if held is None else [held, part]), self.k)}

    def top(self, k: int) -> pd.DataFrame:
        """The K highest of all weights, or all if there are fewer, as rows of TOP_WEIGHTS."""
        best = self.best(k)
        return self.rows(best, np.arange(1, len(best) + 1))

    def best(self, k: int) -> Entries:
        """The same as arrays, highest first."""
        assert k <= self.k
        best = _highest(Entries.join(list(self._parts.values())), k)
        return best.take(torch.argsort(best.score, descending=True, stable=True))

    def top_per_layer(self, k: int) -> pd.DataFrame:
        """The K highest of each parameter, in parameter order, ranked within it, as rows of TOP_WEIGHTS."""
        assert k <= self.k and self.per_layer
        parts = [self._parts[number].take(slice(k)) for number in sorted(self._parts)]
        ranks = np.concatenate([np.arange(1, len(part) + 1) for part in parts])
        return self.rows(Entries.join(parts), ranks)

    def rows(self, entries: Entries, ranks: np.ndarray) -> pd.DataFrame:
        """Entries and their ranks, as rows of TOP_WEIGHTS."""
        number, index, value, score = (column.numpy() for column in entries.columns())
        row, col = np.divmod(index, self._n_columns[number])
        return pd.DataFrame(
            {
                "rank": ranks,
                "layer": self._layers[number],
                "parameter": self._names[number],
                "row": row,
                "col": pd.array(col, dtype="Int64"),
                "value": value,
                "score": score,
            }
        ).assign(col=lambda frame: frame["col"].mask(self._one_dimensional[number]))


def _that_can_enter(held: Entries, scores: Tensor, k: int) -> Tensor:
    """Flat indices, on the CPU, of the few scores that reach the lowest of the K held; of more, the K highest."""
    if len(held) < k:
        return top_indices(scores, k)
    reach = scores.detach().reshape(-1) >= held.score.min().item()
    return reach.nonzero()[:, 0].cpu() if int(reach.count_nonzero()) <= 64 * k else top_indices(scores, k)


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """The entries at flat indices, float64 on the CPU: exact for every narrower dtype."""
    return tensor.detach().reshape(-1)[index.to(tensor.device)].double().cpu()


def _highest(entries: Entries, k: int) -> Entries:
    """The K highest, ordered by (parameter, index); of equal scores those that come first in this order."""
    order = np.lexsort((entries.index.numpy(), entries.parameter.numpy()))
    ordered = entries.take(torch.from_numpy(order))
    return ordered.take(_positions_of_highest(ordered.score, k))
