"""The embedding, which comes before the decoder layers, and the output head with the loss, which come after them."""

from itertools import accumulate
from typing import Any

import torch
from bridge.exchange.errors import RunError
from llm_perturb.evaluation.decoder import layer_input
from torch import Tensor, nn

from critical_weight_analysis.layerwise import output_head
from critical_weight_analysis.layerwise.batches import Batch
from critical_weight_analysis.layerwise.decoder_structure import Structure
from critical_weight_analysis.layerwise.gradient_sums import GradientSums, add, pieces_by_sequence
from critical_weight_analysis.layerwise.output_head import Block
from critical_weight_analysis.layerwise.parameter_uses import Recorder

LOGIT_ROWS = 512  # tokens whose logits exist together


class EmbeddingAndHead:
    """What a pass does outside of the decoder layers, batch by batch.

    Args:
        structure: of the model.
        sums: of the parameters that are in no layer, to be added to; more may join them before the embedding's turn.
        n_sequences: of the whole corpus.

    Attributes:
        losses: S_i of every sequence, in nats, float64 (n,).
    """

    def __init__(self, structure: Structure, sums: dict[str, GradientSums], n_sequences: int) -> None:
        self.structure = structure
        self.sums = sums
        self.losses = torch.zeros(n_sequences, dtype=torch.float64)

    @torch.no_grad()
    def embed(self, batch: Batch) -> None:
        """Run what comes before the layers: the hidden state at the first one, and what each layer is called with."""
        batch.calls = self.structure.decoder.embed(batch.ids)
        batch.hidden = layer_input(next(iter(batch.calls.values())))

    @torch.enable_grad()
    def loss_and_back(self, batch: Batch) -> None:
        """Run what comes after the layers, and backpropagate from the loss to the last layer's output.

        Args:
            batch: with the last layer's output as its hidden state.
        """
        at_last_layer = batch.hidden.detach().requires_grad_()  # (B, T, H)
        recorder = Recorder({name: one.parameter for name, one in self.sums.items() if not self._is_of_head(one)})
        hidden, logits, head_output = self._leave(batch, at_last_layer, recorder)
        gradient = torch.zeros_like(hidden)  # dS/d hidden, (B, T, H)
        for rows in batch.groups(LOGIT_ROWS if self.structure.plain_head else 1):
            received = torch.cat([hidden[row, : len(batch.targets[row])].detach() for row in rows])  # (N, H)
            targets = torch.cat([batch.targets[row] for row in rows])  # (N,)
            if self.structure.plain_head:
                nats, blocks = output_head.plain_loss(self.structure.head, received, targets)
            else:
                real = rows[0], slice(len(targets))  # a group of one sequence
                nats, blocks = output_head.any_loss(logits, head_output, real, targets)
            self._add_losses(batch, rows, nats)
            at_hidden = self._back_through_head(batch, rows, received, blocks)  # (N, H)
            for row, tokens in zip(rows, _tokens_of(batch, rows), strict=True):
                gradient[row, : len(batch.targets[row])] = at_hidden[tokens]
        self._add_last_inputs(batch, hidden)
        hidden.backward(gradient)
        assert at_last_layer.grad is not None
        batch.gradient = at_last_layer.grad
        batch.forget_hidden()
        add([pieces_by_sequence(recorder, batch, self.sums)], self.sums, gradient.device)

    def back_to_embedding(self, batch: Batch) -> None:
        """Run what comes before the layers once more, one sequence at a time, and backpropagate to its parameters."""
        parameters = {name: one.parameter for name, one in self.sums.items()}
        for row, (i, targets) in enumerate(zip(batch.members, batch.targets, strict=True)):
            real = slice(row, row + 1), slice(len(targets) + 1)
            recorder = Recorder(parameters)
            with torch.enable_grad(), recorder:
                hidden = self.structure.decoder.embed_only(batch.ids[real])  # (1, T_i + 1, H)
            hidden.backward(batch.gradient[real])
            for name, pieces in recorder.pieces().items():
                self.sums[name].add([(i, pieces)])

    def _leave(self, batch: Batch, at_last_layer: Tensor, recorder: Recorder) -> tuple[Tensor, Tensor, Tensor]:
        """Run what comes after the layers.

        Returns:
            What the head receives (B, T, H), the logits and what the head returns (B, T, V); where the head is plain,
            it is not run, and the last two are empty.
        """
        head_calls: list[tuple[Tensor, Tensor]] = []

        def cut(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            head_calls.append((args[0], output.detach().requires_grad_()))
            return head_calls[0][1].clone()

        def record_after_last(is_last: bool) -> None:
            recorder.paused = not is_last

        recorder.paused = True
        handle = self.structure.head.register_forward_hook(cut)  # without effect where the head is not run
        try:
            with recorder:
                result = self.structure.decoder.leave(batch.ids, at_last_layer, record_after_last)
        finally:
            handle.remove()
        if self.structure.plain_head:
            return result.last_hidden_state, torch.empty(0), torch.empty(0)
        hidden, head_output = head_calls[0]
        return hidden, result.logits, head_output

    def _add_losses(self, batch: Batch, rows: list[int], nats: Tensor) -> None:
        for row, tokens in zip(rows, _tokens_of(batch, rows), strict=True):
            i = batch.members[row]
            self.losses[i] = nats[tokens].double().sum()
            if not self.losses[i].isfinite():
                raise RunError(f"the loss of sequence {i} is not finite")

    def _back_through_head(self, batch: Batch, rows: list[int], received: Tensor, blocks: list[Block]) -> Tensor:
        """Backpropagate some sequences through the head: add to its sums; the gradient at its input, (N, H)."""
        weight = self._sums_of(self.structure.head.weight)
        tokens_of = dict(zip((batch.members[row] for row in rows), _tokens_of(batch, rows), strict=True))
        ids = None
        if weight is not None and weight.name in self.structure.before:  # the embedding's table, too
            ids = {batch.members[row]: batch.ids[row, : len(batch.targets[row])] for row in rows}
        return output_head.back(
            head=self.structure.head,
            hidden=received,
            blocks=blocks,
            rows=tokens_of,
            weight=weight,
            bias=self._sums_of(self.structure.head.bias),
            ids=ids,
        )

    def _add_last_inputs(self, batch: Batch, hidden: Tensor) -> None:
        """Count the last token of each sequence among the head's inputs, though it predicts nothing."""
        weight = self._sums_of(self.structure.head.weight)
        if weight is not None and weight.inputs is not None:
            for row, targets in enumerate(batch.targets):
                weight.inputs.add_input(hidden[row, len(targets)].detach())

    def _is_of_head(self, one: GradientSums) -> bool:
        return one.parameter is self.structure.head.weight or one.parameter is self.structure.head.bias

    def _sums_of(self, parameter: Tensor | None) -> GradientSums | None:
        return next((one for one in self.sums.values() if one.parameter is parameter), None)


def _tokens_of(batch: Batch, rows: list[int]) -> list[slice]:
    """Where the predicted tokens of each sequence are when those of all ``rows`` stand one after another."""
    ends = accumulate(len(batch.targets[row]) for row in rows)
    return [slice(end - len(batch.targets[row]), end) for row, end in zip(rows, ends, strict=True)]
