"""What plain autograd gives on a few tokens: the model's own forward pass, an ordinary backward pass, one by one.

Of every row of every parameter one number is kept, the product of its gradient with a random vector, so that nothing
as large as the parameters is. Of weights that stay in the checkpoint autograd saves where they are to be read, instead
of the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from bridge.exchange.errors import RequestError, one_line
from llm_perturb.evaluation.causality import check_causal, later_tokens_matter, probe_sequences
from llm_perturb.evaluation.checkpoint import Checkpoint
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from critical_weight_analysis.layerwise.accumulators import SQUARES
from critical_weight_analysis.layerwise.decoder_structure import Structure
from critical_weight_analysis.whole_model import Gradients, logits_of, summed_loss

SHORT = 4  # tokens of the shorter sequence
Rows = dict[str, dict[str, Tensor]]  # by field and parameter: a number of every row


@dataclass(frozen=True)
class Expected:
    """What plain autograd gives on the tokens of the proof.

    Attributes:
        sequences: three, the last of which is the second again; (T_i + 1,) ids.
        losses: S_i of each, float64 (3,).
        rows: by field and parameter, a number of every row of the sums over the sequences; no fields where the losses
            alone are needed.
    """

    sequences: list[Tensor]
    losses: Tensor
    rows: Rows

    @property
    def n_tokens(self) -> int:
        """Different predicted tokens."""
        return sum(len(sequence) - 1 for sequence in self.sequences[:2])

    @property
    def idle(self) -> set[str]:
        """The parameters whose gradient is 0."""
        return {name for name, rows in self.rows.get("grad", {}).items() if not rows.any()}


class SavedWeight(NamedTuple):
    """Which part of a parameter autograd needs, saved instead of the values."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def by_autograd(
    model: PreTrainedModel,
    names: Sequence[str],
    needs: frozenset[str],
    structure: Structure | None = None,
    checkpoint: Checkpoint | None = None,
) -> Expected:
    """Run a few tokens through the model and back, in the ordinary way, and check that it is causal.

    Args:
        model: a causal language model in eval mode, no parameter requiring a gradient.
        names: the parameters that will be measured.
        needs: what will be needed of them.
        structure: of a model that does not hold its weights.
        checkpoint: where they are read from.

    Raises:
        RequestError: it cannot be done, or later tokens change earlier predictions.
    """
    fields = ["grad"] if needs else []
    if needs & SQUARES:
        fields.append("fisher")
    long, short = probe_sequences(model)
    sequences, counts = [long, short[:SHORT]], [1, 2]
    n_tokens = sum(count * (len(sequence) - 1) for sequence, count in zip(sequences, counts, strict=True))
    parameters = dict(model.named_parameters())
    rows = {field: {name: _no_rows(parameters[name]) for name in names} for field in fields}
    logits: list[Tensor] = []  # (SHORT - 1, V) of both
    losses: list[float] = []
    try:
        with _weights_at_hand(model, structure, checkpoint):
            for sequence, count in zip(sequences, counts, strict=True):
                of_square = count / sum(counts) / (len(sequence) - 1) ** 2
                hand_on = partial(_add, rows, {"grad": count / n_tokens, "fisher": of_square})
                with Gradients(model, names if fields else (), hand_on):
                    predictions = logits_of(model, sequence, with_graph=bool(fields))  # (T, V)
                    logits.append(predictions.detach()[: SHORT - 1])
                    loss = summed_loss(predictions, sequence)
                    if loss.requires_grad:
                        loss.backward()
                    losses.append(loss.item())
    except Exception as error:  # whatever a model makes of a few tokens
        action = "run forward and backward" if fields else "run"
        raise RequestError(f"the model cannot be {action} on the ids of a few tokens: {one_line(error)}") from error
    if later_tokens_matter(logits[0], logits[1]):
        with _weights_at_hand(model, structure, checkpoint):
            check_causal(model)  # which looks closer, and refuses it or not
    all_losses = torch.tensor([*losses, losses[1]], dtype=torch.float64)
    return Expected([*sequences, sequences[1]], all_losses, rows)


def _add(rows: Rows, factors: dict[str, float], name: str, gradient: Tensor) -> None:
    """Add dS_i/dθ of one sequence to the rows of the sums."""
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    rows["grad"][name].add_(numbers_of_rows(gradient), alpha=factors["grad"])
    if "fisher" in rows:
        rows["fisher"][name].add_(numbers_of_rows(gradient.square_()), alpha=factors["fisher"])


def numbers_of_rows(tensor: Tensor) -> Tensor:
    """A number of every row, (..., C) -> (R,): the product with a random vector, float32 or wider."""
    tensor = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    if tensor.ndim < 2:
        return tensor.reshape(-1).clone()
    return tensor.reshape(-1, tensor.shape[-1]) @ _random_vector(tensor.shape[-1]).to(tensor)


def _no_rows(parameter: Tensor) -> Tensor:
    """The rows of a sum that is still 0."""
    n = parameter.numel() // parameter.shape[-1] if parameter.ndim > 1 else parameter.numel()
    return torch.zeros(n, dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device)


@lru_cache
def _random_vector(length: int) -> Tensor:
    """Positive, so that sums of squares do not cancel."""
    return torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(length)) + 0.5


@contextmanager
def _weights_at_hand(
    model: PreTrainedModel, structure: Structure | None, checkpoint: Checkpoint | None
) -> Iterator[None]:
    """Weights of the checkpoint are there while their layer is run, and when autograd needs them again."""
    if checkpoint is None:
        yield
        return
    assert structure is not None, "only a model with a structure reads its weights from a checkpoint"
    parameters, owned = dict(model.named_parameters()), structure.decoder.parameters_by_layer()
    present: dict[int, str] = {}  # parameters of the layer that is running, by the memory they are in

    def enter(names: list[str]) -> Callable[..., None]:
        def look(*_: object) -> None:
            present.clear()
            present.update({parameters[name].untyped_storage().data_ptr(): name for name in names})

        return look

    def pack(tensor: Tensor) -> Tensor | SavedWeight:
        name = present.get(tensor.untyped_storage().data_ptr())
        if name is None or tensor.dtype != parameters[name].dtype:
            return tensor
        return SavedWeight(name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(saved: Tensor | SavedWeight) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with checkpoint.present([saved.name]):
            return parameters[saved.name].detach().as_strided(saved.size, saved.stride, saved.offset)

    with ExitStack() as stack:
        stack.enter_context(checkpoint.present(owned[""]))
        for name, layer in structure.decoder.layers.items():
            stack.enter_context(checkpoint.present_during(layer))
            stack.callback(layer.register_forward_pre_hook(enter(owned[name])).remove)
            stack.callback(layer.register_forward_hook(enter([])).remove)
        stack.enter_context(saved_tensors_hooks(pack, unpack))
        yield
