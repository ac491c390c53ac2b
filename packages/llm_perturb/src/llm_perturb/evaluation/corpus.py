"""From texts to the token sequences that everything is measured on."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from bridge.exchange.errors import RequestError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Packing = Literal["documents", "windows"]
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class CorpusOptions:
    """Which texts, and how they become sequences.

    Attributes:
        data_file: a file with one text a line; without it and ``dataset``, the shipped passages.
        dataset: a data set of the Hugging Face hub, or a local json, jsonl, csv, parquet or txt file or folder.
        dataset_config: the data set's configuration, such as ``wikitext-2-raw-v1``.
        split: the data set's split.
        text_column: the column that holds the text.
        packing: ``documents``, each text on its own; ``windows``, all joined and cut into equal pieces.
        max_length: the most tokens of a sequence; of a window, exactly this many.
        eval_limit: the most sequences; None for all.
    """

    data_file: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "test"
    text_column: str = "text"
    packing: Packing = "documents"
    max_length: int = 512
    eval_limit: int | None = None


@dataclass(frozen=True)
class Texts:
    """Texts, none of them empty, and where they are from."""

    texts: list[str]
    source: str


@dataclass(frozen=True)
class Corpus:
    """Token sequences. Sequence i holds T_i + 1 ids, int64, and predicts T_i tokens; ``facts`` go to the manifest."""

    sequences: list[Tensor]
    facts: dict

    @cached_property
    def n_tokens(self) -> int:
        """N, the number of predicted tokens."""
        return count_tokens(self.sequences)


def count_tokens(sequences: Iterable[Tensor]) -> int:
    """N = Σ T_i: the tokens that are predicted; the first of each sequence is not."""
    return sum(len(sequence) - 1 for sequence in sequences)


def read_texts(options: CorpusOptions) -> Texts:
    """Read the texts that the options name; blank ones are passed over.

    Raises:
        RequestError: options that contradict each other, a missing, unreadable or empty source.
    """
    if options.data_file and options.dataset:
        raise RequestError("--data-file and --dataset exclude each other")
    if options.eval_limit is not None and options.eval_limit < 1:
        raise RequestError(f"--eval-limit must be at least 1, not {options.eval_limit}")
    if options.max_length < 2:
        raise RequestError(f"--max-length must be at least 2, one token to predict another, not {options.max_length}")
    if options.data_file:
        texts, source = _read_lines(Path(options.data_file)), options.data_file
    elif options.dataset:
        texts, source = _read_dataset(options), f"{options.dataset} {options.dataset_config or ''} {options.split}"
    else:
        shipped = resources.files("llm_perturb").joinpath("data/eval_texts.txt").read_text(encoding="utf-8")
        texts, source = shipped.splitlines(), "shipped passages"
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise RequestError(f"{source} holds no text")
    return Texts(texts, source)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise RequestError(f"--data-file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"--data-file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _read_dataset(options: CorpusOptions) -> list[str]:
    from datasets import exceptions, load_dataset  # slow to import, and few runs need it

    path = Path(options.dataset)
    try:
        if path.is_file():
            builder = _BUILDERS.get(path.suffix)
            if builder is None:
                raise RequestError(f"--dataset {path}: a local file must end in {', '.join(_BUILDERS)}")
            table = load_dataset(builder, data_files=str(path), split="train")
        else:
            table = load_dataset(options.dataset, options.dataset_config, split=options.split)
    except (OSError, ValueError, exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RequestError(f"--dataset {options.dataset} cannot be loaded: {reason}") from None
    if options.text_column not in table.column_names:
        raise RequestError(
            f"--dataset {options.dataset} has no column '{options.text_column}' but {', '.join(table.column_names)}; "
            "choose with --text-column"
        )
    return [text for text in table[options.text_column] if isinstance(text, str)]


def tokenize(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, options: CorpusOptions, max_positions: int | None = None
) -> Corpus:
    """Make token sequences; special tokens such as BOS are added just as the tokenizer does by default.

    Args:
        texts: the texts.
        tokenizer: the model's tokenizer.
        options: packing, max_length, eval_limit.
        max_positions: the longest sequence that the model can take.

    Raises:
        RequestError: a text too short to predict a token, too little text for one window, sequences longer
            than the model takes.
    """
    if max_positions is not None and options.max_length > max_positions:
        raise RequestError(f"--max-length {options.max_length} is more than the {max_positions} positions of the model")
    make = _documents if options.packing == "documents" else _windows
    sequences = make(texts, tokenizer, options)
    facts = {
        "source": texts.source,
        "packing": options.packing,
        "max_length": options.max_length,
        "n_texts": len(texts.texts),
        "n_sequences": len(sequences),
        "n_tokens": count_tokens(sequences),
        "text_sha256": hashlib.sha256("\n".join(texts.texts).encode()).hexdigest(),
        "corpus_sha256": hash_sequences(sequences),
    }
    return Corpus(sequences, facts)


def hash_sequences(sequences: list[Tensor]) -> str:
    """SHA-256 of the token ids and where each sequence ends."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _documents(texts: Texts, tokenizer: PreTrainedTokenizerBase, options: CorpusOptions) -> list[Tensor]:
    chosen = texts.texts[: options.eval_limit]
    encoded = tokenizer(chosen, verbose=False).input_ids
    for number, (text, ids) in enumerate(zip(chosen, encoded, strict=True), start=1):
        if len(ids) < 2:
            raise RequestError(
                f"text {number} of {texts.source} ({text[:20]!r}) is too short to predict a token; "
                "remove it, or join the texts with --packing windows"
            )
    return [torch.tensor(ids[: options.max_length]) for ids in encoded]


def _windows(texts: Texts, tokenizer: PreTrainedTokenizerBase, options: CorpusOptions) -> list[Tensor]:
    """Disjoint windows of the joined texts, the tail dropped: the convention of GPTQ, SparseGPT and Wanda."""
    ids = torch.tensor(tokenizer("\n\n".join(texts.texts), verbose=False).input_ids)
    n_windows = len(ids) // options.max_length
    if n_windows == 0:
        raise RequestError(
            f"{texts.source} has {len(ids)} tokens, too few for one window of {options.max_length}; lower --max-length"
        )
    windows = ids[: n_windows * options.max_length].view(n_windows, options.max_length)
    return list(windows[: options.eval_limit])
