"""Whether a model predicts each token from those before it alone: seen from a few tokens, before anything is measured.

The loss of a text is the sum of -log p(x_t | x_<t). A model whose predictions also depend on what follows, such as a
masked language model with an output head, has no such loss: the number would depend on how much of the text is shown.
"""

from collections.abc import Sequence

import torch
from bridge.exchange.errors import RequestError, one_line
from torch import Tensor
from transformers import PreTrainedModel

COMMON, LENGTH = 2, 6  # tokens that the sequences of a probe begin with alike, and all of their tokens
PROBES = 3  # with other tokens each: rounding may decide which expert is chosen, but not every time
NOT_CAUSAL = (
    "later tokens change this model's predictions of earlier ones: it is not a causal language model (but a masked "
    "one, or its configuration lacks is_decoder), and the loss of a text is not defined for it"
)
PADDING_MATTERS = "a padded batch changes this model's predictions: --batch-size 1, not {}"


def check_causal(model: PreTrainedModel, batch_size: int = 1) -> None:
    """Refuse a model for which the loss of a text is not defined, or is not the same in a batch.

    Args:
        model: a language model in eval mode, with its weights.
        batch_size: sequences at a time.

    Raises:
        RequestError: it cannot be run on ids alone, gives other predictions when it is run again, later tokens change
            earlier predictions, or a padded batch does.
    """
    for seed in range(PROBES):
        sequences = probe_sequences(model, seed)
        one, other = (_logits(model, [sequence])[0] for sequence in sequences)
        if not later_tokens_matter(one, other):
            break
        if _differ(_logits(model, sequences[:1])[0], one):
            raise RequestError("the model gives other predictions when it is run again on the same tokens")
    else:
        raise RequestError(NOT_CAUSAL)
    if batch_size > 1:
        shorter = [sequences[1][:length] for length in (LENGTH - 1, LENGTH // 2)]
        alone = [one, *(_logits(model, [sequence])[0] for sequence in shorter)]
        if any(map(_differ, _logits(model, [sequences[0], *shorter]), alone)):
            raise RequestError(PADDING_MATTERS.format(batch_size))


def probe_sequences(model: PreTrainedModel, seed: int = 0) -> list[Tensor]:
    """Two sequences of ``LENGTH`` random tokens of the vocabulary, the first ``COMMON`` of which are the same."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    n_words = min(len(table.weight) for table in tables if isinstance(getattr(table, "weight", None), Tensor))
    one, other = torch.randint(n_words, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    other[:COMMON] = one[:COMMON]
    other[COMMON:] += other[COMMON:] == one[COMMON:]
    return [one, other % n_words]


def later_tokens_matter(one: Tensor, other: Tensor, n_common: int = COMMON) -> bool:
    """Whether what comes after the first tokens changes the predictions at those.

    Args:
        one: logits (T, V) of a sequence.
        other: of another one, which begins with the same tokens and goes on with others.
        n_common: how many tokens they have in common.
    """
    change = (one - other).abs().amax(1)  # (T,)
    return bool(change[:n_common].max() > tolerance(one.dtype) * change[n_common:].max())


def tolerance(dtype: torch.dtype) -> float:
    """How far apart the same thing may be when it is computed in another order, relative to its largest value."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def _differ(logits: Tensor, expected: Tensor) -> bool:
    if not expected.isfinite().all():
        return False  # which is not for this check to say
    return not (logits - expected).abs().max() <= tolerance(expected.dtype) * expected.abs().max()


@torch.no_grad()
def _logits(model: PreTrainedModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """The logits of sequences that are run as one batch, padded on the right under an attention mask: (T_i, V) each."""
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    padding = {} if mask.all() else {"attention_mask": mask.long().to(model.device)}
    try:
        logits = model(input_ids=ids.to(model.device), use_cache=False, **padding).logits
    except Exception as error:  # whatever a model makes of a few tokens
        raise RequestError(f"the model cannot be run on the ids of a few tokens alone: {one_line(error)}") from error
    return [logits[row, :length] for row, length in enumerate(lengths)]
