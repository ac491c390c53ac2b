"""Weights that are read from the checkpoint layer by layer give the same bits as weights in memory."""

import re
from contextlib import ExitStack

import pytest
import torch
from bridge.exchange.errors import RequestError
from critical_weight_analysis.discovery import LAYERWISE, discover, engine_for
from critical_weight_analysis.layerwise.parameter_uses import Recorder
from critical_weight_analysis.layerwise.pass_settings import Settings
from engines import LAYERWISE as LAYERWISE_ENGINE
from llm_perturb.evaluation import models, resident_or_streamed
from llm_perturb.evaluation.parameters import in_scope
from safetensors.torch import load_file, save_file
from tiny_models import build, save_model
from tiny_models.checkpoints import save_family
from transformers import RoFormerConfig, RoFormerForCausalLM

NEEDS = frozenset({"grad", "fisher", "curvature"})


@pytest.fixture(params=["gpt2", "neox", "llama"])
def folder(request, tmp_path):
    """A checkpoint in bfloat16, of several files."""
    save_model(build(request.param, torch.bfloat16), tmp_path / "model", max_shard_size="5KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_streamed_weights_give_the_same_bits(folder, sequences, dtype):
    resident = models.load(str(folder), dtype=dtype)
    streamed = models.load(str(folder), dtype=dtype, weights="streamed")
    assert resident.checkpoint is None
    assert streamed.metadata == resident.metadata
    settings = Settings(batch_size=2, checkpoint=streamed.checkpoint)
    engines = engine_for(resident.model), engine_for(streamed.model, settings)
    assert all(engine.name == LAYERWISE and engine.together for engine in engines)
    accounts = {re.sub(r"in [\d.]+ s", "", engine.account) for engine in engines}
    assert len(accounts) == 1 and "proved on 8 tokens" in accounts.pop()  # the same differences, too
    names = [name for name, _ in resident.model.named_parameters()]
    losses, stream = LAYERWISE_ENGINE.sensitivities(resident.model, sequences, names, NEEDS, Settings(batch_size=2))
    others, again = LAYERWISE_ENGINE.sensitivities(streamed.model, sequences, names, NEEDS, settings)
    assert torch.equal(losses, others)
    for one, other in zip(stream, again, strict=True):
        assert one.name == other.name
        for field in ("weight", *NEEDS):
            assert torch.equal(getattr(one, field), getattr(other, field)), (one.name, field)
    assert all(parameter.stride() == (0,) * parameter.ndim for parameter in streamed.model.parameters())


def test_fingerprint_is_that_of_weights_in_memory_and_costs_no_reading(folder, monkeypatch):
    loaded = models.load(str(folder), weights="streamed")
    engine_for(loaded.model, Settings(checkpoint=loaded.checkpoint))
    with monkeypatch.context() as patch:
        patch.setattr(loaded.checkpoint, "present", None)
        fingerprint = loaded.fingerprint
    assert fingerprint == models.load(str(folder)).fingerprint


def tables(folder, sequences, weights, metrics=("grad_x_weight", "wanda", "magnitude")):
    loaded = models.load(str(folder), weights=weights)
    settings = Settings(checkpoint=loaded.checkpoint)
    engine = engine_for(loaded.model, settings)
    assert engine.name == LAYERWISE
    found = discover(
        LAYERWISE_ENGINE, loaded.model, sequences, in_scope(loaded.model), list(metrics), 20, settings=settings
    )
    return [found.sampled, *(found.rankings[metric].top(20) for metric in metrics)]


@pytest.mark.slow
def test_tables_are_the_same(folder, sequences):
    both = [tables(folder, sequences, weights) for weights in ("resident", "streamed")]
    assert all(one.equals(other) for one, other in zip(*both, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one_give_the_same_tables(family, tmp_path, sequences):
    save_family(tmp_path, family, torch.float32)
    assert "model.layers.0.mlp.experts.down_proj" not in load_file(tmp_path / "model.safetensors")
    both = [tables(tmp_path, sequences, weights, ["grad_x_weight", "obd"]) for weights in ("resident", "streamed")]
    assert any("experts.down_proj" in name for name in both[0][0]["parameter"])
    assert all(one.equals(other) for one, other in zip(*both, strict=True))


def test_only_what_is_asked_for_is_there(folder):
    loaded = models.load(str(folder), weights="streamed")
    (name, other), model = list(dict(loaded.model.named_parameters()))[:2], loaded.model
    truth = dict(models.load(str(folder)).model.named_parameters())
    with loaded.checkpoint.present([name]):
        with loaded.checkpoint.present([name, other]):
            assert torch.equal(model.get_parameter(other), truth[other])
        assert torch.equal(model.get_parameter(name), truth[name])
        assert model.get_parameter(other).untyped_storage().nbytes() == 4
    assert model.get_parameter(name).untyped_storage().nbytes() == 4


def test_values_are_there_while_the_calls_are_watched(folder):
    loaded, ids = models.load(str(folder), weights="streamed"), torch.tensor([[3, 1, 4, 1, 5]])
    list_name = next(name for name, module in loaded.model.named_modules() if isinstance(module, torch.nn.ModuleList))
    outside = [name for name, _ in loaded.model.named_parameters() if not name.startswith(list_name)]
    recorder = Recorder(dict(loaded.model.named_parameters()))
    with ExitStack() as stack:
        stack.enter_context(loaded.checkpoint.present(outside))
        for layer in loaded.model.get_submodule(list_name):
            stack.enter_context(loaded.checkpoint.present_during(layer))
        with recorder:
            logits = loaded.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, models.load(str(folder)).model(input_ids=ids, use_cache=False).logits)


def test_tensors_without_the_base_models_name(tmp_path, sequences):
    """As in the checkpoint of gpt2 itself: h.0.attn..., and no head, which is tied."""
    save_model(build("gpt2"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stripped = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
    save_file(stripped, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = models.load(str(tmp_path), dtype="float64", weights="streamed")
    resident = models.load(str(tmp_path), dtype="float64")
    names = ["transformer.h.1.mlp.c_fc.weight"]
    found = [
        next(
            LAYERWISE_ENGINE.sensitivities(m.model, sequences, names, NEEDS, Settings(checkpoint=m.checkpoint))[1]
        ).grad
        for m in (loaded, resident)
    ]
    assert torch.equal(*found)


def test_checkpoint_that_cannot_be_streamed_is_refused(tmp_path):
    save_model(build("llama"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"it holds model\.layers\.0\.mlp\.up_proj\.weight as 3 x 3"):
        models.load(str(tmp_path), weights="streamed")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"no file named model\.safetensors"):
        models.load(str(tmp_path), weights="streamed")


@pytest.mark.parametrize(("share", "streamed"), [(0.0, True), (0.6, False)])
def test_auto_goes_by_the_free_memory(folder, monkeypatch, share, streamed, capsys):
    monkeypatch.setattr(resident_or_streamed, "RESIDENT_SHARE", share)
    loaded = models.load(str(folder), weights="auto")
    assert (loaded.checkpoint is not None) == streamed
    assert ("layer by layer" in capsys.readouterr().out) == streamed


def test_a_table_that_is_read_without_gradients_is_there(tmp_path):
    """As sinusoidal positions are, which are parameters all the same."""
    torch.manual_seed(0)
    config = RoFormerConfig(
        vocab_size=50, embedding_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, max_position_embeddings=16, is_decoder=True,
    )  # fmt: skip
    save_model(RoFormerForCausalLM(config).eval(), tmp_path)
    resident, streamed = (models.load(str(tmp_path), weights=weights) for weights in ("resident", "streamed"))
    assert "roformer.encoder.embed_positions.weight" in dict(resident.model.named_parameters())
    for loaded in (resident, streamed):
        engine = engine_for(loaded.model, Settings(checkpoint=loaded.checkpoint))
        assert engine.name == LAYERWISE and engine.account.endswith("took no part and are not proved")
