"""The loss of a model on a corpus, sequence by sequence, and the perplexity that follows from it."""

import math
from dataclasses import asdict, dataclass

import torch
from bridge.errors import RunError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from llm_perturb.corpus import Corpus
from llm_perturb.head import exact_nats, is_plain, token_nats


@dataclass(frozen=True)
class Perplexity:
    """``nll`` in nats per predicted token, ``ppl`` = exp(nll), over all tokens of a corpus."""

    nll: float
    ppl: float
    n_tokens: int
    n_sequences: int

    def as_dict(self) -> dict:
        """For a table or a JSON file."""
        return asdict(self)


def exp(nll: float) -> float:
    """e^nll, infinite where a float cannot hold it."""
    return math.exp(nll) if nll < 709 else math.inf if not math.isnan(nll) else math.nan


def summarize(losses: Tensor, corpus: Corpus) -> Perplexity:
    """Token-weighted perplexity: L = (1/N) Σ_i S_i, never a mean of per-text perplexities.

    Args:
        losses: S_i, summed nats of each sequence, shape (n,).
        corpus: the sequences they belong to.
    """
    nll = losses.double().sum().item() / corpus.n_tokens
    return Perplexity(nll, exp(nll), corpus.n_tokens, len(corpus.sequences))


@torch.no_grad()
def sequence_losses(
    model: PreTrainedModel,
    sequences: list[Tensor],
    batch_size: int = 1,
    progress: str | None = None,
    check: bool = True,
) -> Tensor:
    """S_i = Σ_t -log p(x_it | x_i,<t), the summed loss of each sequence, in nats.

    Sequences are batched by length and padded on the right under an attention mask, which changes no number
    beyond the rounding of a matrix product of another shape; a batch size of 1 pads nothing.

    Args:
        model: a causal language model in eval mode.
        sequences: each (T_i + 1,) ids.
        batch_size: sequences at a time.
        progress: what a progress bar on stderr should say; None for no bar.
        check: whether a loss that is not finite is an error, or a result.

    Returns:
        float64 (n,) on the CPU.

    Raises:
        RunError: a loss is not finite.
    """
    losses = torch.empty(len(sequences), dtype=torch.float64)
    for chosen in tqdm(batches(sequences, batch_size), desc=progress, disable=progress is None, leave=False):
        losses[chosen] = batch_losses(model, [sequences[i] for i in chosen])
    if check and not losses.isfinite().all():
        raise RunError(f"the loss of sequence {int(losses.isfinite().logical_not().nonzero()[0])} is not finite")
    return losses


def batches(sequences: list[Tensor], batch_size: int) -> list[list[int]]:
    """Which sequences go together: neighbours by length, shortest first."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_losses(model: PreTrainedModel, sequences: list[Tensor]) -> Tensor:
    """The summed loss of each sequence of one padded batch: float64 (B,), on the CPU."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)  # (B, T)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(model.device)  # (B, T)
    padding = {} if mask.all() else {"attention_mask": mask.long()}
    predicted, targets = mask[:, 1:], ids[:, 1:][mask[:, 1:]]  # (B, T-1), (N,)
    if is_plain(model):
        hidden = model.base_model(input_ids=ids, use_cache=False, **padding).last_hidden_state
        nats = token_nats(model.get_output_embeddings(), hidden[:, :-1][predicted], targets)  # (N,)
    else:
        logits = model(input_ids=ids, use_cache=False, **padding).logits[:, :-1][predicted]  # (N, V)
        nats = exact_nats(logits, targets)
    losses = torch.zeros(predicted.shape, dtype=torch.float64, device=nats.device)
    return losses.masked_scatter_(predicted, nats.double()).sum(1).cpu()
