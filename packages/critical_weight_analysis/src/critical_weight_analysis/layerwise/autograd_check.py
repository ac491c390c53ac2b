"""The proof of the layer-by-layer engine on a few tokens of the model, before it is trusted with a corpus.

Its losses and gradients are compared with those of plain autograd: the model's own forward pass and an ordinary
backward pass, one sequence at a time. The engine is run on three sequences, two of different lengths as a padded batch
and then one alone, so that padding, telling sequences apart and going from one batch to the next all take part. Where
that fails it is tried one by one. Of every row of every parameter one number is compared, the product of its gradient
with a random vector, so that nothing as large as the parameters is kept.

Weights that stay in the checkpoint are proved in the same way: autograd saves where a weight is to be read instead of
the weight. Every layer could be compared on its own instead, without reading the checkpoint four times more, but
nothing would then be known of what passes between the layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
from critical_weight_analysis.layerwise.engine import LayerwiseEngine
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.layerwise.probe import Structure
from critical_weight_analysis.whole_model import Gradients, logits_of, summed_loss

FIELDS = frozenset({"grad", "fisher"})  # of which every other sum over sequences is formed in the same way
SHORT = 4  # tokens of the shorter sequence
OF_LAYER = 1e-2  # share of a layer's largest gradient below which one may be nothing but rounding
Rows = dict[str, dict[str, Tensor]]  # by field and parameter: a number of every row


class SavedWeight(NamedTuple):
    """Which part of a parameter autograd needs, saved instead of the values."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class ProofError(Exception):
    """The engine does not give what autograd gives; the message says where."""


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Attributes:
        together: whether sequences may be run as a batch.
        expected: what was compared with.
        difference: the largest one between the engine and autograd, relative to the norm of a parameter's gradient.
        obstacle: why not in batches.
    """

    together: bool
    expected: "Expected"
    difference: float
    obstacle: str | None = None

    def account(self, seconds: float) -> str:
        """In one line."""
        one_by_one = f", one sequence at a time because in batches {self.obstacle}" if self.obstacle else ""
        idle = len(self.expected.idle)
        not_proved = f"; {idle} parameters took no part and are not proved" if idle else ""
        return (
            f"layer by layer{one_by_one}: proved on {self.expected.n_tokens} tokens against autograd "
            f"in {seconds:.1f} s, largest difference {self.difference:.0e}{not_proved}"
        )


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
    rows["grad"][name].add_(_rows(gradient), alpha=factors["grad"])
    if "fisher" in rows:
        rows["fisher"][name].add_(_rows(gradient.square_()), alpha=factors["fisher"])


def prove(
    model: PreTrainedModel, structure: Structure, expected: Expected, checkpoint: Checkpoint | None = None
) -> Proof:
    """Compare the layer-by-layer engine with autograd: in batches, and one by one where that fails.

    Args:
        model: as above.
        structure: what the engine goes by.
        expected: what autograd gives.
        checkpoint: as above.

    Raises:
        ProofError: the engine fails, or gives something else one by one, too.
    """
    together = Settings(batch_size=2, checkpoint=checkpoint)
    try:
        return Proof(True, expected, _difference(model, structure, expected, together))
    except ProofError as error:
        alone = replace(together, batch_size=1)
        return Proof(False, expected, _difference(model, structure, expected, alone), str(error))


def _difference(model: PreTrainedModel, structure: Structure, expected: Expected, settings: Settings) -> float:
    """The largest difference between the engine and autograd.

    Raises:
        ProofError: it is larger than rounding makes it, or the engine fails.
    """
    names = list(expected.rows.get("grad", ()))
    by_engine: Rows = {field: {} for field in expected.rows}
    try:
        engine = LayerwiseEngine(structure)
        losses, stream = engine.sensitivities(model, expected.sequences, names, frozenset(by_engine), settings)
        for sensitivity in stream:
            for field, rows in by_engine.items():
                rows[sensitivity.name] = _rows(getattr(sensitivity, field))
    except Exception as error:  # whatever a layer makes of being run again
        raise ProofError(f"it fails: {one_line(error)}") from error
    eps = torch.finfo(model.dtype).eps
    largest = ((losses - expected.losses).abs() / expected.losses.abs()).max().item()
    if not largest <= max(1e-4, 8 * eps):
        raise ProofError(f"its losses differ from those of a plain forward pass by {largest:.2g} of their size")
    for field, rows in by_engine.items():
        for owned in structure.decoder.parameters_by_layer().values():
            members = [name for name in owned if name in rows]
            for name, difference in _differences(rows, expected.rows[field], members).items():
                if not difference <= max(1e-3, 64 * eps):  # rounding grows from layer to layer
                    raise ProofError(_described(name, field, rows[name], difference))
                largest = max(largest, difference)
    return largest


def _differences(rows: dict[str, Tensor], expected: dict[str, Tensor], members: list[str]) -> dict[str, float]:
    """|rows - expected| / |expected| of the parameters of a layer, with a floor for what is small there."""
    norms = {name: expected[name].norm().item() for name in members}
    floor = OF_LAYER * max(norms.values(), default=0)
    return {name: (rows[name] - expected[name]).norm().item() / (max(norms[name], floor) or 1) for name in members}


def _described(name: str, field: str, rows: Tensor, difference: float) -> str:
    if not rows.any():
        return f"{name} is not seen to act, though it does"
    what = {"grad": "gradient", "fisher": "squared gradients by sequence"}[field]
    return f"the {what} of {name} differs from that of autograd by {difference:.2g} of its size"


def _rows(tensor: Tensor) -> Tensor:
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
