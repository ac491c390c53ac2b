"""The two ends of a decoder: what is before its layers, and what is after them, the head and the loss.

Both are run by the model's own forward pass in which the decoder layers compute nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate

import torch
from bridge.exchange.errors import RunError
from torch import Tensor, nn

from critical_weight_analysis.layerwise import output_head as output_head
from critical_weight_analysis.layerwise.batches import Batch
from critical_weight_analysis.layerwise.gradient_sums import Sums, add, parts_of
from critical_weight_analysis.layerwise.parameter_uses import Recorder
from critical_weight_analysis.layerwise.probe import Structure, hidden_of

LOGIT_ROWS = 512  # tokens whose logits exist together


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """The forward pass has come as far as it was wanted."""


@contextmanager
def _replaced(structure: Structure, compute: Callable[[str, tuple, dict], Tensor]) -> Iterator[None]:
    """The decoder layers return what ``compute`` makes of their name and their arguments."""

    def forward_of(name: str) -> Callable:
        return lambda *args, **kwargs: structure.wrap(name, compute(name, args, kwargs))

    for name, layer in structure.layers.items():
        layer.forward = forward_of(name)
    try:
        yield
    finally:
        for layer in structure.layers.values():
            del layer.forward


@torch.no_grad()
def enter(structure: Structure, batch: Batch) -> None:
    """Run what is before the layers: the hidden state at the first one, and what each is called with besides."""

    def record(name: str, args: tuple, kwargs: dict) -> Tensor:
        batch.calls[name] = args, kwargs
        if len(batch.calls) == len(structure.layers):
            raise _Reached
        return hidden_of(args, kwargs)

    with _replaced(structure, record), suppress(_Reached):
        structure.runner(input_ids=batch.ids, use_cache=False)
    batch.hidden = hidden_of(*batch.calls[next(iter(structure.layers))])


@torch.enable_grad()
def leave(structure: Structure, batch: Batch, outside: dict[str, Sums], losses: Tensor) -> None:
    """Run what is after the layers, and come back from the loss to the last layer's output.

    Args:
        structure: of the model.
        batch: with the last layer's output as its hidden state.
        outside: the sums of the parameters that are in no layer, to be added to.
        losses: S_i of every sequence, to be filled in.
    """
    head, state, last = structure.head, {}, list(structure.layers)[-1]
    weight, bias = _sums_of(head.weight, outside), _sums_of(head.bias, outside)
    recorder = Recorder({name: s.parameter for name, s in outside.items() if s is not weight and s is not bias})
    recorder.paused = True  # until the layers are passed
    leaf = batch.hidden.detach().requires_grad_()

    def jump(name: str, args: tuple, kwargs: dict) -> Tensor:
        recorder.paused = name != last
        return leaf if name == last else hidden_of(args, kwargs)

    def cut_head(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        state["hidden"], state["z"] = args[0], output.detach().requires_grad_()
        return state["z"].clone()

    handle = None if structure.plain_head else head.register_forward_hook(cut_head)
    try:
        with _replaced(structure, jump), recorder:
            result = structure.runner(input_ids=batch.ids, use_cache=False)
    finally:
        if handle:
            handle.remove()
    hidden = result.last_hidden_state if structure.plain_head else state["hidden"]  # (B, T, H)
    gradient = torch.zeros_like(hidden)
    tied = weight is not None and weight.name in structure.before
    for group in batch.groups(LOGIT_ROWS if structure.plain_head else 1):
        real = [(row, slice(len(batch.targets[row]))) for row in group]
        received = torch.cat([hidden[one].detach() for one in real])  # (T, H)
        targets = torch.cat([batch.targets[row] for row in group])
        if structure.plain_head:
            nats, at_logits = output_head.plain_loss(head, received, targets)
        else:
            nats, at_logits = output_head.any_loss(result.logits, state["z"], real[0], targets)
        rows = _rows(batch, group)
        for i, here in rows.items():
            losses[i] = nats[here].double().sum()
            if not losses[i].isfinite():
                raise RunError(f"the loss of sequence {i} is not finite")
        ids = {batch.members[row]: batch.ids[one] for row, one in zip(group, real, strict=True)} if tied else None
        at_hidden = output_head.back(head, received, at_logits, rows, weight, bias, ids)
        for one, here in zip(real, rows.values(), strict=True):
            gradient[one] = at_hidden[here]
    if weight is not None and weight.inputs is not None:
        for row, targets in enumerate(batch.targets):
            weight.add_input(hidden[row, len(targets)].detach())  # the last token, which predicts nothing
    hidden.backward(gradient)
    batch.gradient, batch.hidden = leaf.grad, None
    add([parts_of(recorder, batch, outside)], outside, gradient.device)


def back_to_embedding(structure: Structure, batch: Batch, outside: dict[str, Sums]) -> None:
    """Run what is before the layers once more, one sequence at a time, and come back to its parameters."""
    parameters = {name: s.parameter for name, s in outside.items()}
    reached = []

    def stop(name: str, args: tuple, kwargs: dict) -> Tensor:
        reached.append(hidden_of(args, kwargs))
        raise _Reached

    for row, (i, targets) in enumerate(zip(batch.members, batch.targets, strict=True)):
        real = slice(row, row + 1), slice(len(targets) + 1)
        recorder = Recorder(parameters)
        with _replaced(structure, stop), torch.enable_grad(), recorder, suppress(_Reached):
            structure.runner(input_ids=batch.ids[real], use_cache=False)
        reached.pop().backward(batch.gradient[real])
        for name, parts in recorder.parts().items():
            outside[name].add([(i, parts)])


def _rows(batch: Batch, group: list[int]) -> dict[int, slice]:
    """Where the tokens of each sequence are when those of the group stand one after another."""
    ends = accumulate(len(batch.targets[row]) for row in group)
    return {batch.members[row]: slice(end - len(batch.targets[row]), end) for row, end in zip(group, ends, strict=True)}


def _sums_of(parameter: nn.Parameter | None, sums: dict[str, Sums]) -> Sums | None:
    return next((s for s in sums.values() if s.parameter is parameter), None)
