"""The tables that pass between the packages: their columns, reading with checks, writing without loss.

Each table is a CSV that a spreadsheet opens. Floats are written in full, so that reading gives the same
bits back; a file appears under its name only once it is complete.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bridge.errors import RequestError


@dataclass(frozen=True)
class Table:
    """A kind of table: its name in messages, and for each column 'str', 'int', 'float' or 'int?' (may be empty)."""

    name: str
    columns: dict[str, str]


TOP_WEIGHTS = Table(
    "weights",
    {
        "rank": "int",  # from 1; ties broken by (parameter order, row, col)
        "layer": "str",  # module path, usable as TARGET_LAYER
        "parameter": "str",  # full parameter name
        "row": "int",
        "col": "int?",  # empty for a one-dimensional tensor
        "value": "float",  # the weight itself
        "score": "float",
    },
)
LAYER_SUMMARY = Table(
    "layer summary",
    {"layer": "str", "parameter": "str", "n_weights": "int"}
    | dict.fromkeys(["score_sum", "score_mean", "score_max", "score_p99"], "float"),
)  # followed by in_top_<k> columns: how many of each global top-K this parameter holds
MEASUREMENTS = Table(
    "measurements",
    {
        "target_layer": "str",
        "parameter": "str",  # the parameters perturbed, joined by commas; ALL where they are many
        "selection": "str",  # top_<metric>, bottom_<metric>, random
        "perturbation": "str",
        "k": "int",
        "seed": "int?",
        "n_weights": "int",  # weights really perturbed
        "score_sum": "float",  # the prediction: the metric's scores of these weights added; empty for random
        "baseline_nll": "float",  # nats per token
        "perturbed_nll": "float",
        "delta_nll": "float",
        "ci_low": "float",  # of delta_nll
        "ci_high": "float",
        "baseline_ppl": "float",
        "perturbed_ppl": "float",
        "delta_ppl": "float",
        "n_tokens": "int",
        "n_sequences": "int",
        "corpus_sha256": "str",
        "model": "str",
    },
)
TARGETS = Table(
    "targets",
    {"target_layer": "str", "role": "str", "n_top": "int", "score_sum": "float", "score_rank": "int"},
)
CORRELATIONS = Table(
    "correlations",
    {"unit": "str", "metric": "str", "perturbation": "str", "k": "int", "n": "int"}
    | dict.fromkeys(["spearman", "ci_low", "ci_high", "p_value", "kendall_tau_b"], "float")
    | {"note": "str"},
)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends without an exception."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write JSON, indented, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, frame: pd.DataFrame, table: Table) -> None:
    """Write ``frame`` with the table's columns first, in their order; further columns follow."""
    missing = [column for column in table.columns if column not in frame]
    assert not missing, f"{table.name} lack {missing}"
    extra = [column for column in frame if column not in table.columns]
    with atomic_path(path) as temporary:
        frame[[*table.columns, *extra]].to_csv(temporary, index=False)


def read_table(path: Path, table: Table) -> pd.DataFrame:
    """Read a table and check it.

    Raises:
        RequestError: no such file, not a CSV, a column missing, a value of the wrong kind, or no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such file (expected a CSV of {table.name})")
    strings = {column: str for column, kind in table.columns.items() if kind == "str"}
    try:
        frame = pd.read_csv(path, dtype=strings, float_precision="round_trip", keep_default_na=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{path} cannot be read as a CSV of {table.name}: {error}") from None
    missing = [column for column in table.columns if column not in frame]
    if missing:
        raise RequestError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} of {table.name}")
    if frame.empty:
        raise RequestError(f"{path} holds no rows of {table.name}")
    for column, kind in table.columns.items():
        frame[column] = _checked(frame[column], kind, path)
    return frame


def _checked(column: pd.Series, kind: str, path: Path) -> pd.Series:
    if kind == "str":
        return column.fillna("")
    numbers = pd.to_numeric(column, errors="coerce")
    bad = numbers.isna() & column.notna()
    if kind == "int":
        bad |= numbers.isna()
    if kind in {"int", "int?"}:
        bad |= numbers.notna() & (numbers % 1 != 0)
    if bad.any():
        line = int(bad.to_numpy().argmax())
        raise RequestError(
            f"{path}, line {line + 2}: column {column.name} should be a number, not '{column.iloc[line]}'"
        )
    return numbers.astype({"int": "int64", "int?": "Int64", "float": "float64"}[kind])
