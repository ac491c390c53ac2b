"""Requests that are wrong, or whose lists are of another model."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from bridge.exchange.fingerprint import write_fingerprint
from bridge.exchange.tables import MEASUREMENTS, read_table
from llm_perturb.evaluation import models
from perturbation_commands import DENSE, SCRIPT, TEXTS, UP, call, run_of, start, write_list
from reference import naive_losses, zeroed
from tiny_models import byte_tokenizer
from transformers import AutoModelForCausalLM, MptConfig, MptForCausalLM

pytestmark = pytest.mark.usefixtures("quiet_surroundings")


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


def test_a_length_beyond_what_mpt_takes(flags, capfd, tmp_path):
    """Whose configuration calls its longest sequence ``max_seq_len``."""
    config = MptConfig(vocab_size=256, d_model=16, n_heads=2, n_layers=1, max_seq_len=16)
    MptForCausalLM(config).save_pretrained(tmp_path / "mpt")
    byte_tokenizer().save_pretrained(tmp_path / "mpt")
    code, _, complaints = call(capfd, flags | {"model": str(tmp_path / "mpt"), "target_layer": "ALL", "k": 1})
    assert (code, len(complaints)) == (2, 1)
    assert "--max-length 24" in complaints[0] and "16" in complaints[0]


@pytest.mark.slow
def test_a_wrong_request_of_a_real_process(flags):
    process = start(flags | {"target_layer": UP, "output": str(Path(flags["data_file"]) / "below")})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"{SCRIPT}: error: --output ")
