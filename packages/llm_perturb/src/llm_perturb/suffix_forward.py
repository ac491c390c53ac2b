"""Forward passes that begin at a decoder layer, from the hidden states kept at its input.

Perturbing a layer leaves everything before it as it was, so the layers before it need not run again. They
are replaced by stubs that return what the last of them gave; the rest of the model is untouched and computes
the same bits as a full pass. Where the layers are not built that way, or pass things on by another way than what they
return, every pass is a full one.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property

import torch
from bridge.exchange.errors import one_line
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from llm_perturb.evaluation.lm_loss import is_plain
from llm_perturb.evaluation.perplexity import Measured, Reference, batches, in_order, measure_batch


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """The forward pass has come as far as it was wanted."""


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """The path and the list of the decoder layers; None when the model is not built that way."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return lists[0] if len(lists) == 1 else None


class Restart:
    """The losses of a corpus from a decoder layer on.

    Args:
        model: a causal language model in eval mode.
        sequences: each (T_i + 1,) ids.
        batch_size: sequences at a time; like sequences go together, as in ``perplexity.measure``.
        reference: the unperturbed predictions, where the divergence from them is wanted.
    """

    def __init__(
        self, model: PreTrainedModel, sequences: list[Tensor], batch_size: int = 1, reference: Reference | None = None
    ) -> None:
        self.model, self.sequences, self.reference = model, sequences, reference
        is_plain(model)  # its trial must not run while a pass is being watched
        self.batches = batches(sequences, batch_size)
        self.path, self.layers = decoder_layers(model) or ("", nn.ModuleList())
        self.boundary = 0  # the first layer that runs
        self._kept: list = [None] * len(self.batches)
        self._given_up = False
        self._said: set[str] = set()

    def depth_of(self, parameter_names: list[str]) -> int:
        """The first decoder layer that these parameters can influence; the number of layers if they come after all."""
        pattern = re.compile(re.escape(self.path) + r"\.(\d+)\.")

        def depth(name: str) -> int:
            inside = pattern.match(name) if self.path else None
            return int(inside.group(1)) if inside else len(self.layers) if name in self._after_layers else 0

        return min(map(depth, parameter_names))

    @cached_property
    def _after_layers(self) -> set[str]:
        """The parameters all of whose modules run after the last layer and none before; seen from a trial."""
        try:
            return used_after(self.model, self.layers[-1]) if self.path else set()
        except Exception:  # whatever a model makes of the trial
            return set()

    def move_to(self, layer: int) -> None:
        """Let later passes begin at ``layer``, if that is possible. Call it while no weight is perturbed."""
        if layer < self.boundary:
            self._begin_at_the_first()
        if layer == self.boundary or self._given_up:
            return
        try:
            self._kept = self._outputs_of(layer - 1)
            self.boundary = layer
        except Exception as error:  # whatever a model makes of layers that are left out
            self.give_up(one_line(error))

    def give_up(self, reason: str) -> None:
        """Let every later pass be a full one, and say so."""
        self._begin_at_the_first()
        self._given_up = True
        self.say(f"every measurement is a full forward pass, because none can begin at a layer: {reason}")

    def say(self, line: str) -> None:
        """Print a line, once."""
        if line not in self._said:
            tqdm.write(line, sys.stderr)
        self._said.add(line)

    def _begin_at_the_first(self) -> None:
        self.boundary, self._kept = 0, [None] * len(self.batches)

    @torch.no_grad()
    def _outputs_of(self, layer: int) -> list:
        """What a layer returns for each batch.

        Raises:
            RuntimeError: it is not called after those before it in the list, each once.
        """
        outputs, called = [], []

        def keep(module: nn.Module, inputs: object, output: object) -> None:
            outputs.append(output)
            raise _Reached

        hooks = [one.register_forward_pre_hook(lambda module, inputs: called.append(module)) for one in self.layers]
        hooks.append(self.layers[layer].register_forward_hook(keep))
        try:
            for number in range(len(self.batches)):
                called.clear()
                with suppress(_Reached):
                    self.measure_batch(number)
                if called != list(self.layers[: layer + 1]):
                    raise RuntimeError("the layers are not called in the order of their list, each once")
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    def is_exact(self, number: int, baseline: Tensor) -> bool:
        """Whether a pass of a batch of the unperturbed model gives the S_i of full passes, to the last bit."""
        try:
            return torch.equal(self.measure_batch(number).losses, baseline[self.batches[number]])
        except Exception:  # whatever a model makes of layers that are left out
            return False

    def losses(self) -> Tensor:
        """S_i of every sequence, float64 (n,), the same bits as a full pass gives."""
        return self.measure().losses

    def measure(self) -> Measured:
        """Every sequence, the same bits as a full pass gives."""
        return in_order(self.batches, [self.measure_batch(number) for number in range(len(self.batches))])

    @torch.no_grad()
    def measure_batch(self, number: int, copies: int = 1) -> Measured:
        """One batch B, or several copies of it in one pass, one after the other: (copies * B,)."""
        reference = self.reference and (self.reference.head, self.reference.hidden[number])
        with self._stubs(_repeat(self._kept[number], copies)):
            return measure_batch(self.model, [self.sequences[i] for i in self.batches[number]] * copies, reference)

    @contextmanager
    def _stubs(self, kept: object) -> Iterator[None]:
        """The layers before the boundary return ``kept`` and compute nothing."""
        skipped = self.layers[: self.boundary]
        for layer in skipped:
            layer.forward = lambda *args, **kwargs: kept
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward


def _repeat(kept: object, copies: int) -> object:
    """What a layer gave for a batch, as it would give it for copies of the batch one after the other."""
    if copies == 1:
        return kept
    if isinstance(kept, Tensor):
        return kept.repeat(copies, *[1] * (kept.ndim - 1))
    return type(kept)(_repeat(part, copies) for part in kept) if isinstance(kept, tuple | list) else kept


@torch.no_grad()
def used_after(model: PreTrainedModel, layer: nn.Module) -> set[str]:
    """The parameters that only modules use which run after ``layer``, and not before; seen from a trial."""
    seen: list[nn.Module | None] = []  # modules as they are called, None where the layer ends
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [m.register_forward_pre_hook(lambda module, inputs: seen.append(module)) for m in owners]
    hooks.append(layer.register_forward_hook(lambda module, inputs, output: seen.append(None)))
    ids = torch.arange(min(8, model.config.get_text_config().vocab_size), device=model.device)[None]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    after = set(seen[seen.index(None) :]) - set(seen[: seen.index(None)])
    elsewhere = {id(p) for module in owners if module not in after for p in module.parameters(recurse=False)}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in elsewhere}
