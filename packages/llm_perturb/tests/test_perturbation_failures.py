"""Runs that fail, and models that are perturbed to pieces."""

import math
import shutil

import pytest
import torch
from bridge.exchange.tables import MEASUREMENTS, read_table
from perturbation_commands import DENSE, SCRIPT, UP, call, manifest_of, run_of
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("quiet_surroundings")


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
