"""The files and the lines of a run, on losses whose every figure can be computed by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from bridge.exchange.tables import MEASUREMENTS, read_table
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.perplexity import Measured, summarize
from llm_perturb.measurement_condition import Condition, Outcome
from llm_perturb.measurements_table import failures, record_of, write_records
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Target
from llm_perturb.top_against_random import difference_interval
from torch.nn import Parameter

LENGTHS = [4, 6, 10, 10, 10, 10, 10]
BASELINE = Measured(torch.tensor(LENGTHS, dtype=torch.float64) * 2, torch.tensor(LENGTHS) // 2)
SPREAD = torch.tensor([0.5, -0.5, 0.1, -0.1, 0.2, -0.2, 0.0], dtype=torch.float64)


def corpus(documents=None):
    sequences = [torch.zeros(n + 1, dtype=torch.int64) for n in LENGTHS]
    return Corpus(sequences, {"corpus_sha256": "c"}, documents=documents)


def record(effect, selection="top_obd", seed=None, texts=None, spread=SPREAD, n_parameters=1, n_changed=2, **at):
    """Each sequence costs ``effect`` nats per token more, and one of its tokens is no longer the most probable."""
    texts = texts or corpus()
    target = Target("a", {f"a.{i}": Parameter(torch.ones(4)) for i in range(n_parameters)})
    options = {"k": at.pop("k", 2), "seed": seed, "positions": torch.tensor([3, 1]), "score_sum": 0.25} | at
    condition = Condition(target, selection, Perturbation("zero"), **options)
    losses = BASELINE.losses + effect * torch.tensor(LENGTHS, dtype=torch.float64) + spread
    measured = Measured(losses, BASELINE.correct - 1, spread**2)
    outcome = Outcome(condition, measured, n_changed)
    return record_of(outcome, BASELINE, summarize(BASELINE.losses, texts), texts, "tiny")


def written(folder, records, texts=None, **options):
    """Write the records, and return what the run was warned of."""
    warnings = []
    write_records(SimpleNamespace(folder=folder, warn=warnings.append), records, BASELINE, texts or corpus(), **options)
    return warnings


def test_a_record_holds_the_row_and_the_losses_behind_it():
    whole = record(0.5)
    assert whole["key"] == "a|a.0|None|None|top_obd|zero|2|None"
    assert record(0.5, "weight", 4, row=3, col=5, k=1)["key"] == "a|a.0|3|5|weight|zero|1|4"
    assert whole["losses"] == pytest.approx([10.5, 14.5, 25.1, 24.9, 25.2, 24.8, 25.0], rel=1e-15)
    assert whole["correct"] == [1, 2, 4, 4, 4, 4, 4]
    assert whole["divergence"] == pytest.approx([0.25, 0.25, 0.01, 0.01, 0.04, 0.04, 0], rel=1e-15)
    row = whole["row"]
    assert row["kl"] == pytest.approx(0.6 / 60, rel=1e-12)
    assert row["delta_accuracy"] == pytest.approx(-7 / 60, rel=1e-12)
    assert (row["baseline_nll"], row["perturbed_nll"]) == (2, pytest.approx(2.5, rel=1e-12))
    assert (row["baseline_ppl"], row["perturbed_ppl"]) == (pytest.approx(math.e**2), pytest.approx(math.e**2.5))
    assert row["delta_ppl"] == pytest.approx(math.e**2.5 - math.e**2, rel=1e-12)
    assert row["ppl_ratio"] == pytest.approx(math.e**0.5, rel=1e-12)
    assert record(1.5)["row"]["delta_ppl"] == pytest.approx(math.e**3.5 - math.e**2, rel=1e-12)
    assert record(-1.5)["row"]["delta_ppl"] == pytest.approx(math.e**0.5 - math.e**2, rel=1e-12)
    assert (row["parameter"], row["score_sum"], row["n_tokens"], row["n_sequences"]) == ("a.0", 0.25, 60, 7)
    d = 0.5 * np.array(LENGTHS) + SPREAD.numpy()
    assert row["n_eff"] == pytest.approx(d.sum() ** 2 / (d**2).sum(), rel=1e-12)
    assert (row["few_texts_decide"], row["n_clusters"]) == (0, 7)
    one_text = record(0.0, spread=torch.tensor([0, 0, 0, 0, 0, 0, 3.0]))["row"]
    assert (one_text["n_eff"], one_text["few_texts_decide"]) == (1, 1)


def test_parameters_are_named_up_to_three():
    assert record(0.5, n_parameters=3)["row"]["parameter"] == "a.0,a.1,a.2"
    assert record(0.5, n_parameters=4)["row"]["parameter"] == "4 parameters"


def test_texts_that_several_sequences_come_from_are_counted_once():
    row = record(0.5, texts=corpus([0, 0, 1, 1, 2, 2, 3]))["row"]
    assert (row["n_clusters"], row["n_sequences"]) == (4, 7)
    assert math.isnan(row["ci_low"]) and math.isnan(row["ppl_ratio_high"])  # four texts are too few


def test_a_failed_target_keeps_its_first_error():
    records = [record(0.5), record(0.0, n_changed=0), record(0.0, "top_magnitude", n_changed=0)]
    error = "zero of top_obd in a changes no weight of the model, so its effect cannot be measured"
    assert failures(records) == {"a": error}


def test_the_losses_of_every_condition_and_sequence_are_written(tmp_path):
    texts = corpus([5, 5, 6, 7, 8, 9, 10])
    written(tmp_path, [record(0.5, texts=texts), record(0.1, "random", 3, texts=texts)], texts)
    losses = pd.read_parquet(tmp_path / "sequence_losses.parquet")
    assert list(losses) == [
        "target_layer", "selection", "perturbation", "k", "seed", "row", "col", "sequence", "cluster", "n_tokens",
        "baseline_nats", "perturbed_nats", "baseline_correct", "perturbed_correct", "kl_nats",
    ]  # fmt: skip
    assert losses["selection"].tolist() == ["top_obd"] * 7 + ["random"] * 7
    assert losses["seed"].tolist() == [pd.NA] * 7 + [3] * 7
    assert losses["sequence"].tolist() == [*range(7)] * 2
    assert losses["cluster"].tolist() == [5, 5, 6, 7, 8, 9, 10] * 2
    assert losses["n_tokens"].tolist() == LENGTHS * 2
    assert losses["baseline_nats"].tolist() == [8, 12, 20, 20, 20, 20, 20] * 2
    assert losses["perturbed_nats"][7:].tolist() == pytest.approx([8.9, 12.1, 21.1, 20.9, 21.2, 20.8, 21], rel=1e-15)
    assert losses["baseline_correct"].tolist() == [2, 3, 5, 5, 5, 5, 5] * 2
    assert losses["perturbed_correct"].tolist() == [1, 2, 4, 4, 4, 4, 4] * 2
    assert losses["kl_nats"].tolist() == pytest.approx([0.25, 0.25, 0.01, 0.01, 0.04, 0.04, 0] * 2, rel=1e-15)


def test_without_texts_of_their_own_each_sequence_is_one_and_a_divergence_is_in_all_rows_or_none(tmp_path):
    without = record(0.1)
    del without["divergence"]
    written(tmp_path, [record(0.5, "top_magnitude"), without])
    losses = pd.read_parquet(tmp_path / "sequence_losses.parquet")
    assert losses["cluster"].tolist() == [*range(7)] * 2
    assert "kl_nats" not in losses


def test_top_sets_are_compared_with_random_ones_and_every_line_is_printed(tmp_path, capsys):
    records = [record(0.5), record(0.1, "random", 0), record(0.2, "random", 1)]
    assert written(tmp_path, records) == []
    table = read_table(tmp_path / "measurements.csv", MEASUREMENTS)
    comparison = pd.read_csv(tmp_path / "comparisons.csv")
    assert table["delta_nll"].tolist() == pytest.approx([0.5, 0.1, 0.2], rel=1e-12)
    assert comparison.columns[0] == "target_layer"
    (row,) = comparison.itertuples()
    assert (row.n_draws, row.n_beaten) == (2, 2)
    assert row.difference == pytest.approx(0.35, rel=1e-12)
    drawn = np.outer([0.1, 0.2], LENGTHS) + SPREAD.numpy()
    expected = difference_interval(0.5 * np.array([LENGTHS]) + SPREAD.numpy(), drawn, np.array(LENGTHS))
    assert (row.ci_low, row.ci_high) == pytest.approx(expected, rel=1e-12)
    low, high = table["ci_low"], table["ci_high"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"TOPK_PERPLEXITY: 12.1825  (a, top_obd, zero, k=2: delta_nll +0.500000, "
        f"95 % interval {low[0]:+.6f} to {high[0]:+.6f})",
        f"CONTROL_PERPLEXITY: 8.16617  (a, random seed 0, zero, k=2: delta_nll +0.100000, "
        f"95 % interval {low[1]:+.6f} to {high[1]:+.6f})",
        f"CONTROL_PERPLEXITY: 9.02501  (a, random seed 1, zero, k=2: delta_nll +0.200000, "
        f"95 % interval {low[2]:+.6f} to {high[2]:+.6f})",
        f"TOP_OBD AGAINST RANDOM: a, zero, k=2: +0.350000 nats per token more than 2 draws, "
        f"95 % interval {row.ci_low:+.6f} to {row.ci_high:+.6f} "
        "(no p: with 2 draws it cannot be below 0.33 (19 are needed))",
        f"3 measurements written to {tmp_path / 'measurements.csv'}",
    ]


def test_top_sets_are_compared_text_by_text(tmp_path):
    texts = corpus([9, 9, 0, 1, 2, 3, 4])
    other = SPREAD * torch.arange(7)
    records = [record(0.5, texts=texts), *(record(0.1, "random", seed, texts, seed * other) for seed in range(3))]
    written(tmp_path, records, texts)
    (row,) = pd.read_csv(tmp_path / "comparisons.csv").itertuples()
    top = 0.5 * np.array([LENGTHS]) + SPREAD.numpy()
    drawn = 0.1 * np.array([LENGTHS]) + np.outer(range(3), other)
    expected = difference_interval(top, drawn, np.array(LENGTHS), np.array([9, 9, 0, 1, 2, 3, 4]))
    assert (row.ci_low, row.ci_high) == pytest.approx(expected, rel=1e-12)
    assert row.ci_low < row.difference < row.ci_high


def test_a_p_value_is_printed_where_the_draws_allow_one(tmp_path, capsys):
    written(tmp_path, [record(0.5), *(record(0.01 * seed, "random", seed) for seed in range(19))])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("TOP_OBD AGAINST"))
    assert line.endswith(", p = 0.05")


def test_nothing_is_compared_without_random_sets_or_for_a_part_of_a_request(tmp_path):
    written(tmp_path, [record(0.5)])
    written(tmp_path, [record(0.5), record(0.1, "random", 0)], comparisons=False)
    assert not (tmp_path / "comparisons.csv").exists()


def test_other_selections_are_named_by_their_kind_and_single_weights_by_their_index(tmp_path, capsys):
    records = [record(0.5, "bottom_obd"), record(0.5, "matched_obd", 1), record(0.5, "weight", row=3, col=5, k=1)]
    assert written(tmp_path, [*records, record(0.5, "row", row=3), record(0.5, "col", col=5)]) == []
    lines = capsys.readouterr().out.splitlines()
    starts = [line.partition("_PERPLEXITY: 12.1825  (")[::2] for line in lines[:5]]
    assert [kind for kind, _ in starts] == ["BOTTOMK", "MATCHED", "WEIGHT", "ROW", "COL"]
    assert [text.partition(", zero, k=")[0] for _, text in starts] == [
        "a, bottom_obd", "a, matched_obd seed 1", "a[3, 5], weight", "a[3, :], row", "a[:, 5], col",
    ]  # fmt: skip


def test_what_may_mislead_is_warned_of(tmp_path):
    unchanged = record(0.0, n_changed=0)
    nothing = record(0.0, "top_magnitude")
    nothing["row"]["delta_nll"] = 0.0
    random = record(0.0, "random", 0)
    random["row"]["delta_nll"] = 0.0
    few, broken = record(0.5, "top_wanda", k=3), record(math.inf, "top_taylor2")
    records = [unchanged, nothing, random, few, broken, record(-1.0, "top_better"), record(1.0, "top_one", n_changed=1)]
    assert written(tmp_path, records, comparisons=False) == [
        "zero of top_obd, k=2, in a changed no weight of the model",
        "zero of top_magnitude, k=2, in a changed 2 weights and no loss at all",
        "zero of top_wanda, k=3, in a: the CSV holds 2 weights of this target, fewer than k",
        "zero of top_taylor2, k=2, in a: the perturbed loss is inf",
    ]
