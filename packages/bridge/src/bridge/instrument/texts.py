"""The texts that the damage is measured on: those that gave the scores, or others."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.exchange.discovery_run import Discovery
from bridge.exchange.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class EvaluationTexts:
    """The texts that judge, where they are not those that gave the scores; cut into sequences as those were.

    Attributes:
        eval_data_file: measure the damage on this file of one text a line, not on the texts that gave the scores.
        eval_dataset: likewise, on a data set of the hub or a local file or folder.
        eval_dataset_config: its configuration.
        eval_split: its split.
        eval_text_column: its column of texts.
        eval_limit: the most sequences of these texts; by default as many as the discovery took.
    """

    eval_data_file: str | None = None
    eval_dataset: str | None = None
    eval_dataset_config: str | None = None
    eval_split: str | None = None
    eval_text_column: str | None = None
    eval_limit: int | None = None

    def chosen(self) -> dict[str, Any]:
        """The instrument's options that name other texts; empty where the scores' own texts are to judge.

        The hash of a local file's content is among them, as ``sha256``: with other content it is another request.

        Raises:
            RequestError: no texts are named, two are, or a file is missing.
        """
        names = {
            "data_file": self.eval_data_file,
            "dataset": self.eval_dataset,
            "dataset_config": self.eval_dataset_config,
            "split": self.eval_split,
            "text_column": self.eval_text_column,
            "eval_limit": self.eval_limit,
        }
        chosen: dict[str, Any] = {name: value for name, value in names.items() if value is not None}
        if chosen.keys() >= {"data_file", "dataset"}:
            raise RequestError("--eval-data-file and --eval-dataset exclude each other")
        if chosen and not chosen.keys() & {"data_file", "dataset"}:
            raise RequestError(
                "--eval-dataset-config, --eval-split, --eval-text-column and --eval-limit are of other texts: "
                "name them with --eval-data-file or --eval-dataset"
            )
        if self.eval_limit is not None and self.eval_limit < 1:
            raise RequestError(f"--eval-limit must be at least 1, not {self.eval_limit}")
        path = Path(self.eval_data_file or self.eval_dataset or "")
        if self.eval_data_file and not path.is_file():
            raise RequestError(f"--eval-data-file {path}: no such file")
        if chosen and path.exists():
            chosen["data_file" if self.eval_data_file else "dataset"] = str(path.absolute())
            chosen["sha256"] = _content_hash(path)
        return chosen


def _content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files of a folder."""
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(str(file.relative_to(path)).encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    return iter([path]) if path.is_file() else (file for file in sorted(path.rglob("*")) if file.is_file())


def corpus_options(discovery: Discovery, other_texts: Mapping[str, Any]) -> dict[str, Any]:
    """The instrument's options for the texts: the discovery's, or other texts cut into sequences in the same way.

    Args:
        discovery: the run that is validated.
        other_texts: as ``EvaluationTexts.chosen`` returns them; empty for the discovery's own.

    Raises:
        RequestError: a local file of the discovery does not exist here.
    """
    options = discovery.options
    cut = {name: options.get(name) for name in ("packing", "max_length", "eval_limit", "window_bos")}
    cut["parse_special_tokens"] = options.get("parse_special_tokens", True)  # as versions without that option did
    if cut["max_length"] is None:
        cut["max_length"] = discovery.corpus.get("max_length")
    if cut["packing"] == "windows" and "window_bos" not in options:
        cut["window_bos"] = "never"  # likewise
    if other_texts:
        return cut | {name: value for name, value in other_texts.items() if name != "sha256"}
    names = {name: options.get(name) for name in ("data_file", "dataset", "dataset_config", "split", "text_column")}
    if names["data_file"]:
        names["data_file"] = str(existing(names["data_file"], "data file", discovery))
    dataset = names["dataset"]
    if dataset and Path(dataset).exists():
        names["dataset"] = str(Path(dataset).absolute())
    if not dataset or Path(dataset).is_file():  # a file has no splits, and versions that recorded one did not use it
        names |= {"dataset_config": None, "split": None}
    return cut | names


def existing(name: str, what: str, discovery: Discovery) -> Path:
    """The absolute path of a file or folder that the discovery read.

    Raises:
        RequestError: it is not here.
    """
    path = Path(name).absolute()
    if not path.exists():
        raise RequestError(
            f"the {what} '{name}' of {discovery.folder.name} is not here; "
            "start this command in the folder where the discovery was started"
        )
    return path
