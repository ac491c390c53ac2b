"""The sweep: many perturbations of one loaded model, each measured against the same baseline.

The instrument checks itself on the way: the baseline is measured again at the end and must be the same
bits, a perturbation that writes back what was there must change nothing, weights are compared with their
saved bits after every restore, and copies are compared with a model that was really changed.
"""

from collections.abc import Iterator, Sequence

import torch
from bridge.exchange.errors import RunError
from torch import Tensor
from transformers import PreTrainedModel

from llm_perturb.batched_single_weights import TOLERANCE, Change, Copies, Unit, change_of, measure_copies, unchanged
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.perplexity import Reference
from llm_perturb.measurement import Condition, Outcome, new_values
from llm_perturb.perturbation import perturbed
from llm_perturb.selection import Target
from llm_perturb.suffix_forward import Restart


def sweep(
    model: PreTrainedModel,
    corpus: Corpus,
    units: Sequence[Unit],
    baseline: Tensor,
    batch_size: int = 1,
    reference: Reference | None = None,
) -> Iterator[Outcome]:
    """Measure conditions, from the shallowest target to the deepest.

    Args:
        model: in eval mode; changed while a condition is measured, and restored bit for bit.
        corpus: the sequences.
        units: conditions, and single weights that are measured together; in any order.
        baseline: S_i of the unperturbed model, float64 (n,).
        batch_size: sequences at a time.
        reference: the unperturbed predictions, where the divergence from them is wanted.

    Raises:
        RunError: the instrument does not give the same bits twice.
    """
    restart = Restart(model, corpus.sequences, batch_size, reference)
    checked: set[tuple[int, type]] = set()
    for depth, unit in sorted(((_depth(restart, unit), unit) for unit in units), key=lambda pair: pair[0]):
        restart.move_to(depth)
        first = (depth, type(unit)) not in checked
        checked.add((depth, type(unit)))
        for condition in unit.conditions if isinstance(unit, Copies) else [unit]:
            _check_own(model, condition.target)
        if isinstance(unit, Copies):
            yield from _measure_together(model, unit, restart, baseline, first)
        else:
            if first and depth:
                _check_same(_apply(model, unit, restart, no_op=True).losses, baseline, "a change of nothing")
            yield _apply(model, unit, restart)
    restart.move_to(0)
    _check_same(restart.losses(), baseline, "the unperturbed model at the end")


def _depth(restart: Restart, unit: Unit) -> int:
    if isinstance(unit, Copies):
        return min(_depth(restart, condition) for condition in unit.conditions)
    return restart.depth_of(list(unit.target.split(unit.positions)))


def _measure_together(
    model: PreTrainedModel, copies: Copies, restart: Restart, baseline: Tensor, check: bool
) -> Iterator[Outcome]:
    changes = [change_of(model, condition) for condition in copies.conditions]
    moving = [at for at, change in enumerate(changes) if change.changes_bits]
    found = dict(zip(moving, measure_copies(restart, [changes[at] for at in moving]), strict=True))
    if check and moving:
        largest = max(moving, key=lambda at: _size(found[at].losses - baseline))
        chosen = copies.conditions[largest], changes[largest], found[largest].losses
        _check_copy(model, *chosen, restart, baseline)
    for at, condition in enumerate(copies.conditions):
        yield Outcome(condition, found[at], 1) if at in found else _apply(model, condition, restart)


def _size(differences: Tensor) -> float:
    return differences.sum().abs().nan_to_num(torch.inf).item()


def _check_copy(
    model: PreTrainedModel, condition: Condition, change: Change, found: Tensor, restart: Restart, baseline: Tensor
) -> None:
    """On one batch: a change of nothing against the baseline, and a copy against the model that was really changed."""
    number = len(restart.batches) // 2
    chosen = torch.tensor(restart.batches[number]).sort()
    n_tokens = torch.tensor([len(restart.sequences[i]) - 1 for i in chosen.values])
    before = baseline[chosen.values]
    (nothing,) = measure_copies(restart, [unchanged(change)], number)
    _check_close(nothing.losses, before, before, n_tokens, "a change of nothing")
    parts = condition.target.split(condition.positions)
    with perturbed(condition.target.parameters, parts, new_values(model, condition)):
        really = restart.measure_batch(number).losses[chosen.indices]
    _check_close(found[chosen.values], really, before, n_tokens, condition.key)


def _check_close(found: Tensor, expected: Tensor, before: Tensor, n_tokens: Tensor, what: str) -> None:
    allowed = TOLERANCE * n_tokens + 1e-3 * (expected - before).abs()  # a broken model amplifies rounding
    same = (found - expected).abs() <= allowed
    if not (same | ~(found.isfinite() | expected.isfinite())).all():
        worst = ((found - expected).abs() / n_tokens).max().item()
        raise RunError(
            f"the instrument fails its own check: {what} in a copy of the batch is {worst:.3g} nats per token away "
            f"from the same in the model, and may be {TOLERANCE}"
        )


def _apply(model: PreTrainedModel, condition: Condition, restart: Restart, no_op: bool = False) -> Outcome:
    target = condition.target

    def as_before(name: str, tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.view(-1)[index]

    change = as_before if no_op else new_values(model, condition)
    with perturbed(target.parameters, target.split(condition.positions), change) as n_changed:
        return Outcome(condition, restart.measure(), n_changed)


def _check_own(model: PreTrainedModel, target: Target) -> None:
    """The tensors to be written to must be those that the model computes with."""
    for name, parameter in target.parameters.items():
        if model.get_parameter(name) is not parameter:
            raise RunError(f"{name} is not the tensor of the model that is measured, so no change of it would count")


def _check_same(losses: Tensor, baseline: Tensor, what: str) -> None:
    if not torch.equal(losses, baseline):
        worst = (losses - baseline).abs().max()
        raise RunError(f"the instrument fails its own check: {what} changes a loss by {worst:.3g} nats, and must by 0")
