"""The layer-by-layer engine: exact gradient sums of every parameter, one decoder layer at a time, last layer first.

The forward pass takes all sequences through one layer after another and saves the hidden state at the input of each.
The backward pass runs each layer forward once more from there, to have its graph, and backpropagates through it with
all sequences; its sums are handed out and freed before the next layer begins. Besides the weights themselves
nothing of the size of the model exists; and of the weights no more than one layer's need be in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from critical_weight_analysis.layerwise.accumulators import BY_PRODUCT, SQUARES
from critical_weight_analysis.layerwise.activation_cache import ActivationCache, bytes_to_spare
from critical_weight_analysis.layerwise.batches import Batch, make_batch, members_of
from critical_weight_analysis.layerwise.decoder_structure import Structure
from critical_weight_analysis.layerwise.embedding_and_head import EmbeddingAndHead
from critical_weight_analysis.layerwise.gradient_sums import GradientSums, PiecesBySequence, add, pieces_by_sequence
from critical_weight_analysis.layerwise.hidden_states import HiddenStates
from critical_weight_analysis.layerwise.parallel import n_cores, on_cores
from critical_weight_analysis.layerwise.parameter_uses import Recorder
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.metrics import Sensitivity


@dataclass(frozen=True)
class LayerwiseEngine:
    """Measures a model layer by layer.

    Attributes:
        structure: of the model.
        account: why this engine, in one line.
        together: whether sequences may be run as a batch.
    """

    structure: Structure = field(repr=False)
    account: str = "layer by layer"
    together: bool = True
    name: ClassVar[str] = "layerwise"
    gives: ClassVar[frozenset[str]] = frozenset({"grad", "fisher", "curvature", "tokens", "inputs"})

    def sensitivities(
        self,
        model: PreTrainedModel,
        sequences: list[Tensor],
        names: Sequence[str],
        needs: frozenset[str],
        settings: Settings = Settings(),  # noqa: B008 - frozen
    ) -> tuple[Tensor, Iterator[Sensitivity]]:
        """The loss of every sequence, and the sums that the metrics need of every parameter named.

        Args:
            model: a causal language model in eval mode, no parameter requiring a gradient.
            sequences: each (T_i + 1,) ids, which predict T_i tokens.
            names: parameters, by their first names.
            needs: which fields of ``Sensitivity``, of those in ``gives``.
            settings: how it is done.

        Returns:
            S_i in nats, float64 (n,), on the CPU; and an iterator, one ``Sensitivity`` a parameter, the last layer's
            first. The next one's layer is computed when it is asked for; weights that are not held by the model are
            there until then.

        Raises:
            RequestError: something is needed that a parameter does not have.
            RunError: a loss or a sum is not finite.
        """
        others = [name for name in names if name not in self.structure.by_product]
        if needs & BY_PRODUCT and others:
            raise RequestError(
                f"wanda and grad_squared_token are defined for linear maps and embeddings, which {others[0]} is not; "
                "leave it out: --scope matrices, or --exclude"
            )
        if not self.together:
            settings = replace(settings, batch_size=1)
        one_pass = _Pass(self.structure, model, sequences, names, needs, settings)
        return one_pass.forward(), one_pass.backward()


class _Pass:
    """One forward and one backward pass over all batches, and the sums that are complete only at the end."""

    def __init__(
        self,
        structure: Structure,
        model: PreTrainedModel,
        sequences: list[Tensor],
        names: Sequence[str],
        needs: frozenset[str],
        settings: Settings,
    ) -> None:
        self.structure = structure
        self.layers = list(structure.decoder.layers)
        self.needs = needs
        self.settings = settings
        self.names = list(names)
        self.lengths = [len(sequence) - 1 for sequence in sequences]  # T_i
        self.parameters = dict(model.named_parameters())
        self.device = model.device
        self.owned = structure.decoder.parameters_by_layer()
        chosen = set(names)
        self.wanted = {layer: [name for name in owned if name in chosen] for layer, owned in self.owned.items()}
        outside = self.wanted.pop("") if needs else []
        # the sums of what acts before the layers alone stay 0 until the very end, and are not held until then
        tied = structure.head.weight
        self.embedding_names = [n for n in outside if n in structure.before and self.parameters[n] is not tied]
        self.outside = self.sums_of([name for name in outside if name not in self.embedding_names])
        self.embedding_and_head = EmbeddingAndHead(structure, self.outside, len(sequences))
        self.done = settings.resume.layers if settings.resume and needs else 0  # layers, from the last one
        self.batches = self._make_batches(sequences)
        bytes_per_token = structure.head.in_features * next(iter(self.parameters.values())).element_size()
        n_bytes = sum(batch.ids.numel() for batch in self.batches) * len(self.layers) * bytes_per_token
        self.states = HiddenStates(n_bytes, self.device, settings.scratch)
        n_steps = 2 * len(self.layers) if needs else len(self.layers)
        self.progress = Progress(n_steps, "layers", settings.progress)

    def _make_batches(self, sequences: list[Tensor]) -> list[Batch]:
        """This process's batches; of one sequence where more would change a number or mix what is to be squared."""
        apart = self.needs & (SQUARES | {"inputs"}) and not self.structure.by_batch >= set(self.names)
        size = self.settings.batch_size if self.structure.causal and not apart else 1
        shares = self.settings.share(members_of(sequences, size))
        budget = 0  # bytes of each batch's cache
        if self.needs and shares and not self.settings.checkpoint:  # where weights are streamed, memory is scarce
            budget = bytes_to_spare(self.parameters.values()) // len(shares)
        return [
            make_batch(members, sequences, self.device, ActivationCache(budget, self.structure.unneeded))
            for members in shares
        ]

    def sums_of(self, names: Sequence[str]) -> dict[str, GradientSums]:
        """Sums that are still 0."""
        return {
            name: GradientSums(
                name=name,
                parameter=self.parameters[name],
                needs=self.needs,
                lengths=self.lengths,
                reduce=self.settings.add_up,
            )
            for name in names
        }

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The forward pass: embedding, layer by layer, head and loss; then back to the last layer's output.

        Returns:
            S_i, float64 (n,).
        """
        with self.settings.present(set(self.owned[""]) & self.structure.before):
            for batch in self.batches:
                self.embedding_and_head.embed(batch)
        n_second_forwards = len(self.layers) - self.done if self.needs else 0
        for depth, layer in enumerate(self.layers):
            self.progress.at(f"forward {layer}")
            run = partial(self._forward_through_layer, layer, depth < n_second_forwards)
            with self.settings.present(self.owned[layer]):
                on_cores(self.device, run, enumerate(self.batches))
            self.progress.update()
        with self.settings.present(self.owned[""]):
            for batch in self.batches:
                self.embedding_and_head.loss_and_back(batch)
        losses = self.embedding_and_head.losses
        self.settings.add_up(losses)
        return losses

    def backward(self) -> Iterator[Sensitivity]:
        """The backward pass: head, layer by layer, embedding; the sums of each parameter as soon as they are whole."""
        if not self.needs:
            yield from self._weights_alone()
            return
        resume = self.settings.resume
        if resume and self.done:
            for batch, gradient in zip(self.batches, resume.take_gradients(), strict=True):
                batch.gradient = gradient.to(self.device)  # dS/d hidden at the input of the last layer done, (B, T, H)
        # what acts after the layers only is complete; a resumed run has handed it out before
        after = {name: self.outside.pop(name) for name in list(self.outside) if name not in self.structure.before}
        for sensitivity in self._finished(after):
            if not self.done:
                yield sensitivity
        for number, layer in enumerate(reversed(self.layers)):
            if not self.outside and not self.embedding_names and not any(self.wanted.values()):
                break  # nothing that is asked for lies before this layer
            names = self.wanted.pop(layer)
            if number < self.done:
                continue
            self.progress.at(f"backward {layer}")
            with self.settings.present(self.owned[layer]):
                sums = self.sums_of(names)
                numbered = list(enumerate(self.batches))
                step = n_cores(self.device)
                for start in range(0, len(numbered), step):
                    run = partial(self._back_through_layer, layer, sums)
                    pieces = on_cores(self.device, run, numbered[start : start + step])
                    add(pieces, sums, self.device)
                for name in names:
                    yield sums.pop(name).finish()
            self.progress.update()
            if resume:
                resume.save(number + 1, [batch.gradient for batch in self.batches])
        self.outside.update(self.sums_of(self.embedding_names))
        with self.settings.present(self.structure.before):
            for batch in self.batches if self.outside else []:
                self.embedding_and_head.back_to_embedding(batch)
        self.progress.close()
        yield from self._finished(self.outside)

    def _forward_through_layer(self, layer: str, runs_again: bool, numbered: tuple[int, Batch]) -> None:
        number, batch = numbered
        if runs_again:
            self.states.put((layer, number), batch.hidden)  # (B, T, H)
        with batch.cache.first_forward(layer, save=runs_again):
            batch.hidden = self.structure.decoder.run_layer(layer, batch.hidden, batch.calls[layer])

    def _back_through_layer(
        self, layer: str, sums: dict[str, GradientSums], numbered: tuple[int, Batch]
    ) -> PiecesBySequence:
        """Run one batch forward through a layer again, and backpropagate: the gradient pieces of its sequences."""
        number, batch = numbered
        hidden = self.states.take((layer, number)).detach().requires_grad_()  # (B, T, H)
        recorder = Recorder({name: one.parameter for name, one in sums.items()})
        with torch.enable_grad(), batch.cache.second_forward(layer), recorder:
            output = self.structure.decoder.run_layer(layer, hidden, batch.calls.pop(layer))  # (B, T, H)
        output.backward(batch.gradient)
        assert hidden.grad is not None
        batch.gradient = hidden.grad  # (B, T, H)
        return pieces_by_sequence(recorder, batch, sums)

    def _finished(self, sums: dict[str, GradientSums]) -> Iterator[Sensitivity]:
        for name in list(sums):
            with self.settings.present([name]):
                yield sums.pop(name).finish()

    def _weights_alone(self) -> Iterator[Sensitivity]:
        self.progress.close()
        for name in self.names:
            with self.settings.present([name]):
                yield Sensitivity(name, self.parameters[name].detach())
