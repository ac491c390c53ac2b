"""From texts to the token sequences that everything is measured on."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from bridge.exchange.errors import RequestError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_perturb.evaluation.chat import render
from llm_perturb.evaluation.corpus_options import CorpusOptions
from llm_perturb.evaluation.texts import Texts, read_texts
from llm_perturb.evaluation.windows import cut_windows

__all__ = ["Corpus", "CorpusOptions", "Texts", "count_tokens", "hash_sequences", "read_texts", "tokenize"]

DEFAULT_LENGTH = 512
MAX_CUT = 0.01  # of the tokens; more is warned about


@dataclass(frozen=True)
class Corpus:
    """Token sequences.

    Attributes:
        sequences: sequence i holds T_i + 1 ids, int64, and predicts T_i tokens.
        metadata: source, settings, sizes and hashes, for the manifest.
        warnings: what of the texts is not measured.
        documents: the number of the text that each sequence begins in; None where each is a text of its own.
    """

    sequences: list[Tensor]
    metadata: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    documents: list[int] | None = None

    @cached_property
    def n_tokens(self) -> int:
        """N, the number of predicted tokens."""
        return count_tokens(self.sequences)

    @property
    def lengths(self) -> list[int]:
        """T_i, the number of predicted tokens of each sequence."""
        return [len(sequence) - 1 for sequence in self.sequences]

    @property
    def clusters(self) -> np.ndarray | None:
        """Which text each sequence begins in, (n,); None where each sequence is a text of its own."""
        return None if self.documents is None else np.array(self.documents)

    @property
    def summary(self) -> str:
        """What was read and what of it is measured, in one line."""
        chats = ", rendered by the tokenizer's chat template" if "rendered_by" in self.metadata else ""
        return (
            "TEXTS: {source}: {n_read} read, {n_empty} empty, {n_dropped} without text, {n_texts} texts{chats}; "
            "{n_sequences} {packing} of at most {max_length} tokens, {n_tokens} tokens predicted, {n_tokens_cut} cut"
        ).format(chats=chats, **self.metadata)


def count_tokens(sequences: Iterable[Tensor]) -> int:
    """N = Σ T_i: the tokens that are predicted; the first of each sequence is not."""
    return sum(len(sequence) - 1 for sequence in sequences)


def tokenize(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, options: CorpusOptions, max_positions: int | None = None
) -> Corpus:
    """Make token sequences; special tokens such as BOS are added just as the tokenizer does by default.

    Strings inside a text that look like special tokens are text, unless ``parse_special_tokens``. Chats are rendered by
    the tokenizer's template, which brings its own special tokens.

    Args:
        texts: the texts.
        tokenizer: the model's tokenizer.
        options: packing, max_length, eval_limit, window_bos, parse_special_tokens.
        max_positions: the longest sequence that the model can take.

    Raises:
        RequestError: a text too short to predict a token, too little text for one window, sequences longer
            than the model takes, chats that cannot be rendered.
    """
    options.check()
    length = _length(options, max_positions)
    strings, encoding = _strings(texts, tokenizer, options)
    if options.packing == "windows":
        windows = cut_windows(strings, tokenizer, encoding, options, length, texts.source)
        sequences, n_cut, documents = windows.sequences, windows.n_cut, windows.documents
        extra: dict[str, Any] = {"window_bos": windows.bos}
    else:
        sequences, n_cut = _documents(strings, tokenizer, encoding, length, options.eval_limit, texts.source)
        documents, extra = None, {}
    metadata = {
        "source": texts.source,
        "packing": options.packing,
        "max_length": length,
        "n_read": len(texts.texts) + texts.n_empty + texts.n_dropped,
        "n_empty": texts.n_empty,
        "n_dropped": texts.n_dropped,
        "n_texts": len(texts.texts),
        "n_sequences": len(sequences),
        "n_tokens": count_tokens(sequences),
        "n_tokens_cut": n_cut,
        "special_tokens_in_texts": "parsed" if options.parse_special_tokens else "text",
        **extra,
        "text_sha256": hashlib.sha256("\n".join(strings).encode()).hexdigest(),
        "corpus_sha256": hash_sequences(sequences),
    }
    if texts.are_chats:
        metadata["rendered_by"] = "the tokenizer's chat template"
    return Corpus(sequences, metadata, _warnings(metadata, sequences), documents)


def _length(options: CorpusOptions, max_positions: int | None) -> int:
    if options.max_length is None:
        return min(DEFAULT_LENGTH, max_positions or DEFAULT_LENGTH)
    if max_positions is not None and options.max_length > max_positions:
        raise RequestError(f"--max-length {options.max_length} is more than the {max_positions} positions of the model")
    return options.max_length


def _strings(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, options: CorpusOptions
) -> tuple[list[str], dict[str, Any]]:
    """The texts as strings, and how the tokenizer is to be called for them."""
    encoding = {"verbose": False, "split_special_tokens": not options.parse_special_tokens}
    if not texts.are_chats:
        return [text for text in texts.texts if isinstance(text, str)], encoding
    chats = [text for text in texts.texts if isinstance(text, list)]
    strings = render(chats, tokenizer, texts.source, options.parse_special_tokens)
    return strings, {"verbose": False, "split_special_tokens": False, "add_special_tokens": False}


def _documents(
    strings: list[str],
    tokenizer: PreTrainedTokenizerBase,
    encoding: dict[str, Any],
    length: int,
    limit: int | None,
    source: str,
) -> tuple[list[Tensor], int]:
    """A sequence for each text, and how many tokens beyond the longest sequence there were."""
    chosen = strings[:limit]
    encoded = tokenizer(chosen, **encoding).input_ids
    for number, (text, ids) in enumerate(zip(chosen, encoded, strict=True), start=1):
        if len(ids) < 2:
            raise RequestError(
                f"text {number} of {source} ({text[:20]!r}) is too short to predict a token; "
                "remove it, or join the texts with --packing windows"
            )
    return [torch.tensor(ids[:length]) for ids in encoded], sum(max(0, len(ids) - length) for ids in encoded)


def _warnings(metadata: dict[str, Any], sequences: list[Tensor]) -> list[str]:
    """What is lost between the file and the sequences."""
    source, length, n_cut = metadata["source"], metadata["max_length"], metadata["n_tokens_cut"]
    warnings = []
    if metadata["n_dropped"]:
        warnings.append(
            f"{metadata['n_dropped']} of {metadata['n_read']} rows of {source} have no text and are left out"
        )
    n_tokens = sum(map(len, sequences)) + n_cut
    if n_cut > MAX_CUT * n_tokens:
        lost = f"{n_cut} of the {n_tokens} tokens of {source} are not measured: "
        if metadata["packing"] == "documents":
            lost += f"texts are cut at {length} tokens; --packing windows measures all of a long text"
        else:
            lost += (
                f"--packing windows leaves over what does not fill a window of {length}; a smaller --max-length less"
            )
        warnings.append(lost)
    return warnings


def hash_sequences(sequences: list[Tensor]) -> str:
    """SHA-256 of the token ids and where each sequence ends."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
