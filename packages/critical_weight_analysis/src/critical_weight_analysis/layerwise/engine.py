"""Exact gradient sums of every parameter, one decoder layer at a time, last layer first.

The sequences go forward through one layer after another, and the hidden state at the input of each is kept. Then each
layer is run once more from there, with all sequences, and left backwards; its sums are handed out and forgotten
before the next layer begins. Besides the weights themselves nothing of the size of the model exists; and of the
weights no more than one layer's need be there.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from bridge.exchange.errors import RequestError
from torch import Tensor, nn
from tqdm import tqdm

from critical_weight_analysis.layerwise import embedding_and_head
from critical_weight_analysis.layerwise.activation_cache import Keeper, bytes_to_spare
from critical_weight_analysis.layerwise.batches import Batch, make_batch, members_of
from critical_weight_analysis.layerwise.gradient_sums import BY_PRODUCT, SQUARES, PartsOf, Sums, add, parts_of
from critical_weight_analysis.layerwise.hidden_states import HiddenStates
from critical_weight_analysis.layerwise.parallel import n_cores, on_cores
from critical_weight_analysis.layerwise.parameter_uses import Recorder
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.layerwise.probe import Structure, find, output_of, with_hidden
from critical_weight_analysis.metrics import Sensitivity

GIVES = frozenset({"grad", "fisher", "curvature", "tokens", "inputs"})


def sensitivities(
    model: nn.Module,
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
        needs: which fields of ``Sensitivity``, of those in ``GIVES``.
        settings: how it is done.

    Returns:
        S_i in nats, float64 (n,), on the CPU; and an iterator, one ``Sensitivity`` a parameter, the last layer's
        first. The next one's layer is computed when it is asked for; weights that are not held by the model are
        there until then.

    Raises:
        StructureError: the model cannot be taken apart between its layers.
        RequestError: something is needed that a parameter does not have.
        RunError: a loss or a sum is not finite.
    """
    structure = settings.structure or find(model, settings.checkpoint)
    others = [name for name in names if name not in structure.by_product]
    if needs & BY_PRODUCT and others:
        raise RequestError(
            f"wanda and grad_squared_token are defined for linear maps and embeddings, which {others[0]} is not; "
            "leave it out: --scope matrices, or --exclude"
        )
    one_pass = _Pass(structure, model, sequences, names, needs, settings)
    return one_pass.forward(), one_pass.backward()


class _Pass:
    """One pass: the batches, the sums that are complete only at its end, and the way forward and back."""

    def __init__(
        self,
        structure: Structure,
        model: nn.Module,
        sequences: list[Tensor],
        names: Sequence[str],
        needs: frozenset[str],
        settings: Settings,
    ) -> None:
        self.structure, self.needs, self.settings = structure, needs, settings
        self.lengths = [len(sequence) - 1 for sequence in sequences]
        owned, self.parameters = structure.owned(model), dict(model.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        self.owned, self.names = owned, list(names)
        self.wanted = {layer: [name for name in owned[layer] if name in set(names)] for layer in owned}
        self.done = settings.resume.layers if settings.resume and needs else 0  # layers, from the last one
        outside = self.wanted.pop("") if needs else []
        # the sums of what is before the layers alone are 0 until the very end
        self.last = [n for n in outside if n in structure.before and self.parameters[n] is not structure.head.weight]
        self.outside = self.sums_of([name for name in outside if name not in self.last])
        self.batches = self._make_batches(sequences)
        n_bytes = sum(batch.ids.numel() for batch in self.batches) * len(structure.layers) * _width(structure, model)
        self.states = HiddenStates(n_bytes, self.device, settings.scratch)
        total = 2 * len(structure.layers) if needs else len(structure.layers)
        self.bar = tqdm(total=total, disable=not settings.progress, leave=False)

    def _make_batches(self, sequences: list[Tensor]) -> list[Batch]:
        """This process's batches; of one sequence where more would change a number or mix what is to be squared."""
        apart = self.needs & (SQUARES | {"inputs"}) and not self.structure.by_batch >= set(self.names)
        size = self.settings.batch_size if self.structure.causal and not apart else 1
        # where not even the weights are held, memory is what is short
        spare = self.needs and not self.settings.checkpoint
        shares = self.settings.share(members_of(sequences, size))
        left = bytes_to_spare(self.parameters.values()) // len(shares) if spare and shares else 0
        return [
            make_batch(members, sequences, self.device, Keeper(left, self.structure.unneeded)) for members in shares
        ]

    def sums_of(self, names: Sequence[str]) -> dict[str, Sums]:
        """Sums that are still 0."""
        add_up = self.settings.add_up
        return {name: Sums(name, self.parameters[name], self.needs, self.lengths, add_up) for name in names}

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Through the model, layer by layer, to the losses; then back to the last layer's output."""
        before = {*self.owned[""]}
        with self.settings.present(before & self.structure.before):
            for batch in self.batches:
                embedding_and_head.enter(self.structure, batch)
        to_come = len(self.structure.layers) - self.done if self.needs else 0
        for depth, (layer, module) in enumerate(self.structure.layers.items()):
            self.bar.set_description(f"forward {layer}")
            with self.settings.present(self.owned[layer]):
                through = partial(self._through, layer, module, depth < to_come)
                on_cores(self.device, through, enumerate(self.batches))
            self.bar.update()
        losses = torch.zeros(len(self.lengths), dtype=torch.float64)
        with self.settings.present(before):
            for batch in self.batches:
                embedding_and_head.leave(self.structure, batch, self.outside, losses)
        self.settings.add_up(losses)
        return losses

    def _through(self, layer: str, module: nn.Module, again: bool, numbered: tuple[int, Batch]) -> None:
        """One batch forward through one layer."""
        number, batch = numbered
        args, kwargs = with_hidden(batch.hidden, *batch.calls[layer])
        if again:
            self.states.put((layer, number), batch.hidden)
        with batch.keeper.record(layer, again):
            batch.hidden = output_of(module(*args, **kwargs))

    def backward(self) -> Iterator[Sensitivity]:
        """The way back: what is after the layers, every layer, what is before them."""
        if not self.needs:
            yield from self._weights_alone()
            return
        resume = self.settings.resume
        if self.done:
            for batch, gradient in zip(self.batches, resume.take_gradients(), strict=True):
                batch.gradient = gradient.to(self.device)
        after = [name for name in self.outside if name not in self.structure.before]
        yield from self._finish({name: self.outside.pop(name) for name in after}, hand_out=not self.done)
        for number, layer in enumerate(reversed(self.structure.layers)):
            if not self.outside and not self.last and not any(self.wanted.values()):
                break  # nothing that is asked for lies further back
            own = self.wanted.pop(layer)
            if number < self.done:
                continue
            self.bar.set_description(f"backward {layer}")
            with self.settings.present(self.owned[layer]):
                yield from self._layer(layer, self.sums_of(own))
            self.bar.update()
            if resume:
                resume.save(number + 1, [batch.gradient for batch in self.batches])
        self.outside |= self.sums_of(self.last)
        with self.settings.present(self.structure.before):
            for batch in self.batches if self.outside else []:
                embedding_and_head.back_to_embedding(self.structure, batch, self.outside)
        self.bar.close()
        yield from self._finish(self.outside)

    def _layer(self, layer: str, sums: dict[str, Sums]) -> Iterator[Sensitivity]:
        """Back through one layer with all sequences: the sums of its parameters."""
        numbered, back = list(enumerate(self.batches)), partial(self._back, layer, sums)
        step = n_cores(self.device)
        for start in range(0, len(numbered), step):
            add(on_cores(self.device, back, numbered[start : start + step]), sums, self.device)
        for name in list(sums):
            yield sums.pop(name).finish()

    def _back(self, layer: str, sums: dict[str, Sums], numbered: tuple[int, Batch]) -> PartsOf:
        """One batch back through one layer: what the gradients of its sequences are made of."""
        number, batch = numbered
        hidden = self.states.take((layer, number)).detach().requires_grad_()  # (B, T, H)
        args, kwargs = with_hidden(hidden, *batch.calls.pop(layer))
        recorder = Recorder({name: s.parameter for name, s in sums.items()})
        with torch.enable_grad(), batch.keeper.replay(layer), recorder:
            output = output_of(self.structure.layers[layer](*args, **kwargs))
        output.backward(batch.gradient)
        batch.gradient = hidden.grad
        return parts_of(recorder, batch, sums)

    def _finish(self, sums: dict[str, Sums], hand_out: bool = True) -> Iterator[Sensitivity]:
        for name in list(sums):
            with self.settings.present([name]):
                found = sums.pop(name).finish()
                if hand_out:
                    yield found

    def _weights_alone(self) -> Iterator[Sensitivity]:
        self.bar.close()
        for name in self.names:
            with self.settings.present([name]):
                yield Sensitivity(name, self.parameters[name].detach())


def _width(structure: Structure, model: nn.Module) -> int:
    """Bytes of one token's hidden state."""
    return structure.head.in_features * next(model.parameters()).element_size()
