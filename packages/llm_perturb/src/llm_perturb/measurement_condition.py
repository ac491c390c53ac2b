"""A condition: which weights of which target are changed, and how; and the outcome of its measurement."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bridge.exchange import layout
from torch import Tensor
from transformers import PreTrainedModel

from llm_perturb.evaluation.perplexity import Measured
from llm_perturb.output_channels import channel_axes
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Target, generator


@dataclass(frozen=True)
class Condition:
    """One measurement: which weights of which target are changed, and how.

    Attributes:
        target: the tensors.
        selection: ``top_<metric>``, ``bottom_<metric>``, ``matched_<metric>``, ``random``, ``row``, ``col``,
            ``random_row``, ``random_col`` or ``weight``.
        perturbation: the change.
        k: how many weights were asked for.
        seed: of a random selection or random change, else None.
        positions: the weights, int64, in the order of selection.
        score_sum: their scores added, NaN where they have none.
        row: of the one row or weight that is perturbed, else None.
        col: likewise.
    """

    target: Target
    selection: str
    perturbation: Perturbation
    k: int
    seed: int | None
    positions: Tensor
    score_sum: float = math.nan
    row: int | None = None
    col: int | None = None

    @property
    def key(self) -> str:
        """What tells this condition from every other of a run."""
        parts = [
            self.target.layer,
            next(iter(self.target.parameters)),  # a layer's weight and its bias are two targets of one layer
            self.row,
            self.col,
            self.selection,
            self.perturbation.label,
            self.k,
            self.seed,
        ]
        return "|".join(map(str, parts))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a condition.

    Attributes:
        condition: what was measured.
        measured: the sequences under the perturbed model.
        n_changed: how many weights had another value than before.
    """

    condition: Condition
    measured: Measured
    n_changed: int

    @property
    def failure(self) -> str | None:
        """Why the target must not be reported: weights that were chosen for their score have the values they had."""
        if self.n_changed or not layout.is_top(self.condition.selection):
            return None
        return (
            f"{self.condition.perturbation.label} of {self.condition.selection} in {self.condition.target.layer} "
            "changes no weight of the model, so its effect cannot be measured"
        )

    @property
    def losses(self) -> Tensor:
        """S_i of every sequence, float64 (n,)."""
        return self.measured.losses


def new_values(model: PreTrainedModel, condition: Condition) -> Callable[[str, Tensor, Tensor], Tensor]:
    """The new values of a condition's weights; see ``values_under``."""
    return values_under(condition.perturbation, condition.seed, model)


def values_under(
    perturbation: Perturbation, seed: int | None, model: PreTrainedModel
) -> Callable[[str, Tensor, Tensor], Tensor]:
    """A function from name, tensor and flat indices (m,) to the new values (m,) of these weights.

    Args:
        perturbation: the change.
        seed: of ``gaussian_noise``.
        model: tells which weights form an output channel, for ``quantize``.
    """

    def values(name: str, tensor: Tensor, index: Tensor) -> Tensor:
        rng = generator([seed, "noise", name])
        axes = channel_axes(model, name) if perturbation.kind == "quantize" else ()
        return perturbation.new_values(tensor, index, axes, rng)

    return values
