import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation import devices, model_names, model_sizes, models, resident_or_streamed
from safetensors.torch import load_file, save_file
from tiny_models import save_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


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
    assert model_names.choose_name(name, targets) == chosen
    assert (f"MODEL: {chosen}" in capsys.readouterr().out) == (name is None)


def test_a_loaded_model_is_ready_to_be_measured(checkpoint):
    loaded = models.load(str(checkpoint), dtype="float64", device="cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float64}
    stored = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(loaded.model.get_parameter(name).float(), stored[name]) for name in stored)
    assert loaded.metadata["n_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert loaded.metadata["dtype"] == "float64"
    assert loaded.max_positions == 512


def test_the_revision_of_a_local_model_follows_its_weights(checkpoint, damaged):
    first = models.load(str(checkpoint), device="cpu").metadata["revision"]
    assert models.load(str(damaged), device="cpu").metadata["revision"] == first
    state = load_file(damaged / "model.safetensors")
    state["lm_head.weight"][0, 0] += 1
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    assert models.load(str(damaged), device="cpu").metadata["revision"] != first


def test_a_name_that_a_terminal_would_obey_is_refused(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "a\x1b[2J")
    with pytest.raises(RequestError, match=r"the model's name '.*a\\x1b\[2J' has a character that is not printable"):
        models.load(str(tmp_path / "a\x1b[2J"), device="cpu")
    original = AutoModelForCausalLM.from_pretrained

    def renamed(*args, **options):
        model, info = original(*args, **options)
        model.lm_head.register_parameter("bias\x1b[2J\n", torch.nn.Parameter(torch.zeros(1)))
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", renamed)
    with pytest.raises(RequestError, match=r"the model's parameter 'lm_head\.bias\\x1b\[2J\\n' has a character"):
        models.load(str(checkpoint), device="cpu")


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


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["SmolLM2-135M", "gpt2", "SmolLM2-135M-Instruct"])
def test_a_folder_comes_before_a_name(damaged, name, monkeypatch, capsys):
    folder = damaged.rename(damaged.parent / name)
    monkeypatch.chdir(folder.parent)
    assert models.load(name, device="cpu").metadata["id"] == str(folder)
    assert capsys.readouterr().out == f"MODEL: folder {folder}\n"
    folder.rename(damaged)


def test_a_folder_comes_before_the_name_that_a_target_layer_stands_for(damaged, monkeypatch, capsys):
    (damaged / "gpt2").mkdir()
    monkeypatch.chdir(damaged)
    assert model_names.choose_name(None, ["transformer.h.5"]) == str(damaged / "gpt2")
    assert capsys.readouterr().out == "MODEL: gpt2 (no --model given: TARGET_LAYER begins with 'transformer.')\n"


def test_the_source_of_a_model_of_the_hub_is_said(capsys):
    with pytest.raises(RequestError, match=r"model 'some/where' cannot be loaded \(it is no folder here"):
        models.load("some/where", revision="v2", device="cpu")
    assert capsys.readouterr().out == "MODEL: hub id some/where at revision v2\n"


def test_a_tokenizer_of_more_entries_than_the_embedding_has_rows_is_refused(damaged):
    tokenizer = AutoTokenizer.from_pretrained(damaged)
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    tokenizer.save_pretrained(damaged)
    for weights in ("resident", "streamed"):
        with pytest.raises(RequestError, match="tokenizer of .* has 259 entries, the model's embedding 256 rows"):
            models.load(str(damaged), device="cpu", weights=weights)


def test_a_tokenizer_of_few_entries_but_large_ids_is_refused(damaged):
    path = damaged / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a"] = 999
    path.write_text(json.dumps(content))
    with pytest.raises(RequestError, match="has 1000 entries, the model's embedding 256 rows"):
        models.load(str(damaged), device="cpu")


def test_an_adapter_beside_the_weights_is_refused(damaged):
    (damaged / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for weights in ("resident", "streamed"):
        with pytest.raises(RequestError, match=r"holds an adapter \(adapter_config\.json\)"):
            models.load(str(damaged), device="cpu", weights=weights)


def test_a_model_larger_than_the_free_memory_is_refused_before_it_is_read(damaged, monkeypatch):
    monkeypatch.setattr(resident_or_streamed, "free_bytes", lambda device: 1000)
    monkeypatch.setattr("transformers.core_model_loading.spawn_materialize", None)  # by which every tensor is read
    with pytest.raises(
        RequestError, match=r"take 0\.00 GiB, and 0\.00 GiB of memory are free: choose a smaller --dtype"
    ):
        models.load(str(damaged), device="cpu")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": "16"}, "its configuration: .*'hidden_size' expected int, got str"),
        ({"hidden_act": "cubic_silu"}, "unknown value 'cubic_silu' of hidden_act in config.json"),
        (
            {"rope_parameters": {"rope_type": "spiral", "factor": 2.0, "rope_theta": 10000.0}},
            r"unknown value 'spiral' of rope_parameters\.rope_type in config\.json",
        ),
        ({"num_attention_heads": 3}, "multiple of the number of attention heads"),
        ({"model_type": "unheard"}, "model type `unheard`"),
        ({"model_type": "t5"}, "Unrecognized configuration class .*T5Config"),
        ({"vocab_size": -5}, "negative dimension -5"),
    ],
)
def test_what_transformers_says_of_a_configuration_is_one_error(damaged, wrong, message):
    change_config(damaged, **wrong)
    for weights in ("resident", "streamed"):
        with pytest.raises(RequestError, match=message):
            models.load(str(damaged), device="cpu", weights=weights)


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_were_not_fetched_are_named(damaged, name, weights):
    (damaged / "model.safetensors").unlink()
    (damaged / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:5e\nsize 538090408\n")
    with pytest.raises(RequestError, match=rf"/{name} is a git-lfs pointer"):
        models.load(str(damaged), device="cpu", weights=weights)
    (damaged / name).write_bytes(b"")
    with pytest.raises(RequestError, match=rf"/{name} is empty"):
        models.load(str(damaged), device="cpu", weights=weights)


def test_a_shard_that_is_missing_is_named(damaged):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (damaged / "model.safetensors").unlink()
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    for weights in ("resident", "streamed"):
        with pytest.raises(RequestError, match=r"model-00001-of-00001\.safetensors"):
            models.load(str(damaged), device="cpu", weights=weights)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_to_be_had_is_refused(device):
    with pytest.raises(RequestError, match=f"--device {device}"):
        devices.check_device(device)


def test_the_heads_of_a_model_are_recorded_where_all_layers_have_the_same():
    """Gemma 4 has another size of head in each kind of layer; Falcon and GPT-BigCode have flags of their own."""
    heads = {
        name: model_sizes.attention_sizes(SimpleNamespace(config=AutoConfig.for_model(name, **options)))
        for name, options in {"gemma4_text": {}, "falcon": {"multi_query": True}, "gpt_bigcode": {}}.items()
    }
    assert heads["gemma4_text"]["model_type"] == "gemma4_text"
    assert [heads[name]["num_key_value_heads"] for name in ("falcon", "gpt_bigcode")] == [1, 1]
    grouped = AutoConfig.for_model("falcon", new_decoder_architecture=True, num_attention_heads=8, num_kv_heads=2)
    assert model_sizes.attention_sizes(SimpleNamespace(config=grouped))["num_key_value_heads"] == 2
