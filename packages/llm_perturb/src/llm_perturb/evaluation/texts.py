"""The texts that a request names: the shipped passages, a local file, a data set of the hub or of a folder."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from bridge.exchange.errors import RequestError
from bridge.exchange.scratch import scratch_folder

from llm_perturb.evaluation.corpus_options import CorpusOptions
from llm_perturb.evaluation.hub import why_unreachable
from llm_perturb.evaluation.progress import library_bars
from llm_perturb.evaluation.text_files import Number, check_column, kind_of, read_column, read_lines

Message: TypeAlias = dict[str, str]  # of a chat: role and content
HUB_SPLIT = "test"


@dataclass(frozen=True)
class Texts:
    """Texts, none of them empty, and where they are from.

    Attributes:
        texts: strings, or chats: lists of messages.
        source: for messages and the manifest.
        n_empty: lines or rows that hold only white space.
        n_dropped: rows of a table that have no value where the text should be.
    """

    texts: list[str] | list[list[Message]]
    source: str
    n_empty: int = 0
    n_dropped: int = 0

    @property
    def are_chats(self) -> bool:
        """Whether the texts are chats, which the tokenizer's template makes strings of."""
        return isinstance(self.texts[0], list)


def read_texts(options: CorpusOptions) -> Texts:
    """Read the texts that the options name; blank ones are counted and passed over.

    Raises:
        RequestError: options that contradict each other, a missing, unreadable or empty source.
    """
    if options.data_file and options.dataset:
        raise RequestError("--data-file and --dataset exclude each other")
    options.check()
    if options.data_file:
        _refuse_split(options, f"the file {options.data_file}")
        return _texts_of(read_lines(Path(options.data_file)), options.data_file)
    if options.dataset is None:
        _refuse_split(options, "the shipped passages")
        shipped = resources.files("llm_perturb").joinpath("data/eval_texts.txt").read_text(encoding="utf-8")
        return _texts_of(shipped.splitlines(), "shipped passages")
    path = Path(options.dataset)
    if path.is_file():
        _refuse_split(options, f"the file {options.dataset}")
        return _texts_of(read_column(path, options.text_column), options.dataset)
    source = f"{options.dataset} {options.dataset_config or ''} {options.split or HUB_SPLIT}"
    return _texts_of(_read_dataset(options), source)


def _refuse_split(options: CorpusOptions, what: str) -> None:
    """Only a data set of the hub or of a folder has splits and configurations."""
    for flag, value in {"--split": options.split, "--dataset-config": options.dataset_config}.items():
        if value is not None:
            raise RequestError(f"{flag} {value} does not apply to {what}, which is read as a whole; leave it out")


def _texts_of(values: Iterable[object], source: str) -> Texts:
    """The texts among the values of a column, and how many were none.

    A number counts as the digits that the file shows, if it stands among strings; chats stay lists.

    Raises:
        RequestError: a value that is no text, chats among strings, or no text at all.
    """
    strings: list[str] = []
    chats: list[list[Message]] = []
    n_empty = n_dropped = n_numbers = 0
    for number, value in enumerate(values, start=1):
        where = f"text {number} of {source}"
        if value is None:
            n_dropped += 1
        elif isinstance(value, str) and not value.strip():
            n_empty += 1
        elif isinstance(value, str):
            strings.append(_unicode(value, where))
        elif isinstance(value, Number):
            strings.append(value.digits)
            n_numbers += 1
        elif isinstance(value, list):
            chats.append(_chat(value, where))
        else:
            raise RequestError(f"{where} is no text but a value of type {type(value).__name__}: {str(value)[:40]}")
    if strings and chats:
        raise RequestError(
            f"{source} has {len(chats)} chats among {len(strings)} texts; keep them in files of their own"
        )
    if not chats and len(strings) == n_numbers:
        raise RequestError(f"{source} holds no text" + (f", only {n_numbers} numbers" if n_numbers else ""))
    return Texts(chats or strings, source, n_empty, n_dropped)


def _chat(messages: list[Any], where: str) -> list[Message]:
    """A chat whose messages have a role and a content, both strings."""
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RequestError(f"{where} is a list, but not of messages whose role and content are strings")
    if not messages:
        raise RequestError(f"{where} is a chat without messages")
    return [{key: _unicode(message[key], where) for key in ("role", "content")} for message in messages]


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where} is not Unicode text: half of a surrogate pair at character {error.start}"
        ) from None
    return text


def _read_dataset(options: CorpusOptions) -> list[object]:
    """A column of a data set of the hub, or of a local folder.

    What datasets prepares from a local folder goes to a temporary cache: its lasting one takes a changed file with an
    old time stamp for the old file.
    """
    from datasets import exceptions, load_dataset, load_dataset_builder  # slow to import, and few runs need it

    assert options.dataset is not None
    name = options.dataset
    if not Path(name).is_dir() and kind_of(Path(name)):
        raise RequestError(f"--dataset {name}: no such file")
    unreachable = None if Path(name).is_dir() else why_unreachable()
    with library_bars(), scratch_folder() as temporary:
        cache = str(temporary) if Path(name).is_dir() else None
        try:
            builder = load_dataset_builder(name, options.dataset_config, cache_dir=cache)
            # the words NA and null of a CSV are text
            as_written = {"keep_default_na": False} if hasattr(builder.config, "keep_default_na") else {}
            split = options.split or HUB_SPLIT
            table = load_dataset(name, options.dataset_config, split=split, cache_dir=cache, **as_written)
            check_column(table.column_names, options.text_column, name)
            values: list[object] = list(table[options.text_column])
        except (OSError, ValueError, exceptions.DatasetsError) as error:
            reason = " ".join(str(_innermost(error)).split())[:300]
            if unreachable:
                reason = f"{unreachable}, and the cache lacks it; {reason}"
            raise RequestError(f"--dataset {name} cannot be loaded: {reason}") from None
        finally:
            builder = table = None  # closes the files of the temporary cache
    return [Number(str(v)) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in values]


def _innermost(error: BaseException) -> BaseException:
    """The error that all others came from; datasets itself says only that something went wrong while it read."""
    while error.__cause__ is not None and str(error.__cause__):
        error = error.__cause__
    return error
