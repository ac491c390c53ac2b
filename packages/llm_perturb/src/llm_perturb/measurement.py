"""What is to be measured, one condition at a time, and what came of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from llm_perturb.evaluation.parameters import stored_transposed
from llm_perturb.evaluation.perplexity import Measured
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Target, generator


@dataclass(frozen=True)
class Condition:
    """One measurement to be made: which weights of which target, changed how.

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
        of = next(iter(self.target.parameters))  # a layer's weight and its bias are two targets of one layer
        return "|".join(
            map(
                str,
                [self.target.layer, of, self.row, self.col, self.selection, self.perturbation.label, self.k, self.seed],
            )
        )


@dataclass(frozen=True)
class Outcome:
    """What a condition did: the sequences measured with its weights perturbed; how many weights had other bits."""

    condition: Condition
    measured: Measured
    n_changed: int

    @property
    def failure(self) -> str | None:
        """Why the target must not be reported: weights that were chosen for their score have the bits they had."""
        if self.n_changed or not self.condition.selection.startswith("top_"):
            return None
        return (
            f"{self.condition.perturbation.label} of {self.condition.selection} in {self.condition.target.layer} "
            "changes no bit of the model, so its effect cannot be measured"
        )

    @property
    def losses(self) -> Tensor:
        """S_i of every sequence, float64 (n,)."""
        return self.measured.losses


def new_values(model: PreTrainedModel, condition: Condition) -> Callable[[str, Tensor, Tensor], Tensor]:
    """A function from name, tensor and flat indices to the values that the condition gives these weights."""

    def values(name: str, tensor: Tensor, index: Tensor) -> Tensor:
        rng = generator([condition.seed, "noise", name])
        return condition.perturbation.new_values(tensor, index, stored_transposed(model, name), rng)

    return values
