"""The sweep: many perturbations of one loaded model, each measured against the same baseline.

The instrument checks itself on the way: the baseline is measured again at the end and must be the same
bits, a perturbation that writes back what was there must change nothing, and weights are compared with
their saved bits after every restore.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from bridge.errors import RunError
from torch import Tensor
from transformers import PreTrainedModel

from llm_perturb.corpus import Corpus
from llm_perturb.perturbation import Perturbation, perturbed
from llm_perturb.restart import Restart
from llm_perturb.selection import Target, generator
from llm_perturb.weights import stored_transposed


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
    """What a condition did: S_i of every sequence with the weights perturbed, float64 (n,), and how many bits moved."""

    condition: Condition
    losses: Tensor
    n_changed: int


def sweep(
    model: PreTrainedModel, corpus: Corpus, conditions: Sequence[Condition], baseline: Tensor, batch_size: int = 1
) -> Iterator[Outcome]:
    """Measure the conditions, from the shallowest target to the deepest.

    Args:
        model: in eval mode; changed while a condition is measured, and restored bit for bit.
        corpus: the sequences.
        conditions: in any order.
        baseline: S_i of the unperturbed model, float64 (n,).
        batch_size: sequences at a time.

    Raises:
        RunError: the instrument does not give the same bits twice, or a top set changes no bit of the model.
    """
    restart = Restart(model, corpus.sequences, batch_size)
    depths = [restart.depth_of(list(c.target.split(c.positions))) for c in conditions]
    for depth, condition in sorted(zip(depths, conditions, strict=True), key=lambda pair: pair[0]):
        if depth != restart.boundary:
            restart.move_to(depth)
            _check_same(_apply(model, condition, restart, no_op=True).losses, baseline, "a change of nothing")
        _check_own(model, condition.target)
        outcome = _apply(model, condition, restart)
        if outcome.n_changed == 0 and condition.selection.startswith("top_"):
            raise RunError(
                f"{condition.perturbation.label} of {condition.selection} in {condition.target.layer} changes no bit "
                "of the model, so its effect cannot be measured"
            )
        yield outcome
    restart.move_to(0)
    _check_same(restart.losses(), baseline, "the unperturbed model at the end")


def _apply(model: PreTrainedModel, condition: Condition, restart: Restart, no_op: bool = False) -> Outcome:
    target, change = condition.target, condition.perturbation

    def new_values(name: str, tensor: Tensor, index: Tensor) -> Tensor:
        if no_op:
            return tensor.view(-1)[index]
        rng = generator([condition.seed, "noise", name])
        return change.new_values(tensor, index, stored_transposed(model, name), rng)

    with perturbed(target.parameters, target.split(condition.positions), new_values) as n_changed:
        return Outcome(condition, restart.losses(), n_changed)


def _check_own(model: PreTrainedModel, target: Target) -> None:
    """The tensors to be written to must be those that the model computes with."""
    for name, parameter in target.parameters.items():
        if model.get_parameter(name) is not parameter:
            raise RunError(f"{name} is not the tensor of the model that is measured, so no change of it would count")


def _check_same(losses: Tensor, baseline: Tensor, what: str) -> None:
    if not torch.equal(losses, baseline):
        worst = np.abs((losses - baseline).numpy()).max()
        raise RunError(f"the instrument fails its own check: {what} changes a loss by {worst:.3g} nats, and must by 0")
