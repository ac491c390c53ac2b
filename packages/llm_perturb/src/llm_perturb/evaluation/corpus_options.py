"""The flags that choose the texts, and how they become sequences."""

from dataclasses import dataclass
from typing import Literal

from bridge.exchange.errors import RequestError

Packing = Literal["documents", "windows"]
WindowBos = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """The texts, and how they become sequences.

    Attributes:
        data_file: a file with one text a line; without it and --dataset, the shipped passages.
        dataset: a data set of the Hugging Face hub, a local folder, or a local json, jsonl, csv, tsv, parquet or txt
            file, also with .gz. Chats (lists of role and content) are rendered by the tokenizer's chat template.
        dataset_config: the data set's configuration, such as wikitext-2-raw-v1.
        split: the data set's split, test if left out; a local file has none.
        text_column: the column that holds the text.
        packing: documents, each text on its own; windows, all joined and cut into pieces of equal length.
        max_length: the most tokens of a sequence; of a window, exactly this many. By default what the model takes, at
            most 512.
        eval_limit: the most sequences; all if left out.
        window_bos: whether each window begins with the BOS token; auto, if the tokenizer puts one before a text; never,
            only the joined text begins with what the tokenizer puts there.
        parse_special_tokens: take strings such as <|endoftext|> inside a text for the tokens of that name; by default
            they are text.
    """

    data_file: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    text_column: str = "text"
    packing: Packing = "documents"
    max_length: int | None = None
    eval_limit: int | None = None
    window_bos: WindowBos = "auto"
    parse_special_tokens: bool = False

    def check(self) -> None:
        """Refuse numbers that are out of range, and flags that would have no effect.

        Raises:
            RequestError: a limit or length too small, or --window-bos without windows.
        """
        if self.eval_limit is not None and self.eval_limit < 1:
            raise RequestError(f"--eval-limit must be at least 1, not {self.eval_limit}")
        if self.max_length is not None and self.max_length < 2:
            raise RequestError(f"--max-length must be at least 2, one token to predict another, not {self.max_length}")
        if self.window_bos != "auto" and self.packing != "windows":
            raise RequestError(f"--window-bos {self.window_bos} is for --packing windows")
