"""The table of measurements: its rows, its files, and what is printed of it."""

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pandas as pd
from bridge.exchange import layout
from bridge.exchange.atomic_file import atomic_path, write_text
from bridge.exchange.printable import say
from bridge.exchange.run_folder import Run
from bridge.exchange.tables import MEASUREMENTS, read_table, write_table

from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.perplexity import Measured, Perplexity, exp
from llm_perturb.intervals import (
    by_cluster,
    effective_number,
    few_texts_decide,
    perplexity_change_interval,
    perplexity_interval,
    ratio_interval,
)
from llm_perturb.measurement_condition import Outcome
from llm_perturb.top_against_random import compare

_WHOLE = {"seed": "Int64", "row": "Int64", "col": "Int64"}  # columns that may be empty
_INT64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_TYPES: dict[str, Any] = {"str": str, "float": float, "int": _INT64, "int?": _INT64 | None}
_LOSS_KEYS = ["target_layer", "selection", "perturbation", "k", "seed", "row", "col"]
_MAX_NAMES = 3  # a row that perturbs more parameters says only how many


def record_form(n_sequences: int) -> type[msgspec.Struct]:
    """What a record of a run's log has to be: its entries, their types, and one number of each sequence."""
    each = msgspec.Meta(min_length=n_sequences, max_length=n_sequences)
    columns = MEASUREMENTS.columns | MEASUREMENTS.further
    row = msgspec.defstruct("Row", [(column, _TYPES[kind]) for column, kind in columns.items()])
    losses, counts = Annotated[list[float], each], Annotated[list[int], each]
    fields = [("key", str), ("row", row), ("losses", losses), ("correct", counts), ("failure", str | None)]
    return msgspec.defstruct("Record", [*fields, ("divergence", losses | None, None)])


def record_of(outcome: Outcome, baseline: Measured, before: Perplexity, corpus: Corpus, model: str) -> dict[str, Any]:
    """What the log of a run holds of one outcome until the table is written; see ``record_form``.

    Args:
        outcome: of one condition.
        baseline: the sequences under the unperturbed model.
        before: its perplexity.
        corpus: the sequences.
        model: the model's name.
    """
    measured = outcome.measured
    record = {
        "key": outcome.condition.key,
        "row": row_of(outcome, baseline, before, corpus, model),
        "losses": measured.losses.tolist(),
        "correct": measured.correct.tolist(),
    }
    if measured.divergence is not None:
        record["divergence"] = measured.divergence.tolist()
    return record | {"failure": outcome.failure}


def failures(records: list[dict[str, Any]]) -> dict[str, str]:
    """The targets that failed, with the first error of each."""
    failed: dict[str, str] = {}
    for record in records:
        if record["failure"]:
            failed.setdefault(record["row"]["target_layer"], record["failure"])
    return failed


def row_of(outcome: Outcome, baseline: Measured, before: Perplexity, corpus: Corpus, model: str) -> dict[str, Any]:
    """One row of the table: d_i = S_i after - S_i before, on the same tokens; see ``record_of``."""
    condition, measured = outcome.condition, outcome.measured
    differences = measured.losses - baseline.losses  # (n,)
    delta_nll = differences.sum().item() / corpus.n_tokens
    perturbed_ppl = exp(before.nll + delta_nll)
    delta_accuracy = (measured.correct - baseline.correct).sum().item() / corpus.n_tokens
    kl = math.nan if measured.divergence is None else measured.divergence.sum().item() / corpus.n_tokens

    d = differences.numpy()
    tokens, clusters = np.array(corpus.lengths), corpus.clusters  # (n,)
    interval = ratio_interval(d, tokens, clusters)
    after = perplexity_interval(measured.losses.numpy(), tokens, clusters)
    change = perplexity_change_interval(baseline.losses.numpy(), measured.losses.numpy(), tokens, clusters)

    names = list(condition.target.parameters)
    return {
        "target_layer": condition.target.layer,
        "parameter": ",".join(names) if len(names) <= _MAX_NAMES else f"{len(names)} parameters",
        "selection": condition.selection,
        "perturbation": condition.perturbation.label,
        "k": condition.k,
        "seed": condition.seed,
        "n_weights": len(condition.positions),
        "n_changed": outcome.n_changed,
        "score_sum": condition.score_sum,
        "baseline_nll": before.nll,
        "perturbed_nll": before.nll + delta_nll,
        "delta_nll": delta_nll,
        "ci_low": float(interval.low),
        "ci_high": float(interval.high),
        "baseline_ppl": before.ppl,
        "perturbed_ppl": perturbed_ppl,
        "delta_ppl": perturbed_ppl - before.ppl,
        "n_tokens": before.n_tokens,
        "n_sequences": before.n_sequences,
        "corpus_sha256": corpus.metadata["corpus_sha256"],
        "model": model,
        "ppl_ratio": exp(delta_nll),
        "delta_accuracy": delta_accuracy,
        "kl": kl,
        "row": condition.row,
        "col": condition.col,
        "perturbed_ppl_low": float(after.low),
        "perturbed_ppl_high": float(after.high),
        "delta_ppl_low": float(change.low),
        "delta_ppl_high": float(change.high),
        "ppl_ratio_low": exp(float(interval.low)),
        "ppl_ratio_high": exp(float(interval.high)),
        "n_clusters": len(by_cluster(tokens, clusters)),
        "n_eff": float(effective_number(d, clusters)),
        "few_texts_decide": int(few_texts_decide(d, clusters)),
    }


def write_records(
    run: Run, records: list[dict[str, Any]], baseline: Measured, corpus: Corpus, comparisons: bool = True
) -> None:
    """Write the table and the losses behind it, and print it.

    Args:
        run: the folder.
        records: of each condition, in the order of the table, as ``record_of`` returns them.
        baseline: the unperturbed model.
        corpus: the sequences.
        comparisons: whether these are all rows of a request, so that top sets can be compared with random ones.
    """
    frame = pd.DataFrame([record["row"] for record in records]).astype(_WHOLE)
    _warn(run, records)
    write_table(run.folder / layout.MEASUREMENTS_FILE, frame, MEASUREMENTS)
    _write_losses(run.folder / layout.SEQUENCE_LOSSES_FILE, records, baseline, corpus)
    _print_rows(frame)
    if comparisons:
        write_comparisons(run.folder)
    say(f"{len(frame)} measurements written to {run.folder / layout.MEASUREMENTS_FILE}")


def write_comparisons(folder: Path) -> None:
    """Compare top sets with random ones, from the files of a run; write and print the table if there are any."""
    table = read_table(folder / layout.MEASUREMENTS_FILE, MEASUREMENTS)
    losses = pd.read_parquet(folder / layout.SEQUENCE_LOSSES_FILE)
    shape = len(table), -1
    differences = (losses["perturbed_nats"] - losses["baseline_nats"]).to_numpy().reshape(shape)  # (rows, n)
    n_tokens = losses["n_tokens"].to_numpy().reshape(shape)[0]  # (n,)
    clusters = losses["cluster"].to_numpy().reshape(shape)[0] if "cluster" in losses else None
    frame = compare(table, differences, n_tokens, clusters)
    if len(frame):
        write_text(folder / layout.COMPARISONS_FILE, frame.to_csv(index=False))
        for row in frame.itertuples():
            _print_comparison(row)


def _print_comparison(row: Any) -> None:  # noqa: ANN401 - a named tuple of pandas
    line = (
        f"{row.selection.upper()} AGAINST {row.control.upper()}: {row.target_layer}, {row.perturbation}, k={row.k}: "
        f"{row.difference:+.6f} nats per token more than {row.n_draws} draws"
    )
    if not np.isnan(row.ci_low):
        line += f", 95 % interval {row.ci_low:+.6f} to {row.ci_high:+.6f}"
    if not np.isnan(row.p_value):
        line += f", p = {row.p_value:.3g}"
    if row.note:
        line += f" ({row.note})"
    say(line)


def _warn(run: Run, records: list[dict[str, Any]]) -> None:
    for record in records:
        row = record["row"]
        what = f"{row['perturbation']} of {row['selection']}, k={row['k']}, in {row['target_layer']}"
        if row["n_changed"] == 0:
            run.warn(f"{what} changed no weight of the model")
        elif row["delta_nll"] == 0 and layout.is_top(row["selection"]):
            run.warn(f"{what} changed {row['n_changed']} weights and no loss at all")
        if row["n_weights"] < row["k"]:
            run.warn(f"{what}: the CSV holds {row['n_weights']} weights of this target, fewer than k")
        if not math.isfinite(row["delta_nll"]):
            run.warn(f"{what}: the perturbed loss is {row['delta_nll']}")


def _write_losses(path: Path, records: list[dict[str, Any]], baseline: Measured, corpus: Corpus) -> None:
    """The paired losses: one row per condition and sequence, nats summed over the sequence."""
    n = len(corpus.sequences)
    rows = [record["row"] for record in records for _ in range(n)]
    frame = pd.DataFrame({column: [row[column] for row in rows] for column in _LOSS_KEYS})
    frame["sequence"] = list(range(n)) * len(records)
    clusters = range(n) if corpus.clusters is None else corpus.clusters.tolist()
    frame["cluster"] = list(clusters) * len(records)
    frame["n_tokens"] = corpus.lengths * len(records)
    frame["baseline_nats"] = baseline.losses.tolist() * len(records)
    frame["perturbed_nats"] = [loss for record in records for loss in record["losses"]]
    frame["baseline_correct"] = baseline.correct.tolist() * len(records)
    frame["perturbed_correct"] = [count for record in records for count in record["correct"]]
    if all("divergence" in record for record in records):
        frame["kl_nats"] = [nats for record in records for nats in record["divergence"]]
    frame = frame.astype(_WHOLE)
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary)


def _print_rows(frame: pd.DataFrame) -> None:
    names = {"top": "TOPK", "random": "CONTROL", "matched": "MATCHED", "bottom": "BOTTOMK"}
    row: Any  # a named tuple of pandas
    for row in frame.itertuples():
        kind = row.selection.split("_")[0]
        details = [row.target_layer + _index_text(row), row.selection]
        if not pd.isna(row.seed):
            details[-1] += f" seed {row.seed}"
        details += [row.perturbation, f"k={row.k}: delta_nll {row.delta_nll:+.6f}"]
        if not pd.isna(row.ci_low):
            details.append(f"95 % interval {row.ci_low:+.6f} to {row.ci_high:+.6f}")
        say(f"{names.get(kind, kind.upper())}_PERPLEXITY: {row.perturbed_ppl:.6g}  ({', '.join(details)})")


def _index_text(row: Any) -> str:  # noqa: ANN401 - a named tuple of pandas
    """``[3, 5]`` for a single weight, ``[3, :]`` for a whole row, nothing for a set of weights."""
    if pd.isna(row.row) and pd.isna(row.col):
        return ""
    return f"[{row.row}, {row.col}]".replace("<NA>", ":")
