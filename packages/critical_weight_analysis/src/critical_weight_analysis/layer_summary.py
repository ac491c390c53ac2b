"""How the scores of each parameter are distributed: one row a parameter."""

import pandas as pd
import torch
from bridge.exchange.layout import in_top_column
from llm_perturb.evaluation.parameters import layer_of
from torch import Tensor

from critical_weight_analysis.highest_scores import kth_smallest
from critical_weight_analysis.layerwise.saved_state import State, columns_of, rows_by_parameter

_NUMBERS = {"n_weights": torch.int64} | dict.fromkeys(
    ["score_sum", "score_mean", "score_max", "score_p99"], torch.float64
)


def p99(scores: Tensor) -> float:
    """The 99th percentile: the smallest score that at least 99 % of the scores do not exceed.

    ``torch.quantile`` interpolates and takes at most 2^24 elements; this is a score that occurs.
    """
    return kth_smallest(scores, -(-99 * scores.numel() // 100))


class Summary:
    """Collects the rows of LAYER_SUMMARY for one metric.

    Args:
        names: every parameter to come, in the order of the rows.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._rows: dict[str, dict[str, str | int | float]] = {}

    def update(self, name: str, scores: Tensor) -> None:
        """Take in the scores of one parameter, of any shape."""
        rows = scores.sum(-1) if scores.ndim > 1 else scores  # short sums may be narrow, the long one not
        total = rows.sum(dtype=torch.float64).item()
        self._rows[name] = {
            "layer": layer_of(name),
            "parameter": name,
            "n_weights": scores.numel(),
            "score_sum": total,
            "score_mean": total / scores.numel(),
            "score_max": scores.amax().item(),
            "score_p99": p99(scores),
        }

    def state(self) -> State:
        """The numbers of the rows so far, and which parameters they are of."""
        rows = self._rows.values()
        numbers = {key: torch.tensor([row[key] for row in rows], dtype=dtype) for key, dtype in _NUMBERS.items()}
        order = {name: number for number, name in enumerate(self._names)}
        return {"parameter": torch.tensor([order[name] for name in self._rows], dtype=torch.int64), **numbers}

    def restore(self, state: State) -> None:
        """Replace the rows by those of a state.

        Raises:
            StateError: the state is of other parameters.
        """
        columns = columns_of(state, {"parameter": torch.int64, **_NUMBERS})
        rows_by_parameter(columns["parameter"], len(self._names))
        rows = {}
        for number, *values in zip(*(column.tolist() for column in columns.values()), strict=True):
            name = self._names[number]
            rows[name] = {"layer": layer_of(name), "parameter": name, **dict(zip(_NUMBERS, values, strict=True))}
        self._rows = rows

    def table(self, tops: dict[int, pd.DataFrame]) -> pd.DataFrame:
        """The rows, each with the number of its weights that every global top-K holds.

        Args:
            tops: K to the rows of that global top-K.
        """
        frame = pd.DataFrame([self._rows[name] for name in self._names])
        for k, top in tops.items():
            counts = top["parameter"].value_counts()
            frame[in_top_column(k)] = frame["parameter"].map(counts).fillna(0).astype("int64")
        return frame
