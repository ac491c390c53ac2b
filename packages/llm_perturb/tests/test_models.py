import json

import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation import models
from safetensors.torch import load_file, save_file
from tiny_models import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, "llama", n_layers=2)
    return folder


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy to be spoilt."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("name", "targets", "chosen"),
    [
        (None, ["gpt_neox.layers.5.mlp.dense_h_to_4h"], "EleutherAI/pythia-2.8b"),
        (None, ["transformer.h.5.attn.c_attn.weight", "gpt_neox.x"], "gpt2"),
        (None, ["model.layers.3.mlp.up_proj"], "SmolLM2-135M-Instruct"),
        (None, ["ALL"], "SmolLM2-135M-Instruct"),
        (None, [], "SmolLM2-135M-Instruct"),
        ("pythia-2.8b", [], "EleutherAI/pythia-2.8b"),
        ("Pythia-410M", ["transformer.h.5"], "EleutherAI/pythia-410m"),
        ("gpt2", ["gpt_neox.layers.5"], "gpt2"),
        ("some/where", [], "some/where"),
    ],
)
def test_the_model_that_is_meant(name, targets, chosen, capsys):
    assert models.choose_name(name, targets) == chosen
    assert (f"MODEL: {chosen}" in capsys.readouterr().out) == (name is None)


def test_a_loaded_model_is_ready_to_be_measured(checkpoint):
    loaded = models.load(str(checkpoint), dtype="float64", device="cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float64}
    stored = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(loaded.model.get_parameter(name).float(), stored[name]) for name in stored)
    assert loaded.facts["n_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert loaded.facts["dtype"] == "float64"
    assert loaded.max_positions == 512


def test_the_revision_of_a_local_model_follows_its_weights(checkpoint, damaged):
    first = models.load(str(checkpoint), device="cpu").facts["revision"]
    assert models.load(str(damaged), device="cpu").facts["revision"] == first
    state = load_file(damaged / "model.safetensors")
    state["lm_head.weight"][0, 0] += 1
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    assert models.load(str(damaged), device="cpu").facts["revision"] != first


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RequestError, match="model '.*nowhere' cannot be loaded"):
        models.load(str(tmp_path / "nowhere"), device="cpu")


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot be loaded"):
        models.load(str(tmp_path), device="cpu")


def test_a_checkpoint_that_lacks_weights_is_refused(damaged):
    state = load_file(damaged / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"lacks weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load(str(damaged), device="cpu")


def test_a_checkpoint_cut_short_is_refused(damaged):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RequestError, match="cannot be loaded"):
        models.load(str(damaged), device="cpu")


def test_a_checkpoint_of_another_shape_is_refused(damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(RequestError, match="cannot be loaded|lacks weights"):
        models.load(str(damaged), device="cpu")


def test_a_config_that_is_no_json_is_refused(damaged):
    (damaged / "config.json").write_text("{")
    with pytest.raises(RequestError, match="cannot be loaded"):
        models.load(str(damaged), device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_to_be_had_is_refused(device):
    with pytest.raises(RequestError, match=f"--device {device}"):
        models.check_device(device)
