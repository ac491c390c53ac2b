"""Forward passes that begin at a decoder layer, from the hidden states kept at its input.

Perturbing a layer leaves everything before it as it was, so the layers before it need not run again. They
are replaced by stubs that return what the last of them gave; the rest of the model is untouched and computes
the same bits as a full pass.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_perturb.head import is_plain
from llm_perturb.perplexity import batch_losses, batches


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
        batch_size: sequences at a time; like sequences go together, as in ``perplexity.sequence_losses``.
    """

    def __init__(self, model: PreTrainedModel, sequences: list[Tensor], batch_size: int = 1) -> None:
        self.model, self.sequences = model, sequences
        is_plain(model)  # its trial must not run while a pass is being watched
        self.batches = batches(sequences, batch_size)
        self.path, self.layers = decoder_layers(model) or ("", nn.ModuleList())
        self.boundary = 0  # the first layer that runs
        self._kept: list = [None] * len(self.batches)

    def depth_of(self, parameter_names: list[str]) -> int:
        """The first decoder layer that these parameters can influence: 0 if one lies outside of the layers."""
        pattern = re.compile(re.escape(self.path) + r"\.(\d+)\.")
        found = [pattern.match(name) if self.path else None for name in parameter_names]
        return min((int(hit.group(1)) if hit else 0) for hit in found)

    @torch.no_grad()
    def move_to(self, layer: int) -> None:
        """Let later passes begin at ``layer``. Call it while no weight is perturbed."""
        if layer < self.boundary:
            self.boundary, self._kept = 0, [None] * len(self.batches)
        if layer == self.boundary:
            return
        kept = []

        def keep(module: nn.Module, inputs: object, output: object) -> None:
            kept.append(output)
            raise _Reached

        hook = self.layers[layer - 1].register_forward_hook(keep)
        try:
            for number in range(len(self.batches)):
                try:
                    self._batch_losses(number)
                except _Reached:
                    continue
        finally:
            hook.remove()
        self.boundary, self._kept = layer, kept

    @torch.no_grad()
    def losses(self) -> Tensor:
        """S_i of every sequence, float64 (n,), the same bits as a full pass gives."""
        losses = torch.empty(len(self.sequences), dtype=torch.float64)
        for number, chosen in enumerate(self.batches):
            losses[chosen] = self._batch_losses(number)
        return losses

    def _batch_losses(self, number: int) -> Tensor:
        with self._stubs(self._kept[number]):
            return batch_losses(self.model, [self.sequences[i] for i in self.batches[number]])

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
