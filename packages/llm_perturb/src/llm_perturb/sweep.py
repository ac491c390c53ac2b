"""The sweep: many perturbations of one loaded model, each measured against the same baseline.

The instrument checks itself on the way: the baseline is measured again at the end and must be the same
bits, a perturbation that writes back what was there must change nothing, weights are compared with their
saved bits after every restore, copies are compared with a model that was really changed, and one condition of each
target, and of each group of single weights, is measured on a sequence without padding. Where passes that begin at
a layer, or copies, prove wrong for a model, full passes and changes of the model itself take their place.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from bridge.exchange.errors import RunError, one_line
from torch import Tensor
from transformers import PreTrainedModel

from llm_perturb.batched_single_weights import (
    ONE_BY_ONE,
    TOLERANCE,
    Change,
    Copies,
    Unit,
    change_of,
    measure_copies,
    unchanged,
)
from llm_perturb.evaluation.causality import tolerance
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.perplexity import Measured, Reference, most_padded, sequence_losses
from llm_perturb.measurement_condition import Condition, Outcome, new_values
from llm_perturb.perturbation import perturbed
from llm_perturb.selection import Target
from llm_perturb.suffix_forward import SuffixForward

OTHER_LOSSES = "the unperturbed model gives other losses from there on"


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
        RunError: the instrument does not give the same bits twice, or padding changes what is measured.
    """
    suffix = SuffixForward(model, corpus.sequences, batch_size, reference)
    checked: set[int] = set()
    checked_alone: set[str] = set()
    for depth, unit in sorted(((_depth(suffix, unit), unit) for unit in units), key=lambda pair: pair[0]):
        suffix.move_to(depth)
        for condition in unit.conditions if isinstance(unit, Copies) else [unit]:
            _check_own(model, condition.target)
        if isinstance(unit, Copies):
            yield from _measure_together(model, unit, suffix, baseline)
        else:
            if depth and depth not in checked:
                _check_no_op(model, unit, suffix, baseline)
                checked.add(depth)
            outcome = _apply(model, unit, suffix)
            if unit.target.layer not in checked_alone:
                _check_alone(model, outcome, suffix, baseline)
                checked_alone.add(unit.target.layer)
            yield outcome
    suffix.move_to(0)
    _check_same(suffix.losses(), baseline, "the unperturbed model at the end")


def _depth(suffix: SuffixForward, unit: Unit) -> int:
    if isinstance(unit, Copies):
        return min(_depth(suffix, condition) for condition in unit.conditions)
    return suffix.depth_of(list(unit.target.split(unit.positions)))


def _check_no_op(model: PreTrainedModel, condition: Condition, suffix: SuffixForward, baseline: Tensor) -> None:
    """A change of nothing must give the baseline; where it does not from a layer on, it must in a full pass."""
    if suffix.boundary:
        try:
            if torch.equal(_apply(model, condition, suffix, no_op=True).losses, baseline):
                return
            suffix.give_up(OTHER_LOSSES)
        except RunError:
            raise
        except Exception as error:  # whatever a model makes of layers that are left out
            suffix.give_up(one_line(error))
    _check_same(_apply(model, condition, suffix, no_op=True).losses, baseline, "a change of nothing")


def _measure_together(
    model: PreTrainedModel, copies: Copies, suffix: SuffixForward, baseline: Tensor
) -> Iterator[Outcome]:
    """Single weights as copies; those that change no value, and all where copies prove wrong, in the model itself."""
    changes = [change_of(model, condition) for condition in copies.conditions]
    moving = [at for at, change in enumerate(changes) if change.changes_value]
    measured = _measured_copies(model, copies, changes, moving, suffix, baseline) if moving else {}
    if measured:
        largest = max(measured, key=lambda at: _size(measured[at].losses - baseline))
        _check_alone(model, Outcome(copies.conditions[largest], measured[largest], 1), suffix, baseline)
    for at, condition in enumerate(copies.conditions):
        if at in measured:
            yield Outcome(condition, measured[at], 1)
            continue
        outcome = _apply(model, condition, suffix)
        if at in moving[:1]:
            _check_alone(model, outcome, suffix, baseline)
        yield outcome


def _measured_copies(
    model: PreTrainedModel,
    copies: Copies,
    changes: Sequence[Change],
    moving: Sequence[int],
    suffix: SuffixForward,
    baseline: Tensor,
) -> dict[int, Measured]:
    """What the changes in ``moving`` give in copies, by their number; nothing where copies prove wrong."""
    try:
        measured = dict(zip(moving, measure_copies(suffix, [changes[at] for at in moving]), strict=True))
        largest = max(moving, key=lambda at: _size(measured[at].losses - baseline))
        chosen = copies.conditions[largest], changes[largest], measured[largest].losses
        wrong = _wrong_in_copies(model, *chosen, suffix, baseline)
    except RunError:
        raise
    except Exception as error:  # whatever a model makes of copies of a batch
        wrong = one_line(error)
    if wrong is None:
        return measured
    if suffix.boundary and not suffix.is_exact(_middle(suffix), baseline):
        suffix.give_up(OTHER_LOSSES)
        return _measured_copies(model, copies, changes, moving, suffix, baseline)
    suffix.say(f"{ONE_BY_ONE} copies of a batch prove wrong: {wrong}")
    return {}


def _size(differences: Tensor) -> float:
    return differences.sum().abs().nan_to_num(torch.inf).item()


def _middle(suffix: SuffixForward) -> int:
    """The number of the batch that checks are made on."""
    return len(suffix.batches) // 2


def _wrong_in_copies(
    model: PreTrainedModel,
    condition: Condition,
    change: Change,
    losses: Tensor,
    suffix: SuffixForward,
    baseline: Tensor,
) -> str | None:
    """On one batch: a change of nothing against the baseline, and a copy against the model that was really changed."""
    number = _middle(suffix)
    chosen = torch.tensor(suffix.batches[number]).sort()
    n_tokens = torch.tensor([len(suffix.sequences[i]) - 1 for i in chosen.values])
    before = baseline[chosen.values]
    (nothing,) = measure_copies(suffix, [unchanged(change)], number)
    wrong = _too_far(nothing.losses, before, before, n_tokens, "a change of nothing")
    if wrong:
        return wrong
    with _under(model, condition):
        really = suffix.measure_batch(number).losses[chosen.indices]
    return _too_far(losses[chosen.values], really, before, n_tokens, condition.key)


def _too_far(losses: Tensor, expected: Tensor, before: Tensor, n_tokens: Tensor, what: str) -> str | None:
    allowed = TOLERANCE * n_tokens + 1e-3 * (expected - before).abs()  # a broken model amplifies rounding
    same = (losses - expected).abs() <= allowed
    if (same | ~(losses.isfinite() | expected.isfinite())).all():
        return None
    worst = ((losses - expected).abs() / n_tokens).max().item()
    return f"{what} in a copy is {worst:.3g} nats per token away from the same in the model, and may be {TOLERANCE}"


def _apply(model: PreTrainedModel, condition: Condition, suffix: SuffixForward, no_op: bool = False) -> Outcome:
    with _under(model, condition, no_op) as n_changed:
        return Outcome(condition, suffix.measure(), n_changed)


def _under(model: PreTrainedModel, condition: Condition, no_op: bool = False) -> AbstractContextManager[int]:
    """The model under a condition, or under a change of its weights to what they are; gives how many values change."""

    def as_before(name: str, tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.view(-1)[index]

    target = condition.target
    change = as_before if no_op else new_values(model, condition)
    return perturbed(target.parameters, target.split(condition.positions), change)


def _check_alone(model: PreTrainedModel, outcome: Outcome, suffix: SuffixForward, baseline: Tensor) -> None:
    """The shortest sequence of the batch with the most padding must have the same loss without the others.

    Padding may change nothing in the model as it is, and yet something in the perturbed one: attention to the tokens
    of the highest scores, for instance, where a perturbation makes scores equal.
    """
    chosen = most_padded(suffix.batches, suffix.sequences)
    if chosen is None:
        return
    shortest, condition = chosen[0], outcome.condition
    with _under(model, condition):
        alone = sequence_losses(model, [suffix.sequences[shortest]], check=False)[0]
    together = outcome.losses[shortest]
    rounding = min(256 * torch.finfo(model.dtype).eps, tolerance(model.dtype) / 10)
    allowed = rounding * alone.abs() + 1e-3 * (alone - baseline[shortest]).abs()
    if not (together - alone).abs() <= allowed and (together.isfinite() or alone.isfinite()):
        raise RunError(
            f"with {condition.perturbation.label} of {condition.selection} in {condition.target.layer} the padding of "
            f"a batch changes the loss of a text by {(together - alone).abs():.3g} nats: --batch-size 1"
        )


def _check_own(model: PreTrainedModel, target: Target) -> None:
    """The tensors to be written to must be those that the model computes with."""
    for name, parameter in target.parameters.items():
        if model.get_parameter(name) is not parameter:
            raise RunError(f"{name} is not the tensor of the model that is measured, so no change of it would count")


def _check_same(losses: Tensor, baseline: Tensor, what: str) -> None:
    if not torch.equal(losses, baseline):
        worst = (losses - baseline).abs().max()
        raise RunError(f"the instrument fails its own check: {what} changes a loss by {worst:.3g} nats, and must by 0")
