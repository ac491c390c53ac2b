"""Several single weights at once: each is changed in a copy of its own of the batch, and the weights stay untouched.

A weight of a linear map acts on one output feature. With the hidden states at a decoder layer's input
repeated C times, the map's output gets, for copy c, that feature computed again with the changed weight:
y[c, :, o_c] = x[c] w'_c + b. From there on the copies go through the model as one batch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from bridge.exchange.errors import one_line
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_perturb.evaluation.causality import COMMON, LENGTH, probe_sequences, tolerance
from llm_perturb.evaluation.decoder import Decoder
from llm_perturb.evaluation.parameters import layer_of
from llm_perturb.evaluation.perplexity import Measured, in_order
from llm_perturb.evaluation.progress import note
from llm_perturb.measurement_condition import Condition, new_values
from llm_perturb.perturbation import changed
from llm_perturb.suffix_forward import SuffixForward

AT_ONCE = 1024  # tokens in a batch of copies; more were no faster
GROUP = 32  # weights that are measured, recorded and resumed together
TOLERANCE = 1e-5  # nats per token between a copy and the changed model: products of other shapes round otherwise
ONE_BY_ONE = "single weights are changed in the model one by one, because"
_WIDE = {torch.float32, torch.float64}  # in narrower numbers, that rounding is larger than most effects


@dataclass(frozen=True)
class Copies:
    """Single weights of the linear maps of one decoder layer, measured together."""

    conditions: tuple[Condition, ...]


Unit = Condition | Copies
Item = TypeVar("Item")


@dataclass(frozen=True)
class Change:
    """One weight of a linear map: the map, its output feature, the feature's weights (I,), whether its value is new."""

    module: nn.Linear | Conv1D
    feature: int
    weights: Tensor
    changes_value: bool


def group(model: PreTrainedModel, conditions: Sequence[Condition]) -> list[Unit]:
    """Gather the single weights that can be measured as copies, by decoder layer; the rest stay as they are.

    The groups depend on nothing but the model and the set of conditions: not on their order, on what is
    finished already, nor on how many processes there are, so that none of these changes a number.
    """
    maps: dict[str, nn.Module] = {}
    if any(c.selection == "weight" for c in conditions):
        try:
            maps = linear_maps(model)
        except Exception as error:  # whatever a model makes of the probe
            note(f"{ONE_BY_ONE} no two sequences can be run together: {one_line(error)}")
    decoder = Decoder.of(model)
    path = decoder.path if decoder else ""
    layers: dict[str, list[Condition]] = {}
    rest: list[Unit] = []
    for condition in conditions:
        name = next(iter(condition.target.parameters))
        if condition.selection == "weight" and name in maps:
            layers.setdefault(name[len(path) :].split(".")[1], []).append(condition)
        else:
            rest.append(condition)
    for members in layers.values():
        members.sort(key=lambda c: c.key)
        rest += [Copies(tuple(part)) for part in even_parts(members, GROUP)]
    return rest


def even_parts(items: Sequence[Item], largest: int) -> list[Sequence[Item]]:
    """Split into as few parts as go, none larger than ``largest``, their sizes at most one apart."""
    n = -(-len(items) // largest)
    ends = [len(items) * i // n for i in range(n + 1)] if n else []
    return [items[start:end] for start, end in pairwise(ends)]


@torch.no_grad()
def linear_maps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear maps inside of decoder layers that see each position of each sequence once, in order; by weight name.

    As a probe shows. Experts, which see some of the tokens, maps that see them in another order, and modules that share
    a weight are left out.
    """
    decoder = Decoder.of(model)
    if decoder is None or model.dtype not in _WIDE:
        return {}
    seen: dict[nn.Module, list[tuple[Tensor, ...]]] = {
        m: [] for layer in decoder.layers.values() for m in layer.modules() if type(m) in (nn.Linear, Conv1D)
    }
    hooks = [m.register_forward_hook(lambda m, inputs, output: seen[m].append(inputs)) for m in seen]
    ids = torch.stack(probe_sequences(model)).to(model.device)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = {id(module): name for name, module in model.named_modules()}
    return {
        f"{names[id(module)]}.weight": module
        for module, calls in seen.items()
        if len(calls) == 1 and calls[0] and _rows_are_tokens(calls[0][0]) and uses[id(module.weight)] == 1
    }


def _rows_are_tokens(x: Tensor) -> bool:
    """Whether what a map has received in the probe is one row for each token of one sequence and then of the other."""
    if x.numel() != 2 * LENGTH * x.shape[-1]:
        return False
    one, other = x.reshape(2, LENGTH, -1)
    same = (one - other).abs().amax(1) <= tolerance(x.dtype) * x.abs().max()
    return bool(same[:COMMON].all() and not torch.equal(one[COMMON:], other[COMMON:]))


def change_of(model: PreTrainedModel, condition: Condition) -> Change:
    """The change that a condition of one weight means for the output of its linear map."""
    ((name, index),) = condition.target.split(condition.positions).items()
    tensor = model.get_parameter(name).detach()
    module = model.get_submodule(layer_of(name))
    assert isinstance(module, nn.Linear | Conv1D), f"{name} is not the weight of a linear map"
    index = index.to(tensor.device)
    new = new_values(model, condition)(name, tensor, index)
    row, col = divmod(int(index), tensor.shape[1])
    transposed = isinstance(module, Conv1D)
    weights = (tensor[:, col] if transposed else tensor[row]).clone()
    weights[row if transposed else col] = new
    changes_value = bool(changed(tensor.view(-1)[index], new))
    return Change(module, col if transposed else row, weights, changes_value)


def unchanged(change: Change) -> Change:
    """The same feature with the weights that the model has: a change of nothing, computed the same way."""
    weight = change.module.weight.detach()
    own = weight[:, change.feature] if isinstance(change.module, Conv1D) else weight[change.feature]
    return Change(change.module, change.feature, own, changes_value=False)


@contextmanager
def in_copies(changes: Sequence[Change]) -> Iterator[None]:
    """While the block runs, the model computes copy c of a batch of ``len(changes)`` copies with change c."""

    def correct(module: nn.Linear | Conv1D, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].reshape(len(changes), -1, inputs[0].shape[-1])  # (C, B T, I)
        y = output.view(len(changes), -1, output.shape[-1])  # (C, B T, O)
        for copy, change in enumerate(changes):
            if change.module is module:
                bias = None if module.bias is None else module.bias[change.feature, None]
                y[copy, :, change.feature] = F.linear(x[copy], change.weights[None], bias).flatten()

    hooks = [module.register_forward_hook(correct) for module in {change.module for change in changes}]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure_copies(suffix: SuffixForward, changes: Sequence[Change], batch: int | None = None) -> list[Measured]:
    """Every sequence under each of the changes; of one batch if its number is passed.

    Args:
        suffix: its boundary at the layer that holds the changed maps, or before.
        changes: of which each is measured alone.
        batch: the number of the only batch to be measured.
    """
    numbers = range(len(suffix.batches)) if batch is None else [batch]
    by_change: list[list[Measured]] = [[] for _ in changes]
    for number in numbers:
        n = len(suffix.batches[number])
        n_tokens = n * (max(len(suffix.sequences[i]) for i in suffix.batches[number]))
        copy = 0
        for part in even_parts(changes, max(1, AT_ONCE // n_tokens)):
            with in_copies(part):
                together = suffix.measure_batch(number, len(part))
            for start in range(0, n * len(part), n):
                by_change[copy].append(_rows(together, slice(start, start + n)))
                copy += 1
    order = [suffix.batches[number] for number in numbers]
    return [in_order(order, one) for one in by_change]


def _rows(measured: Measured, rows: slice) -> Measured:
    divergence = measured.divergence
    return Measured(measured.losses[rows], measured.correct[rows], None if divergence is None else divergence[rows])
