"""A probe of whether a causal language model can be run layer by layer.

Nothing is concluded from a model's name. Eight tokens are run through it while every use of every
parameter is watched: the layers must be called one after another, each on what the one before returned and on
nothing else that depends on the layers, and no parameter may act in two of them. What this probe allows is still
compared with plain autograd before it is trusted, see ``autograd_check``.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from bridge.exchange.errors import one_line
from llm_perturb.evaluation.checkpoint import Checkpoint
from llm_perturb.evaluation.decoder import Decoder, LayerOutput, OtherOutputs, layer_input, layer_output
from llm_perturb.evaluation.decoder_head import HeadProbe
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from critical_weight_analysis.layerwise.activation_cache import only_added
from critical_weight_analysis.layerwise.decoder_structure import Structure
from critical_weight_analysis.layerwise.parameter_uses import Recorder

BEFORE, AFTER, HEAD = "before", "after", "head"


@dataclass(frozen=True)
class Refusal:
    """Why a model cannot be run layer by layer: a clause."""

    reason: str


def probe(model: PreTrainedModel, checkpoint: Checkpoint | None = None) -> Structure | Refusal:
    """The structure of a model, or why it cannot be run layer by layer.

    Args:
        model: a causal language model.
        checkpoint: where its weights are read from, if it does not hold them; all of it is read once.
    """
    decoder = Decoder.of(model, checkpoint)
    if decoder is None:
        return Refusal("it has no list of layers")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return Refusal("its output head is not a linear map")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or devices == {torch.device("meta")}:
        return Refusal("its parameters are not all on one device")
    watch = _WatchedForward(model, decoder, head)
    try:
        watch.run()
    except Exception as error:  # whatever a layer makes of being watched; the whole model is then run unwatched
        return Refusal(watch.refusal or f"its forward pass fails while it is watched: {one_line(error)}")
    reason = watch.refusal or watch.obstacle()
    return Refusal(reason) if reason else watch.structure()


class _WatchedForward:
    """One forward pass, and what it shows."""

    def __init__(self, model: PreTrainedModel, decoder: Decoder, head: nn.Linear) -> None:
        self.model = model
        self.decoder = decoder
        self.head = head
        self.parameters = dict(model.named_parameters())
        self.recorder = Recorder(self.parameters, with_nodes=True)
        self.head_probe = HeadProbe(model, head, decoder)
        self.refusal: str | None = None
        self.called: list[str] = []
        self.inputs: list[Tensor] = []  # of each layer, (2, 4, H)
        self.outputs: list[Tensor] = []  # of each layer, (2, 4, H)
        self.other_outputs: dict[str, OtherOutputs] = {}
        self.handed_on: list[Tensor] = []  # what layers return beside the hidden state
        self.logits: Tensor  # (2, 4, V)

    def run(self) -> None:
        """Run two sequences of four tokens that differ in the last one."""
        ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=next(iter(self.parameters.values())).device)
        ids = ids % self.head.weight.shape[0]
        with ExitStack() as stack:
            stack.enter_context(self.decoder.present(self.decoder.parameters_by_layer()[""]))
            for name, layer in self.decoder.layers.items():
                if self.decoder.checkpoint:
                    stack.enter_context(self.decoder.checkpoint.present_during(layer))
                enter = layer.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                stack.callback(enter.remove)
                stack.callback(layer.register_forward_hook(partial(self._leave, name)).remove)
            stack.callback(self.head.register_forward_pre_hook(self._enter_head).remove)
            stack.callback(self.head.register_forward_hook(self._leave_head).remove)
            stack.enter_context(self.head_probe)
            self.recorder.section = BEFORE
            # autograd's graph is looked at and never run, so it need not hold its operands: the weights, above all
            stack.enter_context(saved_tensors_hooks(_save_nothing, _never_run))
            with torch.enable_grad(), self.recorder:
                self.logits = self.model(input_ids=ids, use_cache=False).logits

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.called.append(name)
        self.recorder.section = name
        hidden = layer_input((args, kwargs))
        self.inputs.append(hidden)
        for leaf in tree_flatten((args, kwargs))[0]:
            if leaf is not hidden and (_is_state(leaf) or any(leaf is tensor for tensor in self.handed_on)):
                self.refusal = self.refusal or f"{name} takes more than the hidden state from what is before it"

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: LayerOutput) -> None:
        hidden = layer_output(output)
        if not isinstance(hidden, Tensor):
            self.refusal = self.refusal or f"{name} returns a {type(output).__name__}"
            return
        self.outputs.append(hidden)
        self.other_outputs[name] = None
        if isinstance(output, tuple | list):
            self.other_outputs[name] = type(output)([None] * len(output[1:]))
            self.handed_on += [leaf for leaf in tree_flatten(output[1:])[0] if isinstance(leaf, Tensor)]
        self.recorder.section = AFTER

    def _enter_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.recorder.section = HEAD

    def _leave_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.recorder.section = AFTER

    def obstacle(self) -> str | None:
        """Why the model cannot be run layer by layer, by the whole pass; None if it can."""
        if self.called != list(self.decoder.layers):
            return "its layers are not called one after another, each once"
        if not all(
            torch.equal(output, following) for output, following in zip(self.outputs, self.inputs[1:], strict=False)
        ):
            return "a layer is not called on what the one before it returned"
        if len(self.head_probe.calls) != 1:
            return "its output head is not called once"
        return self._shared_parameter()

    def structure(self) -> Structure:
        """The structure of a model without an obstacle."""
        # GPT-2 and GPT-NeoX pass the ids by position and keep the loss over all logits, which rounds otherwise
        runner = self.head_probe.runner(self.logits) if self.head_probe.ids_by_keyword else None
        return Structure(
            decoder=replace(self.decoder, runner=runner or self.model, other_outputs=self.other_outputs),
            head=self.head,
            plain_head=runner is not None,
            causal=all(_same_prefix(hidden) for hidden in self.outputs),
            by_batch=self._by_batch(),
            by_product=self._by_product(),
            before=self._before(),
            unneeded=self._unneeded(),
        )

    def _shared_parameter(self) -> str | None:
        """That a parameter acts in more than its own layer, or outside the layers in more than one section.

        The one exception is the head's weight, which may be the embedding's table too.
        """
        own_layer = {id(p): name for name, layer in self.decoder.layers.items() for p in layer.parameters()}
        uses: dict[str, set[tuple[str, str]]] = {name: set() for name in self.parameters}  # (section, kind)
        for use in self.recorder.uses:
            for name in (use.weight, use.bias):
                if name is not None:
                    uses[name].add((use.section, use.kind))
        for section, name in self.recorder.used:
            uses[name].add((section, "other"))
        for name, parameter in self.parameters.items():
            sections = {section for section, _ in uses[name]}
            if id(parameter) in own_layer:
                allowed = sections <= {own_layer[id(parameter)]}
            elif parameter is self.head.weight:
                allowed = uses[name] <= {(HEAD, "linear"), (BEFORE, "embedding")}
            elif parameter is self.head.bias:
                allowed = sections <= {HEAD}
            else:
                allowed = sections <= {BEFORE} or sections <= {AFTER}
            if not allowed:
                return f"{name} acts in more than one place: {', '.join(sorted(sections))}"
        return None

    def _by_product(self) -> frozenset[str]:
        otherwise = {name for _, name in self.recorder.used} | {use.bias for use in self.recorder.uses}
        return frozenset(use.weight for use in self.recorder.uses if use.weight and use.weight not in otherwise)

    def _before(self) -> frozenset[str]:
        uses = [(use.section, name) for use in self.recorder.uses for name in (use.weight, use.bias) if name]
        return frozenset(name for section, name in [*uses, *self.recorder.used] if section == BEFORE)

    def _unneeded(self) -> frozenset[int]:
        names: set[str] = set()
        for layer, hidden, output in zip(self.decoder.layers, self.inputs, self.outputs, strict=True):
            nodes = {
                use.node: use.weight
                for use in self.recorder.uses
                if use.section == layer and use.weight is not None and use.node is not None
            }
            names |= only_added(output, nodes, hidden.grad_fn)
        return frozenset(id(self.parameters[name]) for name in names)

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


def _save_nothing(operand: Tensor) -> None:
    """What autograd saves of an operand."""


def _never_run(saved: None) -> Tensor:
    raise AssertionError("the graph of a probe is never run backward")


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
