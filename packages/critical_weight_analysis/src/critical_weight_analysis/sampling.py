"""A few weights of every parameter with the scores of all metrics: what the metrics are compared on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from llm_perturb.evaluation.parameters import layer_of
from torch import Tensor

from critical_weight_analysis.layerwise.saved_state import State, StateError, columns_of, rows_by_parameter
from critical_weight_analysis.metrics import METRICS, Sensitivity

N_TOP = 2  # of each parameter, by each metric
N_DRAWN = 2  # of each parameter, uniformly at random
N_HEAD = 100  # of all weights together, by each metric, of which the rank is known exactly
N_STRATUM = 8  # of each half decade of rank among all weights, by each metric
_N_UNIFORM = 1 << 17  # drawn of all weights together, from which lower ranks are estimated
_SEED = 0
_COLUMNS = {
    "index": torch.int64,
    "value": torch.float64,
    "scores": torch.float64,
    "certain": torch.bool,
    "uniform": torch.bool,
}


@dataclass(frozen=True)
class _Part:
    """Candidates of one parameter in the order of their flat indices; ``certain``: in the table in any case."""

    index: np.ndarray  # (m,)
    value: np.ndarray  # (m,)
    scores: np.ndarray  # (m, number of metrics)
    certain: np.ndarray  # (m,)
    uniform: np.ndarray  # (m,): drawn of all weights together


class Sample:
    """Collects the rows of SAMPLED_WEIGHTS.

    Of each parameter the two highest by each metric and two drawn at random; and of all weights together, by each
    metric, ``N_STRATUM`` of every half decade of rank (1 to 3, 4 to 9, 10 to 31, ... to the last), so that the whole
    range of each metric's scores is there. Each with the scores of all metrics.

    Args:
        shapes: the shape of every parameter to come, in parameter order.
        metrics: the metrics of the run.
    """

    def __init__(self, shapes: dict[str, Sequence[int]], metrics: Sequence[str]) -> None:
        self._shapes, self._metrics = shapes, list(metrics)
        self._parts: dict[str, _Part] = {}
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()]
        self._n_weights = sum(sizes)
        generator = np.random.default_rng([_SEED, *b"sampled weights"])
        drawn = generator.choice(self._n_weights, size=min(_N_UNIFORM, self._n_weights), replace=False)
        starts = np.cumsum([0, *sizes])
        places = np.split(np.sort(drawn), np.searchsorted(np.sort(drawn), starts[1:-1]))
        self._uniform = {name: place - start for name, place, start in zip(shapes, places, starts, strict=False)}

    def update(self, sensitivity: Sensitivity, highest: Sequence[Tensor]) -> None:
        """Take in one parameter.

        Args:
            sensitivity: of the parameter.
            highest: by each metric the ``N_HEAD`` highest of its weights, as ``top_indices`` gives them.
        """
        drawn = _drawn(sensitivity.name, sensitivity.weight.numel())
        uniform = torch.from_numpy(self._uniform[sensitivity.name])
        certain = torch.cat([*(index[:N_TOP] for index in highest), drawn]).unique()
        index = torch.cat([*highest, drawn, uniform]).unique()
        here = _at(sensitivity, index)
        scores = torch.stack([METRICS[metric].score(here).double().cpu() for metric in self._metrics], dim=1)
        self._parts[sensitivity.name] = _Part(
            index.numpy(),
            here.weight.double().cpu().numpy(),
            scores.numpy(),
            torch.isin(index, certain).numpy(),
            torch.isin(index, uniform).numpy(),
        )

    def state(self) -> State:
        """The candidates of all parameters so far, one after the other, and which parameter each is of."""
        number = {name: at for at, name in enumerate(self._shapes)}
        nothing = _Part(*(torch.empty(0, dtype=dtype).numpy() for dtype in _COLUMNS.values()))
        nothing = replace(nothing, scores=nothing.scores.reshape(0, len(self._metrics)))
        parts = [nothing, *self._parts.values()]
        columns = {name: torch.from_numpy(np.concatenate([getattr(part, name) for part in parts])) for name in _COLUMNS}
        counts = [(number[name], len(part.index)) for name, part in self._parts.items()]
        numbers, lengths = torch.tensor(counts, dtype=torch.int64).reshape(-1, 2).unbind(1)
        return {"parameter": numbers.repeat_interleave(lengths), **columns}

    def restore(self, state: State) -> None:
        """Replace the candidates by those of a state.

        Raises:
            StateError: the state is of other parameters or metrics.
        """
        columns = columns_of(state, {"parameter": torch.int64, **_COLUMNS})
        rows = rows_by_parameter(columns.pop("parameter"), len(self._shapes))
        if columns["scores"].shape[1:] != (len(self._metrics),):
            raise StateError("the scores of the sample are of other metrics")
        names = list(self._shapes)
        self._parts = {
            names[number]: _Part(**{name: column[place].numpy() for name, column in columns.items()})
            for number, place in rows.items()
        }

    def table(self) -> pd.DataFrame:
        """The rows, in parameter order, then by row and col.

        For each metric a column ``score_<metric>`` and a column ``share_<metric>``: the share of all weights that
        score at least as high, 1/n for the highest and 1 for the lowest of n. It is exact for the first ``N_HEAD``
        weights (and where there are at most ``_N_UNIFORM``), else estimated from those drawn.
        """
        names = [name for name in self._shapes if name in self._parts]
        parts = [self._parts[name] for name in names]
        scores, kept, uniform = (
            np.concatenate([getattr(part, field) for part in parts]) for field in ("scores", "certain", "uniform")
        )
        ranks = [ranks_among_all(column, uniform, self._n_weights) for column in scores.T]
        for rank in ranks:
            kept[stratified(rank)] = True
        number = np.repeat(np.arange(len(parts)), [len(part.index) for part in parts])[kept]
        index, value = (np.concatenate([getattr(part, field) for part in parts])[kept] for field in ("index", "value"))
        shapes = [self._shapes[name] for name in names]
        row, col = np.divmod(index, np.array([int(np.prod(shape[1:], dtype=np.int64)) for shape in shapes])[number])
        place = {
            "layer": np.array([layer_of(name) for name in names], dtype=object)[number],
            "parameter": np.array(names, dtype=object)[number],
            "row": row,
            "col": pd.array(
                np.ma.array(col, mask=np.array([len(shape) < 2 for shape in shapes])[number]), dtype="Int64"
            ),
            "value": value,
        }
        columns = {f"score_{metric}": scores[kept, at] for at, metric in enumerate(self._metrics)}
        shares = {f"share_{m}": rank[kept] / self._n_weights for m, rank in zip(self._metrics, ranks, strict=True)}
        return pd.DataFrame(place | columns | shares)


def ranks_among_all(scores: np.ndarray, uniform: np.ndarray, n_weights: int) -> np.ndarray:
    """The rank among all weights of each candidate, from 1 = highest; equal scores in the order of the candidates.

    Where c of the u candidates drawn uniformly come no later than it, a candidate's rank is about c n / u; it is
    exact for the first ``N_HEAD``, which are all among the candidates.

    Args:
        scores: of the candidates, (m,).
        uniform: which of them were drawn uniformly from all, (m,).
        n_weights: n, the number of all weights.
    """
    order = np.argsort(-scores, kind="stable")
    position = np.arange(1, len(scores) + 1)
    estimate = np.cumsum(uniform[order]) * (n_weights / uniform.sum())
    ranks = np.empty(len(scores))
    ranks[order] = np.where(position <= N_HEAD, position, np.maximum(position, estimate))
    return ranks


def stratified(ranks: np.ndarray) -> np.ndarray:
    """Positions of at most ``N_STRATUM`` candidates of each half decade of rank, evenly spaced within it."""
    order = np.argsort(ranks, kind="stable")
    _, starts = np.unique(np.floor(2 * np.log10(ranks[order])), return_index=True)
    strata = np.split(order, starts[1:])
    return np.concatenate([s[np.unique(np.linspace(0, len(s) - 1, N_STRATUM).round().astype(int))] for s in strata])


def _drawn(name: str, n_weights: int) -> Tensor:
    """Flat indices of weights drawn uniformly; they depend on nothing but the parameter's name and size."""
    generator = np.random.default_rng([_SEED, *f"sampled weights/{name}".encode()])
    return torch.from_numpy(generator.choice(n_weights, size=min(N_DRAWN, n_weights), replace=False))


def _at(sensitivity: Sensitivity, index: Tensor) -> Sensitivity:
    """The same quantities at some weights only, so that all formulas can be had without all their scores."""
    tensors: dict[str, Any] = {
        field: tensor.detach().reshape(-1)[index.to(tensor.device)]
        for field, tensor in vars(sensitivity).items()
        if isinstance(tensor, Tensor)
    }
    return replace(sensitivity, **tensors)
