"""What the two commands write and say."""

import io
import json
import math
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bridge.exchange.command_line import flags as flag_reader
from bridge.exchange.fingerprint import read_fingerprint
from bridge.exchange.tables import MEASUREMENTS, read_table
from llm_perturb.evaluation import models
from perturbation_commands import (
    DENSE,
    EXPECTED,
    SCRIPT,
    TEXTS,
    TWO_TARGETS,
    UP,
    call,
    common_flags,
    complaints_of,
    load_command,
    manifest_of,
    offline,
    run_of,
    words_of,
)
from reference import naive_highest, naive_loss, naive_losses, naive_lowest, naive_score, rewritten, zeroed
from tiny_models import byte_tokenizer
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("quiet_surroundings")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The output folder of a run of two targets, and what the run printed."""
    flags = common_flags(inputs, tmp_path_factory.mktemp("finished") / "out") | TWO_TARGETS
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        offline(patch)
        flag_reader.run(load_command(SCRIPT), SCRIPT, words_of(flags))
    assert complaints_of(SCRIPT, err.getvalue()) == []
    return Path(flags["output"]), out.getvalue()


@pytest.fixture
def done(finished, flags):
    """A copy of the finished run, to which ``flags`` belong."""
    output, out = finished
    shutil.copytree(output, flags["output"])
    flags |= TWO_TARGETS
    return run_of(flags), out


def test_a_run_writes_its_files_and_nothing_else(done):
    folder, _ = done
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    tables = {"measurements.csv", "comparisons.csv", "sequence_losses.parquet"}
    assert visible == {*tables, "baseline.json", "fingerprint.json", "manifest.json"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_table_has_its_columns_and_its_rows_in_order(done):
    folder, _ = done
    table = read_table(folder / "measurements.csv", MEASUREMENTS)
    assert list(table)[: len(MEASUREMENTS.columns)] == list(MEASUREMENTS.columns)
    found = [
        (r.target_layer, r.selection, r.perturbation, r.k, r.seed if pd.notna(r.seed) else None)
        for r in table.itertuples()
    ]
    assert found == [
        (layer, selection, perturbation, k, seed)
        for layer in (UP, DENSE)
        for selection in ("top_grad_x_weight", "random", "bottom_grad_x_weight")
        for perturbation in ("zero", "sign_flip")
        for k in (1, 5)
        for seed in ([0, 1] if selection == "random" else [None])
    ]
    assert (table["n_weights"] == table["k"]).all()
    assert table["score_sum"].isna().equals(table["selection"] == "random")


def test_the_columns_of_a_row_agree_with_each_other_and_with_the_paired_losses(done):
    folder, _ = done
    table = read_table(folder / "measurements.csv", MEASUREMENTS)
    losses = pd.read_parquet(folder / "sequence_losses.parquet")
    assert len(losses) == len(table) * len(TEXTS)
    for number, row in enumerate(table.itertuples()):
        own = losses.iloc[number * len(TEXTS) : (number + 1) * len(TEXTS)]
        assert list(own["sequence"]) == list(range(len(TEXTS)))
        assert set(zip(own["target_layer"], own["selection"], own["k"], strict=True)) == {
            (row.target_layer, row.selection, row.k)
        }
        assert list(own["n_tokens"]) == [min(len(text), 24) - 1 for text in TEXTS]
        difference = (own["perturbed_nats"] - own["baseline_nats"]).sum() / own["n_tokens"].sum()
        assert row.delta_nll == pytest.approx(difference, rel=1e-9, abs=1e-15)
        assert row.baseline_nll == pytest.approx(own["baseline_nats"].sum() / own["n_tokens"].sum(), rel=1e-12)
        assert row.perturbed_nll == row.baseline_nll + row.delta_nll
        assert row.perturbed_ppl == pytest.approx(math.exp(row.perturbed_nll), rel=1e-12)
        assert row.delta_ppl == row.perturbed_ppl - row.baseline_ppl
        assert row.ci_low <= row.delta_nll <= row.ci_high
        assert (row.n_tokens, row.n_sequences) == (own["n_tokens"].sum(), len(TEXTS))


def test_top_sets_are_compared_with_the_random_ones(done):
    folder, out = done
    table = read_table(folder / "measurements.csv", MEASUREMENTS)
    compared = pd.read_csv(folder / "comparisons.csv")
    tops = table[table["selection"] == "top_grad_x_weight"]
    assert len(compared) == len(tops) == 8
    for (_, row), top in zip(compared.iterrows(), tops.itertuples(), strict=True):
        same = (table["selection"] == "random") & (table["target_layer"] == top.target_layer)
        drawn = table[same & (table["perturbation"] == top.perturbation) & (table["k"] == top.k)]["delta_nll"]
        assert (row["target_layer"], row["k"], row["n_draws"]) == (top.target_layer, top.k, 2)
        assert row["difference"] == pytest.approx(top.delta_nll - drawn.mean(), rel=1e-9)
        assert np.isnan(row["p_value"])
        assert row["n_beaten"] == (drawn < top.delta_nll).sum()
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]
    lines = [line for line in out.splitlines() if line.startswith("TOP_GRAD_X_WEIGHT AGAINST RANDOM: ")]
    assert len(lines) == 8


def test_a_row_has_the_intervals_of_its_perplexities_and_says_how_many_texts_make_the_effect(done):
    folder, _ = done
    table = pd.read_csv(folder / "measurements.csv")
    losses = pd.read_parquet(folder / "sequence_losses.parquet")
    assert (table["n_clusters"] == len(TEXTS)).all()
    for at, row in enumerate(table.itertuples()):
        own = losses[at * len(TEXTS) : (at + 1) * len(TEXTS)]
        d = (own["perturbed_nats"] - own["baseline_nats"]).to_numpy()
        assert row.n_eff == pytest.approx(np.abs(d).sum() ** 2 / (d**2).sum(), rel=1e-12)
        assert row.few_texts_decide == (row.n_eff < len(TEXTS) / 4)
        assert row.perturbed_ppl_low < row.perturbed_ppl < row.perturbed_ppl_high
        assert row.delta_ppl_low <= row.delta_ppl <= row.delta_ppl_high
        assert (row.ppl_ratio_low, row.ppl_ratio_high) == (math.exp(row.ci_low), math.exp(row.ci_high))


@pytest.mark.slow
def test_accuracy_and_divergence_are_columns(flags, capfd, inputs):
    asked = {"target_layer": DENSE, "k": 5, "selection": ["top", "random"], "seeds": 0, "perturbation": "sign_flip"}
    assert call(capfd, flags | asked)[0] == 0
    assert call(capfd, flags | asked | {"experiment_id": "kl", "kl": "true"})[0] == 0
    plain, with_kl = (pd.read_csv(run_of(flags, name) / "measurements.csv") for name in ("x", "kl"))
    assert plain["kl"].isna().all()
    pd.testing.assert_frame_equal(plain.drop(columns="kl"), with_kl.drop(columns="kl"), check_exact=True)
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float64).eval()
    sequences = [torch.tensor(byte_tokenizer()(text).input_ids[:24]) for text in TEXTS]
    scores = naive_score(model, sequences, f"{DENSE}.weight", "grad_x_weight").view(-1).tolist()
    weight = model.get_parameter(f"{DENSE}.weight").view(-1)
    changes = {j: -weight[j].item() for j in naive_highest(scores, 5)}
    twin, divergence, correct, n_tokens = rewritten(model, {f"{DENSE}.weight": changes}), 0.0, 0, 0
    for sequence in sequences:
        p, q = (m(input_ids=sequence[None]).logits[0, :-1].log_softmax(-1) for m in (model, twin))
        divergence += (p.exp() * (p - q)).sum().item()
        correct += int((q.argmax(-1) == sequence[1:]).sum()) - int((p.argmax(-1) == sequence[1:]).sum())
        n_tokens += len(sequence) - 1
    top = with_kl.iloc[0]
    assert top["kl"] == pytest.approx(divergence / n_tokens, rel=1e-6)
    assert top["delta_accuracy"] == pytest.approx(correct / n_tokens, abs=1e-15)
    assert (with_kl["kl"] > 0).all()


def test_the_numbers_are_those_of_the_whole_chain_done_by_hand(done, inputs):
    """Texts to bytes, naive scores, a full sort, zeros in a state dict, naive losses."""
    folder, _ = done
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float64).eval()
    sequences = [torch.tensor(byte_tokenizer()(text).input_ids[:24]) for text in TEXTS]
    n_tokens = sum(len(sequence) - 1 for sequence in sequences)
    before = naive_losses(model, sequences).sum().item() / n_tokens
    table = read_table(folder / "measurements.csv", MEASUREMENTS)
    assert table["baseline_nll"].iloc[0] == pytest.approx(before, rel=1e-12)
    scores = naive_score(model, sequences, f"{DENSE}.weight", "grad_x_weight").view(-1).tolist()
    rows = table[(table["target_layer"] == DENSE) & (table["perturbation"] == "zero") & (table["k"] == 5)]
    for selection, order in {"top": naive_highest, "bottom": naive_lowest}.items():
        twin = zeroed(model, {f"{DENSE}.weight": order(scores, 5)})
        expected = naive_losses(twin, sequences).sum().item() / n_tokens - before
        (row,) = rows[rows["selection"] == f"{selection}_grad_x_weight"].itertuples()
        assert row.delta_nll == pytest.approx(expected, rel=1e-7, abs=1e-14)
        assert row.score_sum == pytest.approx(sum(scores[j] for j in order(scores, 5)), rel=1e-9)
    assert naive_loss(model, sequences[0]).item() > 0


def test_the_run_says_what_it_found(done):
    _, out = done
    lines = out.splitlines()
    for word, count in {"BASELINE": 1, "TOPK": 8, "CONTROL": 16, "BOTTOMK": 8}.items():
        found = [line for line in lines if line.startswith(f"{word}_PERPLEXITY: ")]
        assert len(found) == count
        assert all(float(line.split()[1]) > 1 for line in found)


def test_the_manifest_says_what_the_numbers_depend_on(done, flags):
    folder, _ = done
    manifest = manifest_of(folder)
    assert (manifest["status"], manifest["kind"]) == ("complete", "perturb")
    assert [f"WARNING: {warning}".startswith(EXPECTED) for warning in manifest["warnings"]] == [True, True]
    assert manifest["identity"]["options"]["dtype"] == "float64"
    assert manifest["identity"]["options"]["target_layers"] == [UP, DENSE]
    assert manifest["identity"]["model"]["id"] == flags["model"]
    corpus = manifest["identity"]["corpus"]
    baseline = json.loads((folder / "baseline.json").read_text())
    setup = ["model", "revision", "dtype", "parameters_xxh3", "tokenizer_xxh3", "corpus_sha256"]
    assert list(baseline) == [*setup, "nll", "ppl", "n_tokens", "n_sequences"]
    fingerprint = models.load(flags["model"], dtype="float64", device="cpu").fingerprint
    assert manifest["identity"]["fingerprint"] == fingerprint.totals
    assert baseline | fingerprint.totals == baseline
    assert read_fingerprint(folder) == fingerprint
    assert baseline["corpus_sha256"] == corpus["corpus_sha256"]
    assert baseline["n_tokens"] == corpus["n_tokens"]


def test_the_baseline_command_finds_the_same_baseline(done, flags, capfd):
    folder, _ = done
    shared = {
        flag: flags[flag] for flag in ("model", "data_file", "dtype", "device", "max_length", "output", "experiment_id")
    }
    code, out, _ = call(capfd, shared, "run_baseline.py")
    assert code == 0
    assert "BASELINE_PERPLEXITY: " in out
    alone = run_of(flags, kind="baseline") / "baseline.json"
    assert json.loads(alone.read_text()) == json.loads((folder / "baseline.json").read_text())
    assert read_fingerprint(alone.parent) == read_fingerprint(folder)
    assert manifest_of(alone.parent)["identity"]["fingerprint"] == manifest_of(folder)["identity"]["fingerprint"]


def test_a_finished_run_is_never_touched_again(done, flags, capfd):
    folder, _ = done
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, complaints = call(capfd, flags)
    assert code == 2
    assert len(complaints) == 1
    assert "is already complete; choose another --experiment-id" in complaints[0]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_the_environment_names_targets_as_the_flag_does(done, flags, capfd, monkeypatch):
    folder, _ = done
    monkeypatch.setenv("TARGET_LAYER", f"{UP},{DENSE}")
    code, _, _ = call(capfd, flags | {"target_layer": None, "experiment_id": "y"})
    assert code == 0
    assert (run_of(flags, "y") / "measurements.csv").read_bytes() == (folder / "measurements.csv").read_bytes()


def test_what_is_asked_for_twice_is_measured_once(flags, capfd):
    twice = {
        "target_layer": [UP, UP],
        "k": [2, 2],
        "seeds": [1, 1],
        "perturbation": ["zero", "zero"],
        "selection": ["random", "random"],
    }
    assert call(capfd, flags | twice)[0] == 0
    assert len(read_table(run_of(flags) / "measurements.csv", MEASUREMENTS)) == 1


def test_few_sequences_have_no_interval_and_a_warning(flags, capfd):
    code, _, said = call(capfd, flags | {"target_layer": UP, "k": 1, "eval_limit": 5, "selection": "top"})
    assert code == 0
    assert any("5 texts are too few for an interval" in line for line in said)
    table = read_table(run_of(flags) / "measurements.csv", MEASUREMENTS)
    assert table[["ci_low", "ci_high"]].isna().all(axis=None)
    assert any("too few" in warning for warning in manifest_of(run_of(flags))["warnings"])


def test_list_layers_prints_the_parameters_and_writes_nothing(flags, capfd):
    code, out, _ = call(capfd, {"model": flags["model"], "list_layers": "true", "output": flags["output"]})
    assert code == 0
    assert f"{UP}.weight" in out
    assert not Path(flags["output"]).exists()


def test_windows_of_a_text_are_one_cluster_of_the_intervals(flags, capfd, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join("abcdefg"[n] * 40 for n in range(7)) + "\n")
    asked = {"target_layer": UP, "k": 1, "packing": "windows", "max_length": 14}
    assert call(capfd, flags | asked | {"data_file": str(tmp_path / "long.txt")})[0] == 0
    folder = run_of(flags)
    losses = pd.read_parquet(folder / "sequence_losses.parquet")
    assert losses["cluster"].tolist()[:20] == sorted([0, 1, 2, 3, 4, 5, 6] * 3)[:20]
    assert set(pd.read_csv(folder / "measurements.csv")["n_clusters"]) == {7}
