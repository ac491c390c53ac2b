"""Joined texts cut into windows of equal length: the convention of GPTQ, SparseGPT and Wanda."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from bridge.exchange.errors import RequestError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_perturb.evaluation.corpus_options import CorpusOptions

BETWEEN = "\n\n"  # two texts


@dataclass(frozen=True)
class Windows:
    """Windows of the joined texts.

    Attributes:
        sequences: (max_length,) ids each.
        n_cut: tokens after the last window; 0 where --eval-limit ends before.
        documents: the number of the text that each window begins in.
        bos: whether each window begins with the BOS token.
    """

    sequences: list[Tensor]
    n_cut: int
    documents: list[int]
    bos: bool


def cut_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    encoding: dict[str, Any],
    options: CorpusOptions,
    length: int,
    source: str,
) -> Windows:
    """Disjoint windows of the joined texts, the tail dropped.

    A model trained with a BOS token in front of every text predicts badly without one, so that each window of it begins
    with one (``window_bos``): one of the window's tokens, and not predicted.

    Args:
        texts: strings.
        tokenizer: the model's tokenizer.
        encoding: how the tokenizer is called.
        options: window_bos, eval_limit.
        length: tokens of a window.
        source: where the texts are from, for messages.

    Raises:
        RequestError: too little text for one window, or --window-bos always and no BOS token.
    """
    ids, documents = _joined(texts, tokenizer, encoding)
    with_bos = _with_bos(tokenizer, options)
    bos: list[int] = [tokenizer.bos_token_id] if with_bos else []
    if with_bos and ids[:1] == bos:
        ids, documents = ids[1:], documents[1:]
    step = length - len(bos)
    n_windows = len(ids) // step
    if n_windows == 0:
        raise RequestError(f"{source} has {len(ids)} tokens, too few for one window of {length}; lower --max-length")
    starts = range(0, n_windows * step, step)[: options.eval_limit]
    return Windows(
        sequences=[torch.tensor(bos + ids[start : start + step]) for start in starts],
        n_cut=len(ids) - n_windows * step if len(starts) == n_windows else 0,
        documents=[documents[start] for start in starts],
        bos=with_bos,
    )


def _with_bos(tokenizer: PreTrainedTokenizerBase, options: CorpusOptions) -> bool:
    if options.window_bos == "never":
        return False
    if options.window_bos == "always":
        if tokenizer.bos_token_id is None:
            raise RequestError("--window-bos always: the model's tokenizer has no BOS token")
        return True
    first = tokenizer("a", verbose=False).input_ids[:1]
    return tokenizer.bos_token_id is not None and list(first) == [tokenizer.bos_token_id]


def _joined(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, encoding: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """The tokens of all texts, and the number of the text that each is of.

    A tokenizer that does not say where its tokens stand has its texts tokenized one by one to count theirs, which is
    right to a token or two at the borders.
    """
    joined = BETWEEN.join(texts)
    if tokenizer.is_fast:
        encoded = tokenizer(joined, return_offsets_mapping=True, **encoding)
        starts = list(accumulate((len(text) + len(BETWEEN) for text in texts[:-1]), initial=0))  # in characters
        return list(encoded.input_ids), [bisect_right(starts, first) - 1 for first, _ in encoded.offset_mapping]
    ids = list(tokenizer(joined, **encoding).input_ids)
    alone = encoding | {"add_special_tokens": False}
    lengths = (len(tokenizer(text + BETWEEN, **alone).input_ids) for text in texts[:-1])
    starts = list(accumulate(lengths, initial=0))  # in tokens
    return ids, [bisect_right(starts, position) - 1 for position in range(len(ids))]
