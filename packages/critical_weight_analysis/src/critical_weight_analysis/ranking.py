"""The exact top-K of scores that arrive one parameter at a time.

What is kept are arrays of at most K entries for each parameter (for all of them together where no ranking by
parameter is asked for), never an object per weight. Equal scores are ordered by (parameter order, row, col),
so a ranking has one result, whatever the order in which the parameters arrive.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from llm_perturb.evaluation.parameters import layer_of
from torch import Tensor

from critical_weight_analysis.layerwise.saved_state import State, columns_of, rows_by_parameter

_COLUMNS = {"parameter": torch.int64, "index": torch.int64, "value": torch.float64, "score": torch.float64}
_CHUNK = 1 << 22  # scores looked at together: bounds the memory of the selection, changes no result
_SAMPLE = 1 << 12  # scores that stand for all while a percentile is looked for


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
            candidates = where(operator.gt, chunk, best.min())
        best = torch.cat([best, chunk[candidates]])
        index = torch.cat([index, candidates + start])
        keep = _positions_of_highest(best, k)
        best, index = best[keep], index[keep]
    return index[torch.argsort(best, descending=True, stable=True)].cpu()


def _few_candidates(flat: Tensor, k: int) -> Tensor | None:
    """Indices, ascending, that the K highest are among; None where that does not narrow the search.

    Of equal blocks, take the maxima: the K-th highest of them is reached by at least K scores, so nothing below
    it is wanted, and only blocks whose maximum reaches it are looked into.
    """
    size = next((size for size in (1024, 256, 64, 16) if 8 * k * size <= len(flat)), 16)
    n_blocks = len(flat) // size
    if n_blocks < 2 * k:
        return None
    maxima = flat[: n_blocks * size].view(n_blocks, size).amax(1)
    bound = maxima.topk(k).values[-1]
    blocks = where(operator.ge, maxima, bound)
    if len(blocks) <= 64 * k:
        inside = (blocks[:, None] * size + torch.arange(size, device=flat.device)).reshape(-1)
        candidates = torch.cat([inside, torch.arange(n_blocks * size, len(flat), device=flat.device)])
        return candidates[where(operator.ge, flat[candidates], bound)]
    above = where(operator.gt, flat, bound)
    if len(above) >= k:
        return None
    return torch.cat([above, _first(flat, bound, k - len(above))]).sort().values  # a mass of equal ones


def _first(flat: Tensor, value: Tensor, n: int) -> Tensor:
    """Where scores (m,) equal a value for the first n times."""
    found = [torch.empty(0, dtype=torch.int64, device=flat.device)]
    for start in range(0, len(flat), _CHUNK):
        found.append(where(operator.eq, flat[start : start + _CHUNK], value)[:n] + start)
        n -= len(found[-1])
        if n == 0:
            break
    return torch.cat(found)


def where(comparison: Callable[[Any, Any], Any], flat: Tensor, bound: Tensor | float) -> Tensor:
    """Indices, ascending, of the scores (m,) that ``comparison`` (operator.ge, ...) with the bound finds true.

    NumPy's comparison and search are several times faster than torch's on a CPU.
    """
    if flat.device.type != "cpu":
        true: Tensor = comparison(flat, bound)
        return true.nonzero()[:, 0]
    scores = flat.numpy()
    return torch.from_numpy(np.flatnonzero(comparison(scores, np.asarray(bound, dtype=scores.dtype))))


def kth_smallest(scores: Tensor, k: int) -> float:
    """The k-th smallest of scores of any shape, k from 1.

    For a high k a value of a small sample that should lie somewhat below it leaves few to be sorted; if it does not
    lie below, all are (after Floyd & Rivest 1975).
    """
    flat = scores.detach().reshape(-1)
    if len(flat) > 16 * _SAMPLE and 2 * k > len(flat):
        sample = flat[:: len(flat) // _SAMPLE].sort().values
        upper = flat[where(operator.ge, flat, sample[(k * len(sample)) // len(flat) - len(sample) // 128])]
        k, flat = (k - len(flat) + len(upper), upper) if k > len(flat) - len(upper) else (k, flat)
    return flat.kthvalue(k).values.item()


def _positions_of_highest(scores: Tensor, k: int) -> Tensor:
    """Positions of the K highest of scores (m,), ascending; of equal ones those that come first."""
    if len(scores) <= k:
        return torch.arange(len(scores), device=scores.device)
    threshold = kth_smallest(scores, len(scores) - k + 1)
    above = where(operator.gt, scores, threshold)
    level = where(operator.eq, scores, threshold)[: k - len(above)]
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

    def state(self) -> State:
        """The four arrays by name."""
        return dict(zip(_COLUMNS, self.columns(), strict=True))

    @staticmethod
    def of_state(state: State) -> "Entries":
        """Entries from what ``state`` gave.

        Raises:
            StateError: they are not four arrays of one length.
        """
        return Entries(**columns_of(state, _COLUMNS))


class Ranking:
    """The exact top-K of one metric, over all parameters and, if wanted, within each of them.

    Args:
        shapes: the shape of every parameter to come, in parameter order.
        k: the most that will be asked for.
        per_layer: whether each parameter's own top-K is kept as well.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], k: int, per_layer: bool = True) -> None:
        self.k, self.per_layer = k, per_layer
        self._order = {name: number for number, name in enumerate(shapes)}
        names = list(shapes)
        self._names = np.array(names, dtype=object)
        self._layers = np.array([layer_of(name) for name in names], dtype=object)
        self._n_columns = np.array([int(np.prod(shape[1:], dtype=np.int64)) for shape in shapes.values()])
        self._one_dimensional = np.array([len(shape) < 2 for shape in shapes.values()])
        self._parts: dict[int, Entries] = {}  # by parameter, or all under -1

    def update(self, name: str, weight: Tensor, scores: Tensor, index: Tensor | None = None) -> None:
        """Take in one parameter: its weights and their scores, both of its stored shape. Once for each parameter.

        Args:
            name: of the parameter.
            weight: its weights.
            scores: of the same shape.
            index: the first K of ``top_indices`` of the scores, where they are known.
        """
        index = top_indices(scores, self.k) if index is None else index
        self.add(name, index, gather(weight, index), gather(scores, index))

    def add(self, name: str, index: Tensor, value: Tensor, score: Tensor) -> None:
        """Take in those weights of one parameter that can be among its K highest: four arrays (m,)."""
        number = self._order[name]
        part = Entries(torch.full_like(index, number), index, value, score)
        if self.per_layer:
            assert number not in self._parts, f"{name} came twice"
            self._parts[number] = part
        else:
            held = [self._parts[-1]] if self._parts else []
            self._parts = {-1: _highest(Entries.join([*held, part]), self.k)}

    def state(self) -> State:
        """The entries of all parts, one part after the other."""
        nothing = Entries(*(torch.empty(0, dtype=dtype) for dtype in _COLUMNS.values()))
        return Entries.join([nothing, *self._parts.values()]).state()

    def restore(self, state: State) -> None:
        """Replace all entries by those of a state.

        Raises:
            StateError: the state is of other parameters.
        """
        entries = Entries.of_state(state)
        if self.per_layer:
            rows = rows_by_parameter(entries.parameter, len(self._order))
        else:
            rows_by_parameter(entries.parameter.unique(), len(self._order))
            rows = {-1: slice(None)} if len(entries) else {}
        self._parts = {number: entries.take(place) for number, place in rows.items()}

    @property
    def bound(self) -> float:
        """What a score must reach to be among the K highest of all so far; -inf while fewer are held."""
        held = self._parts.get(-1)
        return -torch.inf if held is None or len(held) < self.k else held.score.min().item()

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


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """The entries at flat indices, float64 on the CPU: exact for every narrower dtype."""
    return tensor.detach().reshape(-1)[index.to(tensor.device)].double().cpu()


def _highest(entries: Entries, k: int) -> Entries:
    """The K highest, ordered by (parameter, index); of equal scores those that come first in this order."""
    order = np.lexsort((entries.index.numpy(), entries.parameter.numpy()))
    ordered = entries.take(torch.from_numpy(order))
    return ordered.take(_positions_of_highest(ordered.score, k))
