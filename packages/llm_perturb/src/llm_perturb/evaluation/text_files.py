"""Local files of texts, read anew each time and never from a cache.

Every text is the string that stands in the file: ``NA``, ``null`` and ``1.50`` are words like any other. A byte order
mark is no part of it. Of a compressed file (``.gz``) the ending before counts; upper and lower case are alike.
"""

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bridge.exchange.errors import RequestError
from bridge.exchange.json_file import parse_json


@dataclass(frozen=True)
class Number:
    """A number where a text was expected.

    Attributes:
        digits: as the file shows it.
    """

    digits: str


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, for ``--data-file``.

    Raises:
        RequestError: a table, unreadable, or not UTF-8.
    """
    kind = kind_of(path)
    if kind and kind != ".txt":
        raise RequestError(
            f"--data-file {path} is a table, and --data-file takes a file of one text a line; give it with --dataset"
        )
    return _lines(_decoded(path, "--data-file"))


def read_column(path: Path, column: str) -> list[object]:
    """The values of a column of a local file, for ``--dataset``: strings, ``Number``, None, or other values of JSON.

    Raises:
        RequestError: a file of another kind, damaged, empty, or without that column.
    """
    kind = kind_of(path)
    if not kind:
        raise RequestError(f"--dataset {path}: a local file must end in {', '.join(_READERS)}, or in these and .gz")
    try:
        values = _READERS[kind](path, column)
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RequestError(f"--dataset {path} cannot be loaded: {reason}") from None
    return values


def kind_of(path: Path) -> str:
    """The ending of a file that can be read, in lower case and without ``.gz``; empty for any other."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings[-1:] == [".gz"]:
        endings.pop()
    return endings[-1] if endings and endings[-1] in _READERS else ""


def check_column(names: Iterable[str], column: str, source: object) -> None:
    """Refuse a table without the column of texts; the columns that it has are named."""
    names = list(names)
    if column not in names:
        raise RequestError(
            f"--dataset {source} has no column '{column}' but {', '.join(names)}; choose with --text-column"
        )


def _bytes(path: Path, flag: str) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{flag} {path} cannot be read: {reason}") from None


def _decoded(path: Path, flag: str = "--dataset") -> str:
    """The characters of a file, without a byte order mark."""
    try:
        return _bytes(path, flag).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{flag} {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _lines(text: str) -> list[str]:
    """Lines end with a line feed, a carriage return, or both, and nowhere else."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _read_text(path: Path, column: str) -> list[object]:
    check_column(["text"], column, path)
    return list(_lines(_decoded(path)))


def _read_csv(path: Path, column: str, delimiter: str = ",") -> list[object]:
    """A cell in quotes may hold line breaks and delimiters; it is one text."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(_decoded(path), newline=""), delimiter=delimiter, strict=True)
    header = next(rows, None)
    if not header:
        raise RequestError(f"--dataset {path} holds no text")
    check_column(header, column, path)
    if header.count(column) > 1:
        raise ValueError(f"it has {header.count(column)} columns '{column}'")
    values: list[object] = []
    for row in rows:
        if not row:  # a blank line
            row = [""] * len(header)
        if len(row) != len(header):
            raise ValueError(f"line {rows.line_num} has {len(row)} cells where the header has {len(header)}")
        values.append(row[header.index(column)])
    return values


def _read_tsv(path: Path, column: str) -> list[object]:
    return _read_csv(path, column, delimiter="\t")


def _read_json(path: Path, column: str) -> list[object]:
    """A list of objects, or one object a line."""
    text = _decoded(path)
    parse = partial(parse_json, integer=Number, fraction=Number)
    if text.lstrip().startswith("["):
        rows = parse(text)
    else:
        lines = enumerate(_lines(text), start=1)
        rows = [_row_of_line(parse, line, number) for number, line in lines if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
    if not rows:
        raise RequestError(f"--dataset {path} holds no text")
    check_column(dict.fromkeys(name for row in rows for name in row), column, path)
    return [row.get(column) for row in rows]


def _row_of_line(parse: Callable[[str], Any], line: str, number: int) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return parse(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _read_parquet(path: Path, column: str) -> list[object]:
    import pyarrow  # slow to import
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(_bytes(path, "--dataset")))
        check_column(table.schema_arrow.names, column, path)
        values: list[object] = table.read(columns=[column]).column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    return [Number(str(v)) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in values]


_READERS: dict[str, Callable[[Path, str], list[object]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
