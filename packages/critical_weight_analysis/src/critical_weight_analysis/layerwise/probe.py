"""Find the decoder layers of a causal language model, and whether it can be taken apart between them.

Nothing is concluded from a model's name. Eight tokens are run through it while every use of every
parameter is watched: the layers must be called one after another, each on what the one before returned and on
nothing else that depends on the layers, and no parameter may act in two of them. What this probe allows is still
compared with plain autograd before it is trusted, see ``proof``.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bridge.exchange.errors import one_line
from llm_perturb.evaluation.checkpoint import Checkpoint
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten

from critical_weight_analysis.layerwise.activation_cache import only_added
from critical_weight_analysis.layerwise.parameter_uses import Recorder

BEFORE, AFTER, HEAD = "before", "after", "head"


class StructureError(Exception):
    """A model cannot be taken apart between its layers; the message says why."""


@dataclass(frozen=True)
class Structure:
    """A decoder: what is before its layers, the layers, what is after them, the output head.

    Attributes:
        layers: the decoder layers by name, in the order of the calls.
        runner: what to call with ids to run all but the head; the whole model where that alone leads to its logits.
        head: the output head; its weight may be the embedding's.
        plain_head: whether the logits are what the head returns for the last hidden state, and nothing else.
        causal: whether what follows a token leaves its hidden state as it is, so that padding on the right does.
        by_batch: the parameters whose gradients can be told apart by sequence when several are run as a batch.
        by_product: the parameters that act as the weight of a linear map or the table of an embedding, and not else.
        before: the parameters that act before the first layer.
        rest: what each layer returns beside the hidden state, as a tuple or list of None, for nothing uses it; None
            where it returns the hidden state alone.
        unneeded: the weights (by id) of the layers' linear maps whose results no gradient depends on.
    """

    layers: dict[str, nn.Module]
    runner: nn.Module
    head: nn.Linear
    plain_head: bool
    causal: bool
    by_batch: frozenset[str]
    by_product: frozenset[str]
    before: frozenset[str]
    rest: dict[str, tuple | list | None]
    unneeded: frozenset[int]

    def wrap(self, layer: str, hidden: Tensor) -> Tensor | tuple | list:
        """A hidden state in the form in which the layer returns it."""
        rest = self.rest[layer]
        return hidden if rest is None else type(rest)([hidden, *rest])

    def owned(self, model: nn.Module) -> dict[str, list[str]]:
        """The parameter names that belong to each layer; those of everything else under the empty name."""
        owner = {id(p): name for name, layer in self.layers.items() for p in layer.parameters()}
        owned: dict[str, list[str]] = {name: [] for name in ["", *self.layers]}
        for name, parameter in model.named_parameters():
            owned[owner.get(id(parameter), "")].append(name)
        return owned


def hidden_of(args: tuple, kwargs: dict) -> Tensor:
    """The hidden state among the arguments of a decoder layer."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(hidden: Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same arguments with another hidden state."""
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})


def output_of(output: Tensor | tuple | list) -> Tensor:
    """The hidden state among the results of a decoder layer."""
    return output[0] if isinstance(output, tuple | list) else output


def find(model: nn.Module, checkpoint: Checkpoint | None = None) -> Structure:
    """The structure of a model.

    Args:
        model: a causal language model.
        checkpoint: where its weights are read from, if it does not hold them; all of it is read once.

    Raises:
        StructureError: it is not one that can be taken apart by layers.
    """
    name, layers = layers_of(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        raise StructureError("its output head is not a linear map")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or devices == {torch.device("meta")}:
        raise StructureError("its parameters are not all on one device")
    recorder = Recorder(dict(model.named_parameters()), with_nodes=True)
    trace = _Trace(layers, model.get_submodule(name.rpartition(".")[0]), head, recorder)
    try:
        trace.run(model, checkpoint)
    except StructureError:
        raise
    except Exception as error:  # whatever a layer makes of being watched; the whole model is then run unwatched
        raise StructureError(f"its forward pass fails while it is watched: {one_line(error)}") from error
    return trace.structure(model)


def layers_of(model: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """The name of the list of decoder layers, which holds the most parameters, and the layers by name.

    Raises:
        StructureError: there is no list of modules.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
    if not lists:
        raise StructureError("it has no list of layers")
    name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return name, {f"{name}.{index}": layer for index, layer in enumerate(lists[name])}


class _Trace:
    """What one watched forward pass shows."""

    def __init__(self, layers: dict[str, nn.Module], base: nn.Module, head: nn.Linear, recorder: Recorder) -> None:
        self.layers, self.base, self.head, self.recorder = layers, base, head, recorder
        self.called: list[str] = []
        self.inputs: list[Tensor] = []
        self.rest: dict[str, tuple | list | None] = {}
        self.outputs: list[Tensor] = []
        self.handed_on: list[Tensor] = []  # what layers return beside the hidden state
        self.head_calls: list[tuple[Tensor, Tensor]] = []
        self.base_takes_ids = False
        self.last_hidden: Tensor | None = None
        self.logits: Tensor | None = None

    def run(self, model: nn.Module, checkpoint: Checkpoint | None) -> None:
        """Two sequences of four tokens that differ in the last one."""
        inside = {id(parameter) for layer in self.layers.values() for parameter in layer.parameters()}
        ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=next(model.parameters()).device)
        ids = ids % self.head.weight.shape[0]
        with ExitStack() as stack:
            if checkpoint:
                outside = [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
                stack.enter_context(checkpoint.present(outside))
            for name, layer in self.layers.items():
                if checkpoint:
                    stack.enter_context(checkpoint.present_during(layer))
                _hook(stack, layer.register_forward_pre_hook, partial(self._enter, name))
                stack.callback(layer.register_forward_hook(partial(self._leave, name)).remove)
            _hook(stack, self.head.register_forward_pre_hook, self._enter_head)
            stack.callback(self.head.register_forward_hook(self._leave_head).remove)
            _hook(stack, self.base.register_forward_pre_hook, self._enter_base)
            stack.callback(self.base.register_forward_hook(self._leave_base).remove)
            self.recorder.section = BEFORE
            # the graph is looked at, never run, so it need not hold what it would compute with: the weights, above all
            stack.enter_context(saved_tensors_hooks(_forget, _forget))
            with torch.enable_grad(), self.recorder:
                self.logits = model(input_ids=ids, use_cache=False).logits

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.called.append(name)
        self.recorder.section = name
        hidden = hidden_of(args, kwargs)
        self.inputs.append(hidden)
        for leaf in tree_flatten((args, kwargs))[0]:
            if leaf is not hidden and (_is_state(leaf) or any(leaf is tensor for tensor in self.handed_on)):
                raise StructureError(f"{name} takes more than the hidden state from what is before it")

    def _leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ANN401 - a tensor, tuple or list
        hidden = output_of(output)
        if not isinstance(hidden, Tensor):
            raise StructureError(f"{name} returns a {type(output).__name__}")
        self.outputs.append(hidden)
        self.rest[name] = None
        if isinstance(output, tuple | list):
            self.rest[name] = type(output)([None] * len(output[1:]))
            self.handed_on += [leaf for leaf in tree_flatten(output[1:])[0] if isinstance(leaf, Tensor)]
        self.recorder.section = AFTER

    def _enter_head(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.recorder.section = HEAD

    def _leave_head(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.head_calls.append((args[0].detach(), output.detach().clone()))
        self.recorder.section = AFTER

    def _enter_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.base_takes_ids = kwargs.get("input_ids") is not None

    def _leave_base(self, module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ANN401 - a model's own record
        self.last_hidden = getattr(output, "last_hidden_state", None)

    def structure(self, model: nn.Module) -> Structure:
        """The structure, if what was seen allows it."""
        if self.called != list(self.layers):
            raise StructureError("its layers are not called one after another, each once")
        if not all(torch.equal(a, b) for a, b in zip(self.outputs, self.inputs[1:], strict=False)):
            raise StructureError("a layer is not called on what the one before it returned")
        if len(self.head_calls) != 1:
            raise StructureError("its output head is not called once")
        self._check_homes(model)
        (head_input, head_output), last = self.head_calls[0], self.last_hidden
        is_last = last is not None and torch.equal(head_input, last) and torch.equal(head_output, self.logits)
        plain = is_last and self.base_takes_ids
        return Structure(
            layers=self.layers,
            runner=self.base if plain else model,
            head=self.head,
            plain_head=plain,
            causal=all(_same_prefix(hidden) for hidden in self.outputs),
            by_batch=self._by_batch(),
            by_product=self._by_product(),
            before=self._before(),
            rest=self.rest,
            unneeded=self._unneeded(model),
        )

    def _check_homes(self, model: nn.Module) -> None:
        """Each parameter must act in its own layer only, or outside the layers in one place only.

        The one exception is the head's weight, which may be the embedding's table too.
        """
        home = {id(p): name for name, layer in self.layers.items() for p in layer.parameters()}
        places: dict[str, set] = {}
        for use in self.recorder.uses:
            for name in filter(None, (use.weight, use.bias)):
                places.setdefault(name, set()).add((use.section, use.kind))
        for section, name in self.recorder.used:
            places.setdefault(name, set()).add((section, "other"))
        for name, parameter in model.named_parameters():
            seen = places.get(name, set())
            sections = {section for section, _ in seen}
            if id(parameter) in home:
                allowed = sections <= {home[id(parameter)]}
            elif parameter is self.head.weight:
                allowed = seen <= {(HEAD, "linear"), (BEFORE, "embedding")}
            elif parameter is self.head.bias:
                allowed = sections <= {HEAD}
            else:
                allowed = sections <= {BEFORE} or sections <= {AFTER}
            if not allowed:
                raise StructureError(f"{name} acts in more than one place: {', '.join(sorted(sections))}")

    def _by_product(self) -> frozenset[str]:
        otherwise = {name for _, name in self.recorder.used} | {use.bias for use in self.recorder.uses}
        return frozenset(use.weight for use in self.recorder.uses if use.weight and use.weight not in otherwise)

    def _before(self) -> frozenset[str]:
        uses = [(use.section, name) for use in self.recorder.uses for name in (use.weight, use.bias) if name]
        return frozenset(name for section, name in [*uses, *self.recorder.used] if section == BEFORE)

    def _unneeded(self, model: nn.Module) -> frozenset[int]:
        parameters, found = dict(model.named_parameters()), set()
        for name, hidden, output in zip(self.layers, self.inputs, self.outputs, strict=True):
            nodes = {use.node: use.weight for use in self.recorder.uses if use.section == name and use.weight}
            found |= only_added(output, nodes, hidden.grad_fn)
        return frozenset(id(parameters[name]) for name in found)

    def _by_batch(self) -> frozenset[str]:
        """The parameters of which every use seen had one row a token, in order, as the common prefix shows.

        What is before the layers and the head are run one sequence at a time anyway.
        """
        seen = {name for _, name in self.recorder.used}
        unclear = {name for section, name in self.recorder.used if section not in {BEFORE, HEAD}}
        for use in self.recorder.uses:
            names = set(filter(None, (use.weight, use.bias)))
            seen |= names
            if use.section not in {BEFORE, HEAD} and not _rows_are_tokens(use.x):
                unclear |= names
        return frozenset(seen - unclear)


def _forget(saved: object) -> None:
    """Keep nothing for a way back that nobody goes."""


def _hook(stack: ExitStack, register: Callable, function: Callable) -> None:
    stack.callback(register(function, with_kwargs=True).remove)


def _rows_are_tokens(x: Tensor) -> bool:
    if x.shape[:2] != (2, 4) and x.shape[:1] != (8,):
        return False
    x = x.reshape(2, 4, -1)
    return _same_prefix(x) and not torch.equal(x[0, 3], x[1, 3])


def _same_prefix(x: Tensor) -> bool:
    tolerance = 1e-2 * x.abs().max()
    return bool((x[0, :3] - x[1, :3]).abs().max() <= tolerance)


def _is_state(leaf: object) -> bool:
    """Whether an argument of a layer could carry gradients or change: a cache, or a result of parameters."""
    if isinstance(leaf, Tensor):
        return leaf.requires_grad
    return not isinstance(leaf, bool | int | float | str | None | torch.dtype | torch.device)
