"""A few weights of every parameter with the scores of all metrics: what the metrics are compared on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from llm_perturb.weights import layer_of
from torch import Tensor

from critical_weight_analysis.metrics import FORMULAS, Sensitivity
from critical_weight_analysis.ranking import top_indices

N_TOP = 2  # of each parameter, by each metric
N_DRAWN = 2  # of each parameter, uniformly at random
N_HEAD = 10  # of all weights together, by each metric
_SEED = 0
_BLOCK = 1 << 12  # scores whose maximum stands for them while the highest few are looked for


def highest_few(scores: Tensor, k: int) -> Tensor:
    """What ``top_indices`` returns, for a small k in little more than one reading of the scores.

    One of the k highest weights lies in one of the k blocks of highest maximum, the earlier block going first
    where maxima are equal.
    """
    flat = scores.detach().reshape(-1)
    n_blocks = len(flat) // _BLOCK
    maxima = flat[: n_blocks * _BLOCK].view(n_blocks, _BLOCK).amax(dim=1)
    blocks = top_indices(maxima, k).sort().values
    inside = (blocks[:, None] * _BLOCK + torch.arange(_BLOCK)).reshape(-1)
    candidates = torch.cat([inside, torch.arange(n_blocks * _BLOCK, len(flat))])
    return candidates[top_indices(flat[candidates.to(flat.device)], k)]


@dataclass(frozen=True)
class _Part:
    """Weights of one parameter in the order of their flat indices; ``certain``: not only as candidates for the head."""

    index: np.ndarray  # (m,)
    value: np.ndarray  # (m,)
    scores: np.ndarray  # (m, number of metrics)
    certain: np.ndarray  # (m,)


class Sample:
    """Collects the rows of SAMPLED_WEIGHTS.

    Of each parameter the two highest by each metric and two drawn at random, and of all weights together the
    ten highest by each metric; each with the scores of all metrics.

    Args:
        shapes: the shape of every parameter to come, in parameter order.
        metrics: the metrics of the run.
    """

    def __init__(self, shapes: dict[str, Sequence[int]], metrics: Sequence[str]) -> None:
        self._shapes, self._metrics = shapes, list(metrics)
        self._parts: dict[str, _Part] = {}

    def update(self, sensitivity: Sensitivity, highest: Sequence[Tensor]) -> None:
        """Take in one parameter.

        Args:
            sensitivity: of the parameter.
            highest: by each metric the ``N_HEAD`` highest of its weights, as ``highest_few`` gives them.
        """
        drawn = _drawn(sensitivity.name, sensitivity.weight.numel())
        certain = torch.cat([*(index[:N_TOP] for index in highest), drawn]).unique()
        index = torch.cat([*highest, drawn]).unique()
        here = _at(sensitivity, index)
        scores = torch.stack([FORMULAS[metric](here).double().cpu() for metric in self._metrics], dim=1)
        self._parts[sensitivity.name] = _Part(
            index.numpy(),
            here.weight.double().cpu().numpy(),
            scores.numpy(),
            torch.isin(index, certain).numpy(),
        )

    def table(self) -> pd.DataFrame:
        """The rows, in parameter order, then by row and col; a column ``score_<metric>`` for each metric."""
        frame = pd.concat([self._rows(name) for name in self._shapes if name in self._parts], ignore_index=True)
        kept = frame.pop("certain").to_numpy(copy=True)
        for metric in self._metrics:
            kept[top_indices(torch.tensor(frame[f"score_{metric}"].to_numpy()), N_HEAD).numpy()] = True
        return frame[kept].reset_index(drop=True)

    def _rows(self, name: str) -> pd.DataFrame:
        part, shape = self._parts[name], self._shapes[name]
        row, col = np.divmod(part.index, int(np.prod(shape[1:], dtype=np.int64)))
        place = {"layer": layer_of(name), "parameter": name, "row": row, "col": pd.array(col, dtype="Int64")}
        scores = {f"score_{metric}": part.scores[:, at] for at, metric in enumerate(self._metrics)}
        frame = pd.DataFrame(place | {"value": part.value} | scores | {"certain": part.certain})
        return frame if len(shape) > 1 else frame.assign(col=pd.array([pd.NA] * len(frame), dtype="Int64"))


def _drawn(name: str, n_weights: int) -> Tensor:
    """Flat indices of weights drawn uniformly; they depend on nothing but the parameter's name and size."""
    generator = np.random.default_rng([_SEED, *f"sampled weights/{name}".encode()])
    return torch.from_numpy(generator.choice(n_weights, size=min(N_DRAWN, n_weights), replace=False))


def _at(sensitivity: Sensitivity, index: Tensor) -> Sensitivity:
    """The same quantities at some weights only, so that all formulas can be had without all their scores."""
    tensors = {
        field: tensor.detach().reshape(-1)[index.to(tensor.device)]
        for field in ("weight", "grad", "fisher", "curvature")
        if (tensor := getattr(sensitivity, field)) is not None
    }
    return replace(sensitivity, **tensors)
