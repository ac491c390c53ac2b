"""The exact top-K of scores that arrive one parameter at a time.

What is kept are arrays of at most K entries for each parameter (for all of them together where no ranking by
parameter is asked for), never an object per weight. Equal scores are ordered by (parameter order, row, col),
so a ranking has one result, whatever the order in which the parameters arrive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from llm_perturb.evaluation.parameters import layer_of
from torch import Tensor

from critical_weight_analysis.highest_scores import positions_of_highest, top_indices
from critical_weight_analysis.layerwise.saved_state import State, columns_of, rows_by_parameter

_COLUMNS = {"parameter": torch.int64, "index": torch.int64, "value": torch.float64, "score": torch.float64}


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
    return ordered.take(positions_of_highest(ordered.score, k))
