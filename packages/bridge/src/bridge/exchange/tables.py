"""The tables that pass between the packages: their columns, reading with checks, writing without loss.

Each table is a CSV that a spreadsheet opens. Floats are written in full, so that reading gives the same
bits back; a file appears under its name only once it is complete.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd

from bridge.exchange.atomic_file import atomic_path
from bridge.exchange.errors import RequestError
from bridge.exchange.printable import check_printable, is_printable


@dataclass(frozen=True)
class Table:
    """A form of table.

    Attributes:
        name: in messages.
        columns: the type of each column: str, int, float, int? (may be empty), or probability (above 0, at most 1).
        later: columns that the tables of earlier versions lack.
        further: likewise the types of columns that may follow.
    """

    name: str
    columns: dict[str, str]
    later: frozenset[str] = frozenset()
    further: dict[str, str] = field(default_factory=dict)


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
SAMPLED_WEIGHTS = Table(
    "sampled weights",
    {"layer": "str", "parameter": "str", "row": "int", "col": "int?", "value": "float"}
    | {"inclusion": "probability"},  # with which the weight came into the table
)  # followed by score_<metric> and share_<metric> columns, one of each for each metric of the run
SINGLE_WEIGHTS = Table(
    "single weights",
    TOP_WEIGHTS.columns | {"inclusion": "probability"},  # of being perturbed alone, from the discovery on
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
        "selection": "str",  # top_<metric>, bottom_<metric>, random, weight (one weight alone)
        "perturbation": "str",
        "k": "int",
        "seed": "int?",
        "n_weights": "int",  # weights that were chosen
        "n_changed": "int",  # of those, how many have another value under the perturbation
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
    later=frozenset({"n_changed"}),
    further={"row": "int?", "col": "int?"}  # of a weight that was perturbed alone, else empty
    | dict.fromkeys(["ppl_ratio", "ppl_ratio_low", "ppl_ratio_high", "perturbed_ppl_low"], "float")
    | dict.fromkeys(["perturbed_ppl_high", "delta_ppl_low", "delta_ppl_high"], "float")
    | dict.fromkeys(["delta_accuracy", "kl", "n_eff"], "float")
    | {"n_clusters": "int", "few_texts_decide": "int"},
)
TARGETS = Table(
    "targets",
    {
        "target_layer": "str",
        "role": "str",  # top, control
        "n_top": "int",
        "score_sum": "float",
        "score_rank": "int",
        "n_layers": "int",  # from which the targets were chosen
        "inclusion": "probability",  # with which the layer was chosen; 1 for a top layer
    },
)
CORRELATIONS = Table(
    "correlations",
    {"unit": "str", "metric": "str", "perturbation": "str", "k": "int"}
    | {"primary": "int"}  # 1 for the analysis that was named before anything was measured, else 0
    | {"n": "int", "n_kinds": "int"}  # units, and kinds of matrix among them (1 where kinds do not count)
    | dict.fromkeys(["spearman", "ci_low", "ci_high", "p_value"], "float")
    | dict.fromkeys(["within_rho", "within_low", "within_high", "within_p"], "float")  # given kind and depth
    | {"n_fitted": "int"}  # numbers fitted to each ranking: kinds and course over depth, or the mean alone
    | dict.fromkeys(["texts_low", "texts_high"], "float")  # interval of spearman over texts, where all layers are in
    | {"p_adjusted": "float", "n_tests": "int"}  # of within_p, or of p_value without kinds; size of its family
    | dict.fromkeys(["above_magnitude", "above_low", "above_high"], "float")  # rho minus magnitude's, and its interval
    | dict.fromkeys(["above", "below", "not_told_apart"], "str")  # other metrics, separated by spaces
    | dict.fromkeys(["kendall_tau_b", "weighted_tau", "rbo"], "float")
    | {"top_n": "int", "precision_at_n": "float"}
    | {"unbounded_share": "float", "note": "str"}  # share of effects whose loss is infinite or undefined
    # estimates for all layers or all weights of the model, each unit weighted by 1 / inclusion, with their intervals
    | dict.fromkeys(["population_rho", "population_low", "population_high", "population_p", "n_effective"], "float")
    | dict.fromkeys(["population_share", "population_precision", "precision_low", "precision_high"], "float")
    | dict.fromkeys(["population_ratio", "ratio_low", "ratio_high"], "float"),  # total effect / total score
)
COMPARISONS = Table(
    "comparisons",
    {"target_layer": "str", "selection": "str", "perturbation": "str", "k": "int", "control": "str", "n_draws": "int"}
    | dict.fromkeys(["delta_nll", "control_mean", "control_low", "control_high", "difference"], "float")
    | dict.fromkeys(["ci_low", "ci_high"], "float")  # of the difference, over texts and random sets
    | {"n_eff": "float", "n_beaten": "int", "p_value": "float"}
    | dict.fromkeys(["unbounded_share", "control_unbounded_share"], "float")
    | {"note": "str"},
)
STABILITY = Table(
    "stability",
    {
        "kind": "str",  # halves: of one corpus; seeds: first halves of two splits; metrics: on the whole corpus
        "metric": "str",
        "other": "str",  # the other metric; the same one but for kind metrics
        "k": "int",
        "seed": "int?",  # the split's number from 0; empty for kind metrics
        "other_seed": "int?",
        "jaccard": "float",
        "jaccard_chance": "float",  # expected of two random sets of K
        "jaccard_null": "float",  # of the same two, had each weight another's gradients; empty for kind metrics
        "n_common": "int",
        "rank_correlation": "float",  # empty where it is not defined
    },
)

_EMPTY = {"", "NA", "nan", "NaN"}
_INT64 = 2**63
_EXPECTED = {"float": "a number", "int": "a whole number of 64 bits", "int?": "a whole number of 64 bits, or empty"}
_EXPECTED |= {"probability": "a number above 0 and at most 1"}
_DTYPES = {"int": "int64", "int?": "Int64", "float": "float64", "probability": "float64"}


def write_table(path: Path, frame: pd.DataFrame, table: Table) -> None:
    """Write ``frame`` with the table's columns first, in their order; further columns follow."""
    missing = [column for column in table.columns if column not in frame and column not in table.later]
    assert not missing, f"{table.name} lack {missing}"
    declared = [column for column in table.columns if column in frame]
    extra = [column for column in frame if column not in table.columns]
    with atomic_path(path) as temporary:
        frame[[*declared, *extra]].to_csv(temporary, index=False)


def read_table(path: Path, table: Table) -> pd.DataFrame:
    """Read a table and check it.

    Raises:
        RequestError: no such file, not a CSV, cut off, a column missing or twice, a value of the wrong type, a text
            with a character that is not printable, or no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such file (expected a CSV of {table.name})")
    try:
        lines = _rows(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, csv.Error) as error:
        raise RequestError(f"{path} cannot be read as a CSV of {table.name}: {error}") from None
    header = [check_printable(name, f"{path}: column") for name in lines[0][1]] if lines else []
    missing = [column for column in table.columns if column not in header and column not in table.later]
    if missing:
        columns_are = "column" if len(missing) == 1 else "columns"
        raise RequestError(f"{path} lacks the {columns_are} {', '.join(missing)} of {table.name}")
    twice = [column for column in dict.fromkeys(header) if header.count(column) > 1]
    if twice:
        raise RequestError(f"{path} has the column {twice[0]} twice; expected a CSV of {table.name}")
    if len(lines) == 1:
        raise RequestError(f"{path} holds no rows of {table.name}")
    line_numbers = [number for number, _ in lines[1:]]
    columns, kinds = {}, table.columns | table.further
    for at, name in enumerate(header):
        texts = [row[at] for _, row in lines[1:]]
        cell = partial(_cell, path, line_numbers, name)
        columns[name] = _parse(texts, kinds[name], cell) if name in kinds else _guess(texts, cell)
    return pd.DataFrame(columns)


def _cell(path: Path, line_numbers: list[int], column: str, row: int) -> str:
    """The name of a cell in messages."""
    return f"{path}, line {line_numbers[row]}: column {column}"


def _rows(text: str) -> list[tuple[int, list[str]]]:
    """The rows with their line numbers, header first; a file that was cut off is refused.

    Half a number still reads as a number, so a full disk or a broken copy must show by its last line. This is why
    ``pandas.read_csv`` does not read these files: it fills short rows with empty cells, renames a column that occurs
    twice, and tells of no line which type was wrong.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = [(reader.line_num, row) for row in reader if row]
    for line, row in rows:
        if len(row) != len(rows[0][1]):
            raise ValueError(f"line {line} has {len(row)} fields, the header {len(rows[0][1])}; is the file cut off?")
    if not text.endswith(("\n", "\r")):
        raise ValueError("the last line has no end; is the file cut off? (If it is whole, add a line break.)")
    return rows


def _parse(texts: list[str], kind: str, cell: Callable[[int], str]) -> pd.Series:
    """A column of one type; ``cell`` names the cell of a row in messages."""
    if kind == "str":
        return _names(texts, cell)
    values = []
    for row, text in enumerate(texts):
        try:
            values.append(_number(text, kind))
        except ValueError:
            raise RequestError(f"{cell(row)} should be {_EXPECTED[kind]}, not '{text[:80]}'") from None
    return pd.Series(values, dtype=_DTYPES[kind])


def _names(texts: list[str], cell: Callable[[int], str]) -> pd.Series:
    """A column of texts, all of them printable."""
    for text in dict.fromkeys(texts):
        if not is_printable(text):
            check_printable(text, cell(texts.index(text)))
    return pd.Series(texts, dtype="str")


def _number(text: str, kind: str) -> float | int | None:
    """A number as Python reads it, which is exact."""
    if kind == "float":
        return float(text) if text not in _EMPTY else float("nan")
    if kind == "probability":
        probability = float(text)
        if not 0 < probability <= 1:
            raise ValueError(text)
        return probability
    if kind == "int?" and text in _EMPTY:
        return None
    try:
        number = int(text)
    except ValueError:
        fraction = float(text)  # a spreadsheet, or pandas where a value is missing, writes 3 as 3.0
        if not fraction.is_integer():
            raise ValueError(text) from None
        number = int(fraction)
    if not -_INT64 <= number < _INT64:
        raise ValueError(text)
    return number


def _guess(texts: list[str], cell: Callable[[int], str]) -> pd.Series:
    """A column that the table does not declare: numbers if all of its cells are, else texts."""
    try:
        return pd.to_numeric(pd.Series(texts, dtype="str"))
    except ValueError:
        return _names(texts, cell)
