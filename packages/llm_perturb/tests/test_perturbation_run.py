"""The two commands, on a tiny checkpoint: in this process where that is enough, as a person starts them where not."""

import importlib.util
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bridge.exchange.command_line import flags as flag_reader
from bridge.exchange.fingerprint import read_fingerprint, write_fingerprint
from bridge.exchange.tables import MEASUREMENTS, TOP_WEIGHTS, read_table
from llm_perturb import perturbation_run
from llm_perturb.evaluation import models
from reference import naive_highest, naive_loss, naive_losses, naive_lowest, naive_score, rewritten, zeroed
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, save_checkpoint
from transformers import AutoModelForCausalLM

PACKAGE = Path(__file__).parents[1]
SCRIPT = "run_topk_perturb.py"
TEXTS = [f"text number {n} of {'a few' * (n % 4)} words" for n in range(12)]
UP, DENSE = "gpt_neox.layers.1.mlp.dense_h_to_4h", "gpt_neox.layers.0.attention.dense"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a checkpoint and a corpus, nothing of which any test changes."""
    folder = tmp_path_factory.mktemp("inputs")
    save_checkpoint(folder / "model", "neox", n_layers=2)
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    write_list(folder / "single.csv", folder / "model", [(layer, i, 2) for layer in (UP, DENSE) for i in range(3)])
    return folder


def offline(patch):
    """No network, and no target from outside."""
    patch.delenv("TARGET_LAYER", raising=False)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch):
    offline(monkeypatch)


def common_flags(inputs, output):
    """What every command here says."""
    return {
        "model": str(inputs / "model"),
        "data_file": str(inputs / "texts.txt"),
        "dtype": "float64",
        "device": "cpu",
        "max_length": 24,
        "output": str(output),
        "experiment_id": "x",
    }


@pytest.fixture
def flags(inputs, tmp_path):
    return common_flags(inputs, tmp_path / "out")


def words_of(flags):
    """Flags as a command line; None leaves one out."""
    words = []
    for flag, value in flags.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag.replace('_', '-')}", *map(str, values)]
    return words


def load_command(script):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), PACKAGE / "scripts" / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.baseline if "baseline" in script else module.perturb


# what every run here is warned of: the model is random, and the texts are cut at 24 tokens
EXPECTED = ("WARNING: 83 of the 368 tokens", "WARNING: the unperturbed model has a perplexity of")


def call(capfd, flags, script=SCRIPT):
    """Run a command in this process: exit code, stdout, the lines of stderr that are its own, but for ``EXPECTED``."""
    try:
        flag_reader.run(load_command(script), script, words_of(flags))
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    out, err = capfd.readouterr()
    return code, out, complaints_of(script, err)


def complaints_of(script, err):
    own = [line for line in err.splitlines() if line.startswith((script, "Traceback", "WARNING:"))]
    return [line for line in own if not line.startswith(EXPECTED)]


def start(flags, launcher=(), script=SCRIPT):
    """Start a command as a person does, from the package's folder."""
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    python = [sys.executable, *launcher]
    words = [*python, f"scripts/{script}", *words_of(flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=PACKAGE, env=surroundings, stdout=pipe, stderr=pipe, text=True)


def run_of(flags, identifier="x", kind="perturb"):
    return Path(flags["output"]) / f"{kind}_{identifier}"


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


# the files and what is in them


TWO_TARGETS = {"target_layer": [UP, DENSE], "k": [1, 5], "seeds": [0, 1], "perturbation": ["zero", "sign_flip"]}


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


# lists of weights


def write_list(path, checkpoint, weights):
    state = load_file(checkpoint / "model.safetensors")
    rows = [
        {"rank": rank, "layer": layer, "parameter": f"{layer}.weight", "row": row, "col": col,
         "value": state[f"{layer}.weight"][row, col].item(), "score": 1 / rank}
        for rank, (layer, row, col) in enumerate(weights, start=1)
    ]  # fmt: skip
    pd.DataFrame(rows, columns=list(TOP_WEIGHTS.columns)).to_csv(path, index=False)
    return str(path)


def of_discovery(folder, flags, other=None, **load):
    """Lay a fingerprint beside a list, as a discovery does; of the model with one weight changed in ``other``."""
    loaded = models.load(flags["model"], device="cpu", **load)
    if other:
        loaded.model.get_parameter(other)[0, 0] *= -1
    write_fingerprint(folder, loaded.fingerprint)


@pytest.mark.parametrize("flag", ["weights_csv", "per_weight"])
def test_a_list_of_another_model_is_refused_by_the_fingerprint_beside_it(flags, capfd, inputs, tmp_path, flag):
    """The listed weights are the same in both models; another one of another layer is not."""
    path = write_list(tmp_path / "top_1_weights_wanda.csv", inputs / "model", [(UP, 3, 5)])
    asked = {"target_layer": UP, "k": 1, "selection": "top", flag: path}
    of_discovery(tmp_path, flags, f"{DENSE}.weight", dtype="float64")
    code, _, complaints = call(capfd, flags | asked)
    assert (code, len(complaints)) == (2, 1)
    assert f"{path} was made from another model or revision: they differ in {DENSE}.weight" in complaints[0]
    assert not run_of(flags).exists()
    of_discovery(tmp_path, flags, dtype="float64")
    assert call(capfd, flags | asked)[0] == 0


def test_a_list_of_another_tokenizer_is_refused(flags, capfd, inputs, tmp_path):
    path = write_list(tmp_path / "top_1_weights_wanda.csv", inputs / "model", [(UP, 3, 5)])
    own = models.load(flags["model"], device="cpu").fingerprint  # in float32: the parameters cannot be compared
    write_fingerprint(tmp_path, replace(own, tokenizer_xxh3="0f"))
    code, _, complaints = call(capfd, flags | {"target_layer": UP, "k": 1, "selection": "top", "weights_csv": path})
    assert (code, len(complaints)) == (2, 1)
    assert "was made from another model or revision: they differ in the tokenizer" in complaints[0]


def test_a_list_of_another_dtype_is_checked_by_its_rows(flags, capfd, inputs, tmp_path):
    of_discovery(tmp_path, flags, f"{DENSE}.weight", dtype="bfloat16")
    path = write_list(tmp_path / "top_1_weights_wanda.csv", inputs / "model", [(UP, 3, 5)])
    asked = {"target_layer": UP, "k": 1, "selection": "top", "weights_csv": path}
    assert call(capfd, flags | asked)[0] == 0
    Path(path).write_text(Path(path).read_text().replace(",5,", ",6,"))
    code, _, complaints = call(capfd, flags | asked | {"experiment_id": "y"})
    assert code == 2
    assert "the weight is" in complaints[0] and "in this model" in complaints[0]


def test_weights_of_a_list_are_zeroed_exactly(flags, capfd, inputs, tmp_path):
    weights = [(UP, 3, 5), (DENSE, 2, 1), (UP, 0, 7)]
    path = write_list(tmp_path / "top_3_weights_wanda.csv", inputs / "model", weights)
    asked = {
        "target_layer": [UP, DENSE, "ALL"],
        "k": [2, 3],
        "weights_csv": path,
        "selection": ["top", "random"],
        "seeds": 0,
    }
    code, _, said = call(capfd, flags | asked)
    assert code == 0
    table = read_table(run_of(flags) / "measurements.csv", MEASUREMENTS).set_index(["target_layer", "selection", "k"])
    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float64).eval()
    sequences = [torch.tensor(byte_tokenizer()(text).input_ids[:24]) for text in TEXTS]
    columns = model.get_parameter(f"{UP}.weight").shape[1]
    chosen = {f"{UP}.weight": [3 * columns + 5, 7], f"{DENSE}.weight": [2 * columns + 1]}
    expected = naive_losses(zeroed(model, chosen), sequences) - naive_losses(model, sequences)
    row = table.loc["ALL", "top_wanda", 3]
    assert row.delta_nll == pytest.approx(expected.sum().item() / row.n_tokens, rel=1e-7)
    assert row.score_sum == pytest.approx(1 + 1 / 2 + 1 / 3, rel=1e-15)
    assert table.loc[UP, "top_wanda", 3].n_weights == table.loc[UP, "random", 3].n_weights == 2
    assert any(f"in {UP}: the CSV holds 2 weights of this target, fewer than k" in line for line in said)


# wrong requests

WRONG = {
    "no target": ({"target_layer": None}, "no target"),
    "unknown target": ({"target_layer": "gpt_neox.layers.9.mlp"}, "names no parameter"),
    "one target of two unknown": ({"target_layer": [UP, "nothing"]}, "'nothing' names no parameter"),
    "a target that is not printable": ({"target_layer": "ALL\x1b[2J"}, r"TARGET_LAYER 'ALL\\x1b\[2J' has a character"),
    "targets on two lines": ({"target_layer": f"{UP}\n{DENSE}"}, rf"TARGET_LAYER '{UP}\\n{DENSE}' has a character"),
    "unknown flag": ({"metrics": "obd"}, "unknown flag '--metrics' .did you mean '--metric'"),
    "unknown metric": ({"metric": "wanda"}, "--metric 'wanda' is unknown"),
    "unknown perturbation": ({"perturbation": "prune"}, "--perturbation 'prune' is unknown"),
    "k of nothing": ({"k": 0}, "at least 1, not 0"),
    "k too large": ({"k": [1, 10**6]}, "--k 1000000 is too many for"),
    "no room for a control": ({"k": 600}, "2 sets .* may need 1200 weights, and it has 768"),
    "batch of nothing": ({"batch_size": 0}, "at least 1, not 0"),
    "no such model": ({"model": "/nowhere/at/all"}, "cannot be loaded"),
    "no such file": ({"data_file": "/nowhere/texts.txt"}, "cannot be read"),
    "two corpora": ({"dataset": "wikitext"}, "exclude each other"),
    "no such device": ({"device": "gpu"}, "--device gpu is not available"),
    "too long": ({"max_length": 513}, "more than the 512 positions"),
    "no sequences": ({"eval_limit": 0}, "--eval-limit must be at least 1"),
    "no such list": ({"weights_csv": "/nowhere/top.csv"}, "no such file"),
    "no such bit": ({"perturbation": "bit_flip", "bit": 64}, "bit"),
    "a negative bit": ({"perturbation": "bit_flip", "bit": -1}, "bit"),
    "a grid without steps": ({"perturbation": "quantize", "n_bits": 1}, "bits"),
    "no such shard": ({"shard": "5/4"}, "--shard '5/4' must be i/n"),
    "more shards than work": ({"shard": "40/40"}, "--shard 40/40 has nothing to do"),
    "a name with a slash": ({"experiment_id": "a/b"}, "must be a plain name"),
    "one text too short": ({"packing": "documents", "data_file": "SHORT"}, "too short to predict"),
    "a list of another model": ({"weights_csv": "OTHER"}, "another model or revision"),
    "a list without the target": ({"weights_csv": "ELSEWHERE"}, "holds no weight of TARGET_LAYER"),
    "two lists of one name": ({"weights_csv": ["ONE", "TWO"]}, "grad_x_weight"),
}


def prepared(value, folder, inputs):
    """A file that a test of a wrong request speaks of by a word."""
    checkpoint = inputs / "model"
    if isinstance(value, list):
        return [prepared(part, folder, inputs) for part in value]
    if value == "SHORT":
        (folder / "short.txt").write_text("long enough\nx\n")
        return str(folder / "short.txt")
    if value == "OTHER":
        path = write_list(folder / "top_1_weights_obd.csv", checkpoint, [(UP, 0, 0)])
        pd.read_csv(path).assign(value=0.125).to_csv(path, index=False)
        return path
    if value in {"ELSEWHERE", "ONE", "TWO"}:
        name = {"TWO": "top_1_per_layer"}.get(value, "top_1_weights")
        layer = DENSE if value == "ELSEWHERE" else UP
        return write_list(folder / f"{name}_grad_x_weight.csv", checkpoint, [(layer, 0, len(value))])
    return value


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_line_and_leaves_nothing_behind(case, flags, capfd, inputs, tmp_path):
    changes, expected = WRONG[case]
    changes = {flag: prepared(value, tmp_path, inputs) for flag, value in changes.items()}
    code, _, complaints = call(capfd, {**flags, "target_layer": UP, "k": 1, **changes})
    assert code == 2
    assert len(complaints) == 1
    assert complaints[0].startswith(f"{SCRIPT}: error: ")
    assert pd.Series(complaints).str.contains(expected).all(), complaints[0]
    output = Path(flags["output"])
    assert not output.exists() or list(output.iterdir()) == []


def test_a_target_of_the_environment_is_printable_too(flags, capfd, monkeypatch):
    monkeypatch.setenv("TARGET_LAYER", f"{UP},\u202eweird")
    code, _, complaints = call(capfd, flags)
    assert code == 2
    (line,) = complaints
    assert line.startswith(f"{SCRIPT}: error: TARGET_LAYER '\\u202eweird' has a character that is not printable")


@pytest.mark.slow
def test_a_wrong_request_of_a_real_process(flags):
    process = start(flags | {"target_layer": UP, "output": str(Path(flags["data_file"]) / "below")})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"{SCRIPT}: error: --output ")


# failed runs


def test_a_loss_that_is_not_finite_fails_the_run(flags, capfd, inputs, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "nan")
    state = load_file(tmp_path / "nan/model.safetensors")
    state["gpt_neox.final_layer_norm.bias"][0] = torch.nan
    save_file(state, tmp_path / "nan/model.safetensors", metadata={"format": "pt"})
    code, _, complaints = call(capfd, flags | {"target_layer": UP, "k": 1, "model": str(tmp_path / "nan")})
    assert code == 1
    assert complaints == [f"{SCRIPT}: error: the loss of sequence 0 is not finite"]
    assert manifest_of(run_of(flags))["status"] == "failed"
    assert not (run_of(flags) / "measurements.csv").exists()


def test_a_change_that_changes_nothing_fails_the_run(flags, capfd):
    asked = {"target_layer": UP, "k": 1, "selection": "top", "perturbation": "scale", "factor": 1.0}
    code, _, complaints = call(capfd, flags | asked)
    assert code == 1
    assert len(complaints) == 1
    assert "scale(1.0) of top_grad_x_weight" in complaints[0]
    assert manifest_of(run_of(flags))["status"] == "failed"


def test_a_target_that_fails_leaves_the_others_their_table(flags, capfd, inputs, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "zeros")
    state = load_file(tmp_path / "zeros/model.safetensors")
    state[f"{UP}.weight"].zero_()
    save_file(state, tmp_path / "zeros/model.safetensors", metadata={"format": "pt"})
    asked = flags | {"target_layer": [UP, DENSE], "k": 1, "selection": ["top", "random"]}
    code, _, complaints = call(capfd, asked | {"model": str(tmp_path / "zeros")})
    assert code == 1
    assert complaints[-1].startswith(
        f"{SCRIPT}: error: zero of top_grad_x_weight in {UP} changes no weight of the model"
    )
    assert complaints[-1].endswith("(1 targets failed, the table has the others)")
    manifest = manifest_of(run_of(flags))
    assert manifest["status"] == "failed"
    assert list(manifest["failed_targets"]) == [UP]
    assert manifest["failed_targets"][UP] in manifest["error"]
    table = read_table(run_of(flags) / "measurements.csv", MEASUREMENTS)
    assert table["target_layer"].unique().tolist() == [DENSE]
    assert table["selection"].tolist() == ["top_grad_x_weight", *["random"] * 3]

    call(capfd, asked | {"target_layer": [DENSE], "model": str(tmp_path / "zeros"), "experiment_id": "alone"})
    assert (run_of(flags) / "measurements.csv").read_bytes() == (
        run_of(flags, "alone") / "measurements.csv"
    ).read_bytes()


def test_a_model_perturbed_to_pieces_is_a_result(flags, capfd):
    """Overflowing weights give no finite loss, and that is what is to be reported."""
    asked = {"target_layer": "gpt_neox.final_layer_norm", "k": 4, "selection": "top", "perturbation": "bit_flip"}
    code, _, said = call(capfd, flags | asked)
    assert code == 0
    (row,) = read_table(run_of(flags) / "measurements.csv", MEASUREMENTS).itertuples()
    assert not math.isfinite(row.delta_nll)
    assert math.isnan(row.ci_low)
    assert any("the perturbed loss is" in line for line in said)


# killed runs, several processes

MANY = {"target_layer": [UP, DENSE], "k": [1, 5], "seeds": list(range(25)), "selection": ["top", "random"]}


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):
    """The folder of a run that was killed in the middle, its last record cut in half."""
    output = tmp_path_factory.mktemp("killed")
    flags = common_flags(inputs, output) | {"per_weight": str(inputs / "single.csv")}
    process = start(flags | MANY)
    log = output / "perturb_x/progress-0.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    text = log.read_bytes()
    log.write_bytes(text + text.splitlines()[0][:50])
    return output / "perturb_x"


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    """The table of the same request, measured without a break under two processes of accelerate."""
    output = tmp_path_factory.mktemp("two")
    flags = common_flags(inputs, output) | {"per_weight": str(inputs / "single.csv")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate_config.yaml"]
    process = start(flags | MANY, [*launcher, "--num_processes", "2", "--main_process_port", str(port)])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return output / "perturb_x"


def copied(killed, flags, identifier):
    target = run_of(flags, identifier)
    shutil.copytree(killed, target)
    return target


@pytest.mark.slow
def test_a_killed_run_is_unfinished_and_shows_no_table(killed):
    assert manifest_of(killed)["status"] == "running"
    assert not (killed / "measurements.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("identifier", ["x", None], ids=["by its id", "without an id"])
def test_a_killed_run_goes_on_to_the_same_table(killed, uninterrupted, flags, capfd, inputs, monkeypatch, identifier):
    folder = copied(killed, flags, identifier or "20200101_000000")
    flags |= {"per_weight": str(inputs / "single.csv")}
    n_finished = (folder / "progress-0.jsonl").read_bytes().count(b"\n")
    measured, real = [], perturbation_run.sweep
    monkeypatch.setattr(perturbation_run, "sweep", lambda *a, **k: (measured.append(1) or o for o in real(*a, **k)))
    code, _, complaints = call(capfd, flags | MANY | {"experiment_id": identifier})
    assert (code, complaints) == (0, [])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert manifest_of(folder)["status"] == "complete"
    table = folder / "measurements.csv"
    assert table.read_bytes() == (uninterrupted / "measurements.csv").read_bytes()
    assert len(measured) + n_finished == len(read_table(table, MEASUREMENTS)) == 2 * 2 * (1 + 25) + 6
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "sequence_losses.parquet"), pd.read_parquet(uninterrupted / "sequence_losses.parquet")
    )


@pytest.mark.slow
def test_a_killed_run_is_not_resumed_with_other_weights(killed, flags, capfd, inputs, monkeypatch):
    """The files are the same, what is read from them is not."""
    folder, load = copied(killed, flags, "x"), models.load

    def load_changed(*arguments, **options):
        loaded = load(*arguments, **options)
        loaded.model.get_parameter(f"{DENSE}.weight")[1, 1] *= -1
        return loaded

    monkeypatch.setattr(models, "load", load_changed)
    code, _, complaints = call(capfd, flags | MANY | {"per_weight": str(inputs / "single.csv")})
    assert (code, len(complaints)) == (2, 1)
    assert f"begun with another fingerprint (the models differ in {DENSE}.weight)" in complaints[0]
    assert manifest_of(folder)["status"] == "running"


@pytest.mark.slow
def test_a_killed_run_is_not_resumed_with_other_flags(killed, flags, capfd, inputs):
    folder = copied(killed, flags, "x")
    flags |= {"per_weight": str(inputs / "single.csv")}
    code, _, complaints = call(capfd, flags | MANY | {"max_length": 23})
    assert code == 2
    assert len(complaints) == 1
    assert "was begun with another" in complaints[0]
    assert "max_length" in complaints[0]
    assert not (folder / "measurements.csv").exists()


@pytest.mark.slow
def test_two_processes_shared_the_work(uninterrupted):
    manifest = manifest_of(uninterrupted)
    assert (manifest["status"], manifest["world_size"]) == ("complete", 2)


def test_windows_of_a_text_are_one_cluster_of_the_intervals(flags, capfd, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join("abcdefg"[n] * 40 for n in range(7)) + "\n")
    asked = {"target_layer": UP, "k": 1, "packing": "windows", "max_length": 14}
    assert call(capfd, flags | asked | {"data_file": str(tmp_path / "long.txt")})[0] == 0
    folder = run_of(flags)
    losses = pd.read_parquet(folder / "sequence_losses.parquet")
    assert losses["cluster"].tolist()[:20] == sorted([0, 1, 2, 3, 4, 5, 6] * 3)[:20]
    assert set(pd.read_csv(folder / "measurements.csv")["n_clusters"]) == {7}
