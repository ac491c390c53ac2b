"""Single weights with the scores of all metrics, drawn with known probability: what the metrics are compared on.

Two phases. Candidates: by each metric the ``N_HEAD`` highest weights of every parameter, which are certain, and
``N_UNIFORM`` drawn uniformly of all weights together. From the candidates each weight's rank among all weights is known
(exactly for the first ``N_HEAD``) or estimated, and by these ranks ``N_ROWS`` of them are drawn over every order of
magnitude of rank (``bridge.exchange.weight_sample``). The column ``inclusion`` is the probability of both together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from bridge.exchange import layout
from bridge.exchange.weight_sample import draw_probability, draw_weights
from llm_perturb.evaluation.parameters import layer_of
from torch import Tensor

from critical_weight_analysis.layerwise.saved_state import State, StateError, columns_of, rows_by_parameter
from critical_weight_analysis.metrics import METRICS, Sensitivity

N_HEAD = 100  # of each parameter, by each metric; so many ranks among all weights are known exactly
N_UNIFORM = 1 << 17  # drawn of all weights together, from which lower ranks are estimated
N_ROWS = 4000  # of the table
_COLUMNS = {
    "index": torch.int64,
    "value": torch.float64,
    "scores": torch.float64,
    "certain": torch.bool,
}


@dataclass(frozen=True)
class _Part:
    """Candidates of one parameter in the order of their flat indices; ``certain``: among the highest by a metric."""

    index: np.ndarray  # (m,)
    value: np.ndarray  # (m,)
    scores: np.ndarray  # (m, number of metrics)
    certain: np.ndarray  # (m,)


class Sample:
    """Collects the candidates, and draws the rows of SAMPLED_WEIGHTS from them.

    Args:
        shapes: the shape of every parameter to come, in parameter order.
        metrics: the metrics of the run.
        seed: of both draws.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], metrics: Sequence[str], seed: int = 0) -> None:
        self._shapes, self._metrics, self._seed = shapes, list(metrics), seed
        self._parts: dict[str, _Part] = {}
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()]
        self._n_weights = sum(sizes)
        generator = np.random.default_rng([seed, *b"sampled weights"])
        drawn = generator.choice(self._n_weights, size=min(N_UNIFORM, self._n_weights), replace=False)
        drawn.sort()
        starts = np.cumsum([0, *sizes[:-1]])
        by_parameter = np.split(drawn, np.searchsorted(drawn, starts[1:]))
        self._uniform = {name: d - start for name, d, start in zip(shapes, by_parameter, starts, strict=True)}

    def update(self, sensitivity: Sensitivity, highest: Sequence[Tensor]) -> None:
        """Take in one parameter.

        Args:
            sensitivity: of the parameter.
            highest: by each metric the ``N_HEAD`` highest of its weights, as ``top_indices`` gives them.
        """
        uniform = torch.from_numpy(self._uniform[sensitivity.name])
        certain = torch.cat(list(highest)).unique()
        index = torch.cat([certain, uniform]).unique()
        here = _at(sensitivity, index)
        scores = torch.stack([METRICS[metric].score(here).double().cpu() for metric in self._metrics], dim=1)
        self._parts[sensitivity.name] = _Part(
            index.numpy(),
            here.weight.double().cpu().numpy(),
            scores.numpy(),
            torch.isin(index, certain).numpy(),
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

        Besides the inclusion probability each has, by each metric, a column ``score_<metric>`` and a column
        ``share_<metric>``: its rank divided by the number of all weights.
        """
        names = [name for name in self._shapes if name in self._parts]
        parts = [self._parts[name] for name in names]
        scores, certain = (np.concatenate([getattr(part, field) for part in parts]) for field in ("scores", "certain"))
        candidate = candidate_probability(certain, self._n_weights)
        ranks = np.stack([ranks_among_all(column, candidate) for column in scores.T], axis=1)
        rng = np.random.default_rng([self._seed, *b"rows of sampled weights"])
        kept, inclusion = draw_weights(draw_probability(ranks, self._n_weights), candidate, N_ROWS, rng)
        columns = {"inclusion": inclusion}
        for at, metric in enumerate(self._metrics):
            columns[layout.score_column(metric)] = scores[kept, at]
            columns[layout.share_column(metric)] = ranks[kept, at] / self._n_weights
        return pd.DataFrame(self._which(names, kept) | columns)

    def _which(self, names: Sequence[str], kept: np.ndarray) -> dict[str, object]:
        """The columns that say which weights they are, and their values.

        Args:
            names: of the parameters, in order.
            kept: positions among the candidates of all of them.
        """
        parts, shapes = [self._parts[name] for name in names], [self._shapes[name] for name in names]
        number = np.repeat(np.arange(len(parts)), [len(part.index) for part in parts])[kept]
        index, value = (np.concatenate([getattr(part, field) for part in parts])[kept] for field in ("index", "value"))
        row, col = np.divmod(index, np.array([int(np.prod(shape[1:], dtype=np.int64)) for shape in shapes])[number])
        has_no_col = np.array([len(shape) < 2 for shape in shapes])[number]
        return {
            "layer": np.array([layer_of(name) for name in names], dtype=object)[number],
            "parameter": np.array(names, dtype=object)[number],
            "row": row,
            "col": pd.array(np.ma.array(col, mask=has_no_col), dtype="Int64"),
            "value": value,
        }


def candidate_probability(certain: np.ndarray, n_weights: int) -> np.ndarray:
    """Probability with which each candidate became one: 1, or m / (N - H) for the m drawn of those outside the heads.

    A uniform draw holds any m of the N - H weights outside the heads with the same probability.

    Args:
        certain: whether a candidate is one of the H in the heads, (number of candidates,).
        n_weights: N.
    """
    n_certain = int(certain.sum())
    drawn = (len(certain) - n_certain) / max(n_weights - n_certain, 1)
    return np.where(certain, 1.0, drawn)


def ranks_among_all(scores: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """The rank among all weights of each candidate, from 1 = highest; equal scores in the order of the candidates.

    A candidate stands for 1/pi weights around its score. Its rank is the sum of 1/pi over those before it and the
    middle of its own, (1/pi + 1) / 2: exact while all candidates so far are certain.

    Args:
        scores: of the candidates, (m,).
        candidate: pi, the probability of being one, (m,).
    """
    order = np.argsort(-scores, kind="stable")
    stands_for = 1 / candidate[order]
    ranks = np.empty(len(scores))
    ranks[order] = np.cumsum(stands_for) - (stands_for - 1) / 2
    return ranks


def _at(sensitivity: Sensitivity, index: Tensor) -> Sensitivity:
    """The same quantities at some weights only, to which the formulas are applied without scoring all weights."""
    tensors: dict[str, Any] = {
        field: tensor.detach().reshape(-1)[index.to(tensor.device)]
        for field, tensor in vars(sensitivity).items()
        if isinstance(tensor, Tensor)
    }
    return replace(sensitivity, **tensors)
