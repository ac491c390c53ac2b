"""The loss of a model on a corpus, sequence by sequence, and the perplexity that follows from it."""

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bridge.exchange.errors import RequestError, RunError
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_perturb.evaluation.causality import PADDING_MATTERS, tolerance
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.decoder_head import is_plain, runner_without_head
from llm_perturb.evaluation.lm_loss import exact_scores, token_divergence, token_scores
from llm_perturb.evaluation.onednn_linear import own_products
from llm_perturb.evaluation.progress import over


@dataclass(frozen=True)
class Perplexity:
    """``nll`` in nats per predicted token, ``ppl`` = exp(nll), over all tokens of a corpus."""

    nll: float
    ppl: float
    n_tokens: int
    n_sequences: int

    def as_dict(self) -> dict[str, Any]:
        """For a table or a JSON file."""
        return asdict(self)


def exp(nll: float) -> float:
    """e^nll, infinite where a float cannot hold it; NaN of NaN."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def summarize(losses: Tensor, corpus: Corpus) -> Perplexity:
    """Token-weighted perplexity: L = (1/N) Σ_i S_i, never a mean of per-text perplexities.

    Args:
        losses: S_i, summed nats of each sequence, shape (n,).
        corpus: the sequences they belong to.
    """
    nll = losses.double().sum().item() / corpus.n_tokens
    return Perplexity(nll, exp(nll), corpus.n_tokens, len(corpus.sequences))


@dataclass(frozen=True)
class Measured:
    """Sequences under one state of the model.

    Attributes:
        losses: S_i = Σ_t -log p(x_it | x_i,<t), in nats, float64 (n,).
        correct: how many of the T_i tokens were the most probable ones, int64 (n,).
        divergence: Σ_t KL(baseline || this) in nats, float64 (n,); None where it was not asked for.
    """

    losses: Tensor
    correct: Tensor
    divergence: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """The unperturbed predictions, in a form much smaller than all logits.

    Attributes:
        hidden: what the head receives at the N predicted positions of each batch, (N, H).
        head: a copy of the head.
    """

    hidden: list[Tensor]
    head: nn.Linear


def sequence_losses(
    model: PreTrainedModel,
    sequences: list[Tensor],
    batch_size: int = 1,
    progress: str | None = None,
    check: bool = True,
) -> Tensor:
    """S_i of each sequence, float64 (n,); see ``measure``."""
    return measure(model, sequences, batch_size, progress, check).losses


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    sequences: list[Tensor],
    batch_size: int = 1,
    progress: str | None = None,
    check: bool = True,
) -> Measured:
    """Loss and correct tokens of each sequence.

    Sequences are batched by length and padded on the right under an attention mask, which changes no number
    beyond the rounding of a matrix product of another shape; a batch size of 1 pads nothing.

    Args:
        model: a causal language model in eval mode.
        sequences: each (T_i + 1,) ids.
        batch_size: sequences at a time.
        progress: what is measured, for the progress on stderr; None to show none.
        check: whether a loss that is not finite is an error, or a result.

    Raises:
        RunError: a loss is not finite.
    """
    order = batches(sequences, batch_size)
    steps = over(order, progress or "", shown=progress is not None)
    measured = in_order(order, [measure_batch(model, [sequences[i] for i in chosen]) for chosen in steps])
    if check and not measured.losses.isfinite().all():
        first = int(measured.losses.isfinite().logical_not().nonzero()[0])
        hint = "; it may be in a batch of its own: --batch-size 1" if batch_size > 1 else ""
        raise RunError(f"the loss of sequence {first} is not finite{hint}")
    return measured


def in_order(order: list[list[int]], parts: list[Measured]) -> Measured:
    """Measurements of batches, as one in the order of the sequences.

    Args:
        order: the numbers of the sequences of each batch.
        parts: the measurement of each batch.
    """
    back = torch.tensor([i for chosen in order for i in chosen]).argsort()  # (n,)
    losses = torch.cat([part.losses for part in parts])[back]
    correct = torch.cat([part.correct for part in parts])[back]
    divergences = [part.divergence for part in parts if part.divergence is not None]
    divergence = torch.cat(divergences)[back] if divergences else None
    return Measured(losses, correct, divergence)


def batches(sequences: list[Tensor], batch_size: int) -> list[list[int]]:
    """Which sequences go together: neighbours by length, shortest first."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def measure_batch(
    model: PreTrainedModel, sequences: list[Tensor], reference: tuple[nn.Linear, Tensor] | None = None
) -> Measured:
    """Each sequence of one padded batch: (B,), on the CPU.

    Args:
        model: in eval mode.
        sequences: each (T_i + 1,) ids.
        reference: head and hidden states (N, H) to compare the predictions with, N the number of predicted
            tokens of the batch, or of each of its copies.
    """
    ids, predicted, padding = pad(model, sequences)
    targets = ids[:, 1:][predicted]  # (N,)
    if is_plain(model):
        head, hidden = model.get_output_embeddings(), _last_hidden(model, ids, padding)[:, :-1][predicted]
        scores = token_scores(head, hidden, targets)
        divergence = None if reference is None else token_divergence(*reference, head, hidden)
    else:
        with own_products(model):
            logits = model(input_ids=ids, use_cache=False, **padding).logits[:, :-1][predicted]  # (N, V)
        scores, divergence = exact_scores(logits, targets), None

    def sums(values: Tensor, dtype: torch.dtype) -> Tensor:
        line = torch.zeros(predicted.shape, dtype=dtype, device=values.device)
        return line.masked_scatter_(predicted, values.to(dtype)).sum(1).cpu()

    return Measured(
        sums(scores.nats, torch.float64),
        sums(scores.correct, torch.int64),
        None if divergence is None else sums(divergence, torch.float64),
    )


def pad(model: PreTrainedModel, sequences: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The ids (B, T) of a batch, the mask of what is predicted (B, T-1), and the attention mask where one is needed."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(model.device)
    return ids, mask[:, 1:], {} if mask.all() else {"attention_mask": mask.long()}


def check_padding(model: PreTrainedModel, sequences: list[Tensor], losses: Tensor, batch_size: int) -> None:
    """Measure the sequences of the batch that is padded most once more, each alone.

    Args:
        model: a causal language model in eval mode.
        sequences: each (T_i + 1,) ids.
        losses: S_i of each, measured in batches.
        batch_size: sequences at a time.

    Raises:
        RequestError: one has another loss alone than in the batch, by more than rounding.
    """
    chosen = most_padded(batches(sequences, batch_size), sequences)
    if chosen is None:
        return
    alone = sequence_losses(model, [sequences[i] for i in chosen])
    most = tolerance(model.dtype) / 10  # a sum is nearer than a single logit
    if ((losses[chosen] - alone).abs() > most * alone.abs()).any():
        raise RequestError(PADDING_MATTERS.format(batch_size))


def most_padded(order: list[list[int]], sequences: list[Tensor]) -> list[int] | None:
    """The batch with the most padding, as numbers of sequences, shortest first; None where none is padded."""

    def padding(chosen: list[int]) -> int:
        return sum(len(sequences[chosen[-1]]) - len(sequences[i]) for i in chosen)

    chosen = max(order, key=padding)
    return chosen if padding(chosen) else None


@torch.no_grad()
def reference_of(model: PreTrainedModel, sequences: list[Tensor], batch_size: int) -> Reference:
    """The predictions of a model with a plain head as it is now."""
    assert is_plain(model)
    hidden = []
    for chosen in batches(sequences, batch_size):
        ids, predicted, padding = pad(model, [sequences[i] for i in chosen])
        hidden.append(_last_hidden(model, ids, padding)[:, :-1][predicted])
    return Reference(hidden, copy.deepcopy(model.get_output_embeddings()))


def _last_hidden(model: PreTrainedModel, ids: Tensor, padding: dict[str, Tensor]) -> Tensor:
    """What the head receives, (B, T, H)."""
    runner = runner_without_head(model)
    assert runner is not None
    with own_products(model):
        hidden: Tensor = runner(input_ids=ids, use_cache=False, **padding).last_hidden_state
    return hidden
