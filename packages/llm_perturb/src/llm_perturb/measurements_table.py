"""The table of measurements: its rows, its files, what is printed of it."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bridge.exchange.printable import say
from bridge.exchange.run_folder import Run
from bridge.exchange.tables import MEASUREMENTS, atomic_path, read_table, write_table, write_text

from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.perplexity import Measured, Perplexity, exp
from llm_perturb.intervals import ratio_interval
from llm_perturb.measurement import Condition, Outcome
from llm_perturb.top_against_random import compare

_WHOLE = {"seed": "Int64", "row": "Int64", "col": "Int64"}  # columns that may be empty


def record_of(outcome: Outcome, baseline: Measured, before: Perplexity, corpus: Corpus, model: str) -> dict:
    """What is kept of an outcome until the table is written."""
    measured = outcome.measured
    record = {"key": outcome.condition.key, "row": row_of(outcome, baseline, before, corpus, model)}
    record |= {"losses": measured.losses.tolist(), "correct": measured.correct.tolist()}
    if measured.divergence is not None:
        record["divergence"] = measured.divergence.tolist()
    return record | {"n_changed": outcome.n_changed, "failure": outcome.failure}


def failures(records: list[dict]) -> dict[str, str]:
    """The targets that failed, with the first error of each."""
    failed: dict[str, str] = {}
    for record in records:
        if record["failure"]:
            failed.setdefault(record["row"]["target_layer"], record["failure"])
    return failed


def row_of(outcome: Outcome, baseline: Measured, before: Perplexity, corpus: Corpus, model: str) -> dict:
    """One row of the table: d_i = S_i after - S_i before, on the same tokens."""
    condition: Condition = outcome.condition
    measured = outcome.measured
    differences = measured.losses - baseline.losses  # (n,)
    lengths = torch.tensor([len(sequence) - 1 for sequence in corpus.sequences])
    delta_nll = differences.sum().item() / corpus.n_tokens
    interval = ratio_interval(differences.numpy(), lengths.numpy())
    perturbed_ppl = exp(before.nll + delta_nll)
    names = list(condition.target.parameters)
    return {
        "target_layer": condition.target.layer,
        "parameter": ",".join(names) if len(names) <= 3 else f"{len(names)} parameters",
        "selection": condition.selection,
        "perturbation": condition.perturbation.label,
        "k": condition.k,
        "seed": condition.seed,
        "n_weights": len(condition.positions),
        "score_sum": condition.score_sum,
        "baseline_nll": before.nll,
        "perturbed_nll": before.nll + delta_nll,
        "delta_nll": delta_nll,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "baseline_ppl": before.ppl,
        "perturbed_ppl": perturbed_ppl,
        "delta_ppl": perturbed_ppl - before.ppl,
        "n_tokens": before.n_tokens,
        "n_sequences": before.n_sequences,
        "corpus_sha256": corpus.facts["corpus_sha256"],
        "model": model,
        "ppl_ratio": exp(delta_nll),
        "delta_accuracy": (measured.correct - baseline.correct).sum().item() / corpus.n_tokens,
        "kl": math.nan if measured.divergence is None else measured.divergence.sum().item() / corpus.n_tokens,
        "row": condition.row,
        "col": condition.col,
    }


def write_records(run: Run, records: list[dict], baseline: Measured, corpus: Corpus, comparisons: bool = True) -> None:
    """Write the table and the losses behind it, and print it.

    Args:
        run: the folder.
        records: of each condition, in the order of the table, as ``record_of`` gives them.
        baseline: the unperturbed model.
        corpus: the sequences.
        comparisons: whether these are all rows of a request, so that top sets can be compared with random ones.
    """
    frame = pd.DataFrame([record["row"] for record in records]).astype(_WHOLE)
    _warn(run, records)
    write_table(run.folder / "measurements.csv", frame, MEASUREMENTS)
    _write_losses(run.folder / "sequence_losses.parquet", records, baseline, corpus)
    _print_rows(frame)
    if comparisons:
        write_comparisons(run.folder)
    say(f"{len(frame)} measurements written to {run.folder / 'measurements.csv'}")


def write_comparisons(folder: Path) -> None:
    """Compare top sets with random ones, from the files of a run; write and print the table if there are any."""
    table = read_table(folder / "measurements.csv", MEASUREMENTS)
    losses = pd.read_parquet(folder / "sequence_losses.parquet")
    shape = len(table), -1
    differences = (losses["perturbed_nats"] - losses["baseline_nats"]).to_numpy().reshape(shape)
    n_tokens = losses["n_tokens"].to_numpy().reshape(shape)[0]
    frame = compare(table, differences, n_tokens)
    if len(frame):
        write_text(folder / "comparisons.csv", frame.to_csv(index=False))
        for row in frame.itertuples():
            _print_comparison(row)


def _print_comparison(row: tuple) -> None:
    interval = f" ({row.note})" if np.isnan(row.ci_low) else f", 95 % interval {row.ci_low:+.6f} to {row.ci_high:+.6f}"
    say(
        f"{row.selection.upper()} AGAINST {row.control.upper()}: {row.target_layer}, {row.perturbation}, k={row.k}: "
        f"{row.difference:+.6f} nats per token more than {row.n_draws} draws{interval}, p = {row.p_value:.3g}"
    )


def _warn(run: Run, records: list[dict]) -> None:
    for record in records:
        row = record["row"]
        what = f"{row['perturbation']} of {row['selection']}, k={row['k']}, in {row['target_layer']}"
        if record["n_changed"] == 0:
            run.warn(f"{what} changed no bit of the model")
        elif row["delta_nll"] == 0 and row["selection"].startswith("top_"):
            run.warn(f"{what} changed {record['n_changed']} weights and no loss at all")
        if row["n_weights"] < row["k"]:
            run.warn(f"{what}: the CSV holds {row['n_weights']} weights of this target, fewer than k")
        if not math.isfinite(row["delta_nll"]):
            run.warn(f"{what}: the perturbed loss is {row['delta_nll']}")


def _write_losses(path: Path, records: list[dict], baseline: Measured, corpus: Corpus) -> None:
    """The paired losses: one row per condition and sequence, nats summed over the sequence."""
    n = len(corpus.sequences)
    columns = ["target_layer", "selection", "perturbation", "k", "seed", "row", "col"]
    frame = pd.DataFrame({c: [r["row"][c] for r in records for _ in range(n)] for c in columns})
    frame["sequence"] = list(range(n)) * len(records)
    frame["n_tokens"] = [len(sequence) - 1 for sequence in corpus.sequences] * len(records)
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
    for row in frame.itertuples():
        kind = row.selection.split("_")[0]
        seed = "" if pd.isna(row.seed) else f" seed {row.seed}"
        place = "" if pd.isna(row.row) and pd.isna(row.col) else f"[{row.row}, {row.col}]".replace("<NA>", ":")
        interval = "" if pd.isna(row.ci_low) else f", 95 % interval {row.ci_low:+.6f} to {row.ci_high:+.6f}"
        say(
            f"{names.get(kind, kind.upper())}_PERPLEXITY: {row.perturbed_ppl:.6g}  ({row.target_layer}{place}, "
            f"{row.selection}{seed}, {row.perturbation}, k={row.k}: delta_nll {row.delta_nll:+.6f}{interval})"
        )
