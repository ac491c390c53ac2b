"""Forward passes that begin at a decoder layer, from the hidden states saved at its input.

Perturbing a layer leaves everything before it as it was, so the layers before it need not run again. They
are replaced by stubs that return what the last of them gave; the rest of the model is untouched and computes
the same bits as a full pass. Where the layers are not built that way, or pass things on by another way than what they
return, every pass is a full one.
"""

import re
from functools import cached_property, partial

import torch
from bridge.exchange.errors import one_line
from torch import Tensor
from transformers import PreTrainedModel

from llm_perturb.evaluation.decoder import Decoder
from llm_perturb.evaluation.decoder_head import is_plain
from llm_perturb.evaluation.perplexity import Measured, Reference, batches, in_order, measure_batch
from llm_perturb.evaluation.progress import note


class SuffixForward:
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
        is_plain(model)  # its probe must not run while a pass is being watched
        self.batches = batches(sequences, batch_size)
        self.decoder = Decoder.of(model)
        self.boundary = 0  # the first layer that runs
        self._outputs: list[object] = [None] * len(self.batches)  # of the layer before the boundary
        self._given_up = False
        self._said: set[str] = set()

    def depth_of(self, parameter_names: list[str]) -> int:
        """The first decoder layer that these parameters can influence; the number of layers if they come after all."""
        return min(self._depth(name) for name in parameter_names)

    def _depth(self, name: str) -> int:
        if self.decoder is None:
            return 0
        in_layer = re.match(re.escape(self.decoder.path) + r"\.(\d+)\.", name)
        if in_layer:
            return int(in_layer.group(1))
        return len(self.decoder.layers) if name in self._after_layers else 0

    @cached_property
    def _after_layers(self) -> set[str]:
        """The parameters all of whose modules run after the last layer and none before, as a probe shows."""
        try:
            return self.decoder.parameters_after_layers() if self.decoder else set()
        except Exception:  # whatever a model makes of the probe
            return set()

    def move_to(self, layer: int) -> None:
        """Let later passes begin at ``layer``, if that is possible. Call it while no weight is perturbed."""
        if layer < self.boundary:
            self._begin_at_the_first()
        if layer == self.boundary or self._given_up:
            return
        try:
            self._outputs = self._outputs_of(layer - 1)
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
            note(line)
        self._said.add(line)

    def _begin_at_the_first(self) -> None:
        self.boundary = 0
        self._outputs = [None] * len(self.batches)

    def _outputs_of(self, layer: int) -> list[object]:
        """What a layer returns for each batch."""
        assert self.decoder is not None
        passes = [partial(self.measure_batch, number) for number in range(len(self.batches))]
        return self.decoder.outputs_of(layer, passes)

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
        reference = None
        if self.reference is not None:
            reference = self.reference.head, self.reference.hidden[number]
        sequences = [self.sequences[i] for i in self.batches[number]] * copies
        if self.decoder is None or self.boundary == 0:
            return measure_batch(self.model, sequences, reference)
        with self.decoder.starting_at(self.boundary, _repeat(self._outputs[number], copies)):
            return measure_batch(self.model, sequences, reference)


def _repeat(output: object, copies: int) -> object:
    """What a layer gave for a batch, as it would give it for copies of the batch one after the other."""
    if copies == 1:
        return output
    if isinstance(output, Tensor):
        return output.repeat(copies, *[1] * (output.ndim - 1))
    return type(output)(_repeat(part, copies) for part in output) if isinstance(output, tuple | list) else output
