"""A model whose weights stay in their files is the model that transformers holds in memory.

The references are the models in float64 that were saved: what they compute has seen no loader.
"""

import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation import models, resident_or_streamed
from safetensors.torch import load_file, save_file
from tiny_models import random_sequences
from tiny_models.checkpoints import FAMILIES, save_family

WAYS = ["resident", "streamed"]


def change(folder, **tensors):
    """Add tensors to a checkpoint or replace them; None takes one away."""
    stored = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor.contiguous() for name, tensor in stored.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def losses(model):
    """Of three sequences; the experts one after the other, for torch has no grouped product in float64."""
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return torch.stack([model(ids[None], labels=ids[None]).loss for ids in random_sequences()[:3]])


def loaded_losses(folder, weights):
    loaded = models.load(str(folder), dtype="float64", device="cpu", weights=weights)
    if not loaded.checkpoint:
        return losses(loaded.model)
    with loaded.checkpoint.present([name for name, _ in loaded.model.named_parameters()]):
        return losses(loaded.model)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_both_ways_give_the_losses_of_the_model_that_was_saved(family, tmp_path):
    truth = losses(save_family(tmp_path, family, max_shard_size="20KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or family == "gpt2"
    for weights in WAYS:
        assert torch.equal(loaded_losses(tmp_path, weights), truth), weights


@pytest.mark.parametrize("family", ["deepseek_v3", "llama_tied"])
def test_the_facts_do_not_tell_the_ways_apart(family, tmp_path):
    save_family(tmp_path, family)
    resident, streamed = (models.load(str(tmp_path), device="cpu", weights=way) for way in WAYS)
    assert streamed.metadata == resident.metadata
    assert [name for name, _ in streamed.model.named_parameters()] == [n for n, _ in resident.model.named_parameters()]


def test_merged_experts_are_there_alone_and_go_again(tmp_path):
    truth = dict(save_family(tmp_path, "qwen3_moe").named_parameters())
    loaded = models.load(str(tmp_path), dtype="float64", device="cpu", weights="streamed")
    name, other = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
    with loaded.checkpoint.present([name]):
        assert torch.equal(loaded.model.get_parameter(name), truth[name])
        assert loaded.model.get_parameter(other).untyped_storage().nbytes() == 8
    assert loaded.model.get_parameter(name).untyped_storage().nbytes() == 8


def test_one_of_the_parameters_that_a_stored_tensor_is_split_into(tmp_path):
    truth = dict(save_family(tmp_path, "hrm_text").named_parameters())
    assert any("gate_up_proj" in key for key in load_file(tmp_path / "model.safetensors"))
    loaded = models.load(str(tmp_path), dtype="float64", device="cpu", weights="streamed")
    gate, up = (next(name for name in truth if name.endswith(f"mlp.{part}_proj.weight")) for part in ("gate", "up"))
    with loaded.checkpoint.present([up]):
        assert torch.equal(loaded.model.get_parameter(up), truth[up])
        assert loaded.model.get_parameter(gate).untyped_storage().nbytes() == 8


def test_values_come_in_the_dtype_in_which_transformers_keeps_them(tmp_path):
    """As the norms and routers that some families keep in float32 whatever is asked for."""
    save_family(tmp_path, "deepseek_v3", torch.float32)
    resident, streamed = (models.load(str(tmp_path), dtype="bfloat16", device="cpu", weights=way) for way in WAYS)
    buffer = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert resident.model.get_buffer(buffer).dtype == torch.float32
    assert torch.equal(streamed.model.get_buffer(buffer), resident.model.get_buffer(buffer))
    for name, parameter in resident.model.named_parameters():
        with streamed.checkpoint.present([name]):
            assert streamed.model.get_parameter(name).dtype == parameter.dtype
            assert torch.equal(streamed.model.get_parameter(name), parameter)


@pytest.mark.parametrize("weights", WAYS)
def test_a_head_that_differs_from_the_embedding_is_not_tied(tmp_path, weights):
    save_family(tmp_path, "llama_tied")
    head = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change(tmp_path, **{"lm_head.weight": head})
    loaded = models.load(str(tmp_path), dtype="float64", device="cpu", weights=weights)
    assert loaded.metadata["tied_groups"] == []
    truth = save_family(tmp_path / "reference", "llama_tied")
    truth.lm_head.weight = torch.nn.Parameter(head)
    assert torch.equal(loaded_losses(tmp_path, weights), losses(truth))


@pytest.mark.parametrize("weights", WAYS)
@pytest.mark.parametrize("stored", [("lm_head",), ("lm_head", "model.embed_tokens"), ("model.embed_tokens",)])
def test_one_tensor_under_either_name_or_both_is_tied(tmp_path, weights, stored):
    truth = save_family(tmp_path, "llama_tied")
    value = truth.lm_head.weight.detach().clone()
    names = ("lm_head", "model.embed_tokens")
    change(tmp_path, **{f"{name}.weight": value.clone() if name in stored else None for name in names})
    loaded = models.load(str(tmp_path), dtype="float64", device="cpu", weights=weights)
    assert loaded.metadata["tied_groups"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert torch.equal(loaded_losses(tmp_path, weights), losses(truth))


@pytest.mark.parametrize("weights", WAYS)
def test_a_single_file_comes_before_the_shards_beside_it(tmp_path, weights):
    save_family(tmp_path, "llama", max_shard_size="5KB")
    other = save_family(tmp_path / "other", "llama", seed=1)
    (tmp_path / "other/model.safetensors").rename(tmp_path / "model.safetensors")
    assert torch.equal(loaded_losses(tmp_path, weights), losses(other))


MASK, FREQUENCIES = torch.ones(1, 1, 32, 32).tril(), torch.ones(2)
CONSTANTS = {
    "gpt2": {"transformer.h.{}.attn.bias": MASK, "transformer.h.{}.attn.masked_bias": torch.tensor(-1e4)},
    "gpt_neo": {
        "transformer.h.{}.attn.attention.bias": MASK.bool(),
        "transformer.h.{}.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    "gpt_neox": {
        "gpt_neox.layers.{}.attention.bias": MASK.bool(),
        "gpt_neox.layers.{}.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": FREQUENCIES,
    },
    "llama": {"model.layers.{}.self_attn.rotary_emb.inv_freq": FREQUENCIES},
}


@pytest.mark.parametrize("weights", WAYS)
@pytest.mark.parametrize("family", sorted(CONSTANTS))
def test_masks_and_frequencies_of_older_checkpoints_are_no_weights(tmp_path, family, weights):
    truth = losses(save_family(tmp_path, family))
    stored = {name.format(layer): tensor.clone() for name, tensor in CONSTANTS[family].items() for layer in (0, 1)}
    change(tmp_path, **stored)
    assert torch.equal(loaded_losses(tmp_path, weights), truth)
    assert "unused_weights" not in models.load(str(tmp_path), device="cpu", weights=weights).metadata


UP = "model.layers.0.mlp.up_proj.weight"
WRONG = {
    "a bias": ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}, r"no place for \(1\): model.layers.0.self"),
    "another head": ({"score.weight": torch.zeros(2, 16)}, r"no place for \(1\): score\.weight"),
    "a bias called like a mask": (
        {"model.layers.0.attention.bias": torch.zeros(16)},
        r"no place for \(1\): model\.layers\.0\.attention\.bias",
    ),
    "a missing one": ({UP: None}, f"lacks weights .* {UP}"),
    "another shape": ({UP: torch.zeros(3, 3)}, f"holds {UP} as 3 x 3, and by the configuration it is 20 x 16"),
    "float8": ({UP: torch.zeros(20, 16).to(torch.float8_e4m3fn)}, f"{UP} .* is stored as float8_e4m3fn"),
    "int8": ({UP: torch.zeros(20, 16).to(torch.int8)}, f"{UP} .* is stored as int8"),
}


@pytest.mark.parametrize("weights", WAYS)
@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_checkpoint_that_is_not_the_model_is_refused(tmp_path, case, weights):
    tensors, message = WRONG[case]
    save_family(tmp_path, "llama")
    change(tmp_path, **tensors)
    with pytest.raises(RequestError, match=message):
        models.load(str(tmp_path), device="cpu", weights=weights)


@pytest.mark.parametrize("weights", WAYS)
@pytest.mark.parametrize("number", [2, 4])
def test_another_number_of_experts_is_refused(tmp_path, number, weights):
    save_family(tmp_path, "mixtral", changed={"num_local_experts": number})
    with pytest.raises(RequestError, match=rf"experts\.down_proj as 3 x 16 x 20, .* it is {number} x 16 x 20"):
        models.load(str(tmp_path), device="cpu", weights=weights)


@pytest.mark.parametrize("weights", WAYS)
def test_an_expert_of_which_a_part_is_missing_is_refused(tmp_path, weights):
    save_family(tmp_path, "mixtral")
    change(tmp_path, **{"model.layers.0.block_sparse_moe.experts.1.w1.weight": None})
    with pytest.raises(RequestError, match=r"that make model\.layers\.0\.mlp\.experts\.gate_up_proj cannot be put tog"):
        models.load(str(tmp_path), device="cpu", weights=weights)


@pytest.mark.parametrize("weights", WAYS)
@pytest.mark.parametrize("number", [1, 0, -1])
def test_layers_that_the_configuration_leaves_out_are_an_error(tmp_path, number, weights):
    save_family(tmp_path, "llama", changed={"num_hidden_layers": number})
    with pytest.raises(RequestError, match=rf"no place for \({9 * (2 - max(number, 0))}\): model\.layers\."):
        models.load(str(tmp_path), device="cpu", weights=weights)


@pytest.mark.parametrize("weights", WAYS)
def test_tensors_that_may_be_left_out_are_said_and_recorded(tmp_path, weights, capsys):
    truth = losses(save_family(tmp_path, "llama"))
    change(tmp_path, **{"score.weight": torch.zeros(2, 16), "model.old.bias": torch.zeros(3)})
    options = {"dtype": "float64", "device": "cpu", "weights": weights}
    with pytest.raises(RequestError, match=r"no place for \(1\): model\.old\.bias"):
        models.load(str(tmp_path), **options, allow_unused_weights=["score.*"])
    loaded = models.load(str(tmp_path), **options, allow_unused_weights=["score.*", "*.bias"])
    assert loaded.metadata["unused_weights"] == ["model.old.bias", "score.weight"]
    assert "UNUSED WEIGHTS: model.old.bias, score.weight" in capsys.readouterr().out
    if weights == "resident":
        assert torch.equal(losses(loaded.model), truth)


def test_weights_that_are_not_in_safetensors_files_are_not_streamed(tmp_path):
    truth = losses(save_family(tmp_path, "llama"))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"pytorch_model\.bin is not a safetensors file; --weights resident"):
        models.load(str(tmp_path), device="cpu", weights="streamed")
    assert torch.equal(loaded_losses(tmp_path, "auto"), truth)


def quantized(folder):
    """A model whose projections are stored as float8 codes, a scale for each block; the other weights are bfloat16."""
    model = save_family(folder, "llama", torch.float32, changed={"quantization_config": FP8})
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith("_proj.weight"):
            scale = parameter.abs().max() / 448
            tensors[name] = (parameter / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
            parameter.copy_(tensors[name].float() * scale)
        else:
            tensors[name] = parameter.to(torch.bfloat16)
            parameter.copy_(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("weights", ["resident", "auto"])
def test_codes_are_dequantized_to_the_dtype_that_was_asked_for(tmp_path, weights, monkeypatch):
    truth = quantized(tmp_path)
    monkeypatch.setattr(resident_or_streamed, "RESIDENT_SHARE", 0.0)
    loaded = models.load(str(tmp_path), dtype="float32", device="cpu", weights=weights)
    assert loaded.checkpoint is None and loaded.metadata["quantization"] == "fp8"
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(losses(loaded.model), losses(truth))
    with pytest.raises(RequestError, match=r"its weights are quantized \(fp8\); --weights resident"):
        models.load(str(tmp_path), device="cpu", weights="streamed")


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_a_quantized_model_is_left_to_its_quantizer(tmp_path, stored, named):
    """None of which is installed: what transformers says of that is one line."""
    save_family(tmp_path, "llama", changed={"quantization_config": stored})
    with pytest.raises(RequestError, match=rf"its weights are quantized \({named}\)"):
        models.load(str(tmp_path), device="cpu", weights="streamed")
    with pytest.raises(
        RequestError, match="cannot be loaded; its modules and weights: ImportError: .* requires|is requ"
    ):
        models.load(str(tmp_path), device="cpu")
