"""Exact gradient sums of every parameter, one decoder layer at a time, last layer first.

One forward pass over all sequences keeps the hidden state at the input of every decoder layer. Then each
layer is run once more from there, with all sequences, and left backwards; its sums are handed out and
forgotten before the next layer begins. Besides the weights themselves nothing of the size of the model exists.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from bridge.errors import RequestError, RunError
from torch import Tensor, nn
from tqdm import tqdm

from critical_weight_analysis import head as output_head
from critical_weight_analysis.keeper import Budget, Keeper
from critical_weight_analysis.metrics import Sensitivity
from critical_weight_analysis.recorder import Recorder
from critical_weight_analysis.structure import Structure, find, hidden_of, output_of, with_hidden
from critical_weight_analysis.sums import BY_PRODUCT, SQUARES, Sums

GIVES = frozenset({"grad", "fisher", "curvature", "tokens", "inputs"})
LOGIT_ROWS = 1024  # tokens whose logits exist together


def supports(model: nn.Module) -> bool:
    """Whether the model can be taken apart between its decoder layers; seen from a trial with eight tokens."""
    return find(model) is not None


@dataclass
class Batch:
    """Some sequences that are run together, padded on the right to the longest.

    Attributes:
        members: their numbers in the corpus.
        ids: (B, T), all but the last token of each.
        targets: of each member, (T_i,): all but the first token.
        keeper: what it kept of the linear maps' results.
        calls: what each decoder layer was called with, by layer.
        gradient: d Σ S_i / d hidden state (B, T, H), where the way back has come to.
    """

    members: list[int]
    ids: Tensor
    targets: list[Tensor]
    keeper: Keeper
    calls: dict[str, tuple[tuple, dict]] = field(default_factory=dict)
    gradient: Tensor | None = None


def sensitivities(
    model: nn.Module,
    sequences: list[Tensor],
    names: Sequence[str],
    needs: frozenset[str],
    batch_size: int = 1,
    progress: bool = False,
) -> tuple[Tensor, Iterator[Sensitivity]]:
    """The loss of every sequence, and the sums that the metrics need of every parameter named.

    Args:
        model: a causal language model that ``supports`` accepts, in eval mode, no parameter requiring a gradient.
        sequences: each (T_i + 1,) ids, which predict T_i tokens.
        names: parameters, by their first names.
        needs: which fields of ``Sensitivity``, of those in ``GIVES``.
        batch_size: sequences at a time; taken as 1 where a batch could not be told apart by sequence.
        progress: whether to show a bar on stderr.

    Returns:
        S_i in nats, float64 (n,), on the CPU; and an iterator, one ``Sensitivity`` a parameter, the last layer's
        first. The next one's layer is computed when it is asked for.

    Raises:
        RequestError: something is needed that a parameter does not have.
        RunError: a loss or a sum is not finite.
    """
    structure = find(model)
    assert structure is not None, "ask supports() first"
    others = [name for name in names if name not in structure.by_product]
    if needs & BY_PRODUCT and others:
        raise RequestError(
            f"wanda and grad_squared_token are defined for linear maps and embeddings, which {others[0]} is not; "
            "leave it out: --scope matrices, or --exclude"
        )
    lengths = [len(sequence) - 1 for sequence in sequences]
    owned, parameters = structure.owned(model), dict(model.named_parameters())
    budget = Budget.of(parameters.values()) if needs else Budget(0)
    batch_size = _batch_size(structure, names, needs, batch_size)
    batches = _batches(
        sequences, batch_size, next(model.parameters()).device, lambda: Keeper(budget, structure.unneeded)
    )
    wanted = {layer: {name: parameters[name] for name in owned[layer] if name in set(names)} for layer in owned}
    outside = {name: Sums(name, p, needs, lengths) for name, p in wanted.pop("").items()}
    bar = tqdm(total=len(batches) + len(wanted) + 1, disable=not progress, desc="forward", leave=False)
    losses = torch.empty(len(sequences), dtype=torch.float64)
    for batch in batches:
        _forward(structure, batch, outside if needs else {}, losses)
        bar.update()
    if not needs:
        bar.close()
        return losses, (Sensitivity(name, parameters[name].detach()) for name in names)
    return losses, _backward(structure, batches, wanted, outside, needs, lengths, bar)


def _backward(
    structure: Structure,
    batches: list[Batch],
    wanted: dict[str, dict[str, nn.Parameter]],
    outside: dict[str, Sums],
    needs: frozenset[str],
    lengths: list[int],
    bar: tqdm,
) -> Iterator[Sensitivity]:
    """The way back: what is after the layers, every layer, what is before them.

    Args:
        structure: of the model.
        batches: with the gradient at the last layer's output.
        wanted: the parameters of each layer whose sums are asked for.
        outside: the sums of those that are in no layer; all but those before the layers are complete.
        needs: which sums.
        lengths: T_i.
        bar: shows the layer.
    """
    for name in [name for name in outside if name not in structure.before]:
        yield outside.pop(name).finish()
    for layer in reversed(structure.layers):
        if not outside and not any(wanted.values()):
            break  # nothing that is asked for lies further back
        bar.set_description(layer)
        own = wanted.pop(layer)
        sums = {name: Sums(name, parameter, needs, lengths) for name, parameter in own.items()}
        for batch in batches:
            args, kwargs = batch.calls.pop(layer)
            hidden = hidden_of(args, kwargs).detach().requires_grad_()  # (B, T, H)
            args, kwargs = with_hidden(hidden, args, kwargs)
            recorder = Recorder(own)
            with torch.enable_grad(), batch.keeper.replay(layer), recorder:
                output = output_of(structure.layers[layer](*args, **kwargs))
            output.backward(batch.gradient)
            batch.gradient = hidden.grad
            _add(recorder, batch, sums)
        for name in list(sums):
            yield sums.pop(name).finish()
        bar.update()
    bar.set_description("embedding")
    for batch in batches if outside else []:
        _embedding(structure, batch, outside)
    bar.close()
    for name in list(outside):
        yield outside.pop(name).finish()


def _batch_size(structure: Structure, names: Sequence[str], needs: frozenset[str], batch_size: int) -> int:
    """The batch size asked for, or 1 where a batch would change a number or mix what has to be squared apart."""
    if not structure.causal or (needs & (SQUARES | {"inputs"}) and not structure.by_batch >= set(names)):
        return 1
    return batch_size


def _batches(
    sequences: list[Tensor], batch_size: int, device: torch.device, keeper: Callable[[], Keeper]
) -> list[Batch]:
    """Sequences of like length together, the longest first; the padding repeats the last token."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    batches = []
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        length = len(sequences[members[0]]) - 1
        ids = torch.stack([F.pad(sequences[i][:-1], (0, length))[:length] for i in members])
        for row, i in enumerate(members):
            ids[row, len(sequences[i]) - 1 :] = sequences[i][-1]
        targets = [sequences[i][1:].to(device) for i in members]
        batches.append(Batch(members, ids.to(device), targets, keeper()))
    return batches


def _forward(structure: Structure, batch: Batch, outside: dict[str, Sums], losses: Tensor) -> None:
    """Run a batch, keep what every layer is called with, and come back from the loss to the last layer's output."""
    head, state = structure.head, {}
    weight, bias = _sums_of(head.weight, outside), _sums_of(head.bias, outside)
    recorder = Recorder({name: s.parameter for name, s in outside.items() if s is not weight and s is not bias})
    recorder.paused = True  # until the last layer is left

    def keep(layer: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        batch.calls[layer] = args, kwargs
        batch.keeper.layer = layer

    def leave(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        batch.keeper.layer = None

    def cut(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        recorder.paused = False
        state["output"] = leaf = output_of(output).detach().requires_grad_()
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    def cut_head(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        state["hidden"], state["z"] = args[0], output.detach().requires_grad_()
        return state["z"].clone()

    with ExitStack() as stack:
        for name, layer in structure.layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(keep, name), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        stack.callback(layer.register_forward_hook(cut).remove)
        if not structure.plain_head:
            stack.callback(head.register_forward_hook(cut_head).remove)
        with torch.enable_grad(), batch.keeper, recorder:
            result = structure.runner(input_ids=batch.ids, use_cache=False)
    hidden = result.last_hidden_state if structure.plain_head else state["hidden"]  # (B, T, H)
    gradient = torch.zeros_like(hidden)
    for group in _groups(batch, LOGIT_ROWS if structure.plain_head else 1):
        real = [(row, slice(len(batch.targets[row]))) for row in group]
        received = torch.cat([hidden[one].detach() for one in real])  # (T, H)
        targets = torch.cat([batch.targets[row] for row in group])
        if structure.plain_head:
            nats, at_logits = output_head.plain_loss(head, received, targets)
        else:
            nats, at_logits = output_head.any_loss(result.logits, state["z"], real[0], targets)
        ends = list(accumulate(len(batch.targets[row]) for row in group))
        rows = {
            batch.members[row]: slice(end - len(batch.targets[row]), end) for row, end in zip(group, ends, strict=True)
        }
        for i, here in rows.items():
            losses[i] = nats[here].double().sum()
            if not losses[i].isfinite():
                raise RunError(f"the loss of sequence {i} is not finite")
        tied = weight is not None and weight.name in structure.before
        ids = {batch.members[row]: batch.ids[one] for row, one in zip(group, real, strict=True)} if tied else None
        at_hidden = output_head.back(head, received, at_logits, rows, weight, bias, ids)
        for one, here in zip(real, rows.values(), strict=True):
            gradient[one] = at_hidden[here]
    hidden.backward(gradient)
    batch.gradient = state["output"].grad
    _add(recorder, batch, outside)


def _embedding(structure: Structure, batch: Batch, outside: dict[str, Sums]) -> None:
    """Run what is before the layers once more, one sequence at a time, and come back to its parameters."""
    parameters = {name: s.parameter for name, s in outside.items()}
    first = next(iter(structure.layers.values()))
    for row, (i, targets) in enumerate(zip(batch.members, batch.targets, strict=True)):
        real = slice(row, row + 1), slice(len(targets))
        recorder = Recorder(parameters)
        stop = first.register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            with torch.enable_grad(), recorder:
                structure.runner(input_ids=batch.ids[real], use_cache=False)
        except _ReachedLayersError as reached:
            reached.hidden.backward(batch.gradient[real])
        finally:
            stop.remove()
        for name, parts in recorder.parts().items():
            outside[name].add([(i, parts)])


class _ReachedLayersError(Exception):
    """The first decoder layer is about to begin, on ``hidden``."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
    raise _ReachedLayersError(hidden_of(args, kwargs))


def _add(recorder: Recorder, batch: Batch, sums: dict[str, Sums]) -> None:
    """Add the gradients that a batch left in the recorder, sequence by sequence where they must be told apart."""
    if not any(s.by_sequence for s in sums.values()):
        for name, parts in recorder.parts().items():
            sums[name].add([(batch.members[0], parts)])
        return
    apart = [recorder.parts(row, len(batch.members), len(targets)) for row, targets in enumerate(batch.targets)]
    for name in apart[0]:
        sums[name].add([(i, parts[name]) for i, parts in zip(batch.members, apart, strict=True)])


def _groups(batch: Batch, n_tokens: int) -> Iterator[list[int]]:
    """The rows of a batch, as many together as have that many tokens; one at least."""
    group: list[int] = []
    for row, targets in enumerate(batch.targets):
        if group and sum(len(batch.targets[other]) for other in group) + len(targets) > n_tokens:
            yield group
            group = []
        group.append(row)
    yield group


def _sums_of(parameter: nn.Parameter | None, sums: dict[str, Sums]) -> Sums | None:
    return next((s for s in sums.values() if s.parameter is parameter), None)
