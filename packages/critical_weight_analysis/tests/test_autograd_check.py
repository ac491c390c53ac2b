"""The layer-by-layer engine is compared with autograd before it is used; where it differs, another takes its place."""

import itertools
import re

import pytest
import torch
from bridge.exchange.errors import RequestError
from critical_weight_analysis import discovery
from critical_weight_analysis.discovery import LAYERWISE, WHOLE_MODEL, engine_for, needs_of
from critical_weight_analysis.layerwise import autograd_check, autograd_reference
from critical_weight_analysis.layerwise import engine as layerwise_engine
from critical_weight_analysis.layerwise.activation_cache import ActivationCache
from critical_weight_analysis.layerwise.parameter_uses import Recorder
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.layerwise.probe import Refusal, probe
from critical_weight_analysis.whole_model import WholeModelEngine
from llm_perturb.evaluation import models
from reference import naive_sensitivities
from test_layerwise_engine import ALL, assert_same_sums, matrices
from tiny_models import odd_models, save_model
from tiny_models.checkpoints import save_family
from tiny_models.further_families import DECODERS, build_decoder, shared_key_values


def measured(engine, model, sequences, batch_size=3):
    names = [name for name, _ in model.named_parameters()]
    losses, stream = engine.sensitivities(model, sequences, names, ALL, Settings(batch_size=batch_size))
    return losses, {sensitivity.name: sensitivity for sensitivity in stream}


def assert_right(engine, model, sequences, rtol=1e-9, of_largest=1e-13):
    naive = naive_sensitivities(model, sequences)
    losses, found = measured(engine, model, sequences)
    torch.testing.assert_close(losses, naive.losses, rtol=rtol, atol=0)
    assert_same_sums(found, naive, rtol=rtol, of_largest=of_largest)


def test_common_decoders_are_proved(model):
    engine = engine_for(model)
    assert engine.name == LAYERWISE and engine.together
    assert re.fullmatch(
        r"layer by layer: proved on 8 tokens against autograd in [\d.]+ s, largest difference \de-1\d", engine.account
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_other_decoders_are_proved(name):
    engine = engine_for(build_decoder(name))
    assert engine.name == LAYERWISE and engine.together


def test_the_model_is_left_as_it_was(model):
    engine_for(model)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (odd_models.fused, r"model\.layers\.1\.mlp\.up_proj\.weight is not seen to act, though it does"),
        (odd_models.counting, r"its losses differ from those of a plain forward pass by 0\.\d+ of their size"),
        (odd_models.shared_layer, r"transformer\.h\.0\.mlp\.\S+ acts in more than one place: \S+h\.0, \S+h\.1"),
        (odd_models.repeated_layer, "its layers are not called one after another, each once"),
        (shared_key_values, r"model\.layers\.0 takes more than the hidden state from what is before it"),
    ],
)
def test_the_whole_model_engine_takes_over_and_says_why(build, reason, sequences):
    model = build()
    engine = engine_for(model)
    assert engine.name == WHOLE_MODEL
    assert re.fullmatch(f"as a whole, because layer by layer is not possible: {reason}", engine.account)
    assert_right(engine, model, sequences, rtol=1e-5, of_largest=2e-6)
    with pytest.raises(RequestError, match=f"wanda needs a model that is run layer by layer, .*because .*{reason}"):
        needs_of(["wanda"], engine)


def test_an_engine_that_takes_a_parameter_for_another_is_found_out(tiny_model, monkeypatch):
    model, parts = tiny_model("llama"), Recorder.pieces
    k_and_v = [f"model.layers.2.self_attn.{name}_proj.weight" for name in "kv"]

    def exchanged(self, *args):
        found = parts(self, *args)
        one, other = k_and_v
        return found | ({one: found[other], other: found[one]} if one in found else {})

    monkeypatch.setattr(Recorder, "pieces", exchanged)
    account = engine_for(model).account
    assert re.search(r"the gradient of model\.layers\.2\.self_attn\.[kv]_proj\.weight differs .* of its size", account)
    assert engine_for(model, names=["model.norm.weight"]).name == LAYERWISE


def test_an_error_in_the_second_forward_pass_is_a_reason(tiny_model, monkeypatch):
    def fail(self, func, args):
        raise AssertionError("other calls\nthan before")

    monkeypatch.setattr(ActivationCache, "_recompute", fail)
    assert engine_for(tiny_model("neox")).account.endswith("it fails: AssertionError: other calls than before")


@pytest.mark.parametrize("fields", [{"fisher"}, {"grad", "curvature"}])
def test_sequences_that_are_not_told_apart_are_run_one_by_one(tiny_model, sequences, monkeypatch, fields):
    model = tiny_model("neox")
    names = matrices(model)
    joined = lambda recorder, batch, sums: [(batch.members[0], recorder.pieces())]  # noqa: E731
    monkeypatch.setattr(layerwise_engine, "pieces_by_sequence", joined)
    engine = engine_for(model, names=names, needs=frozenset(fields))
    assert engine.name == LAYERWISE and not engine.together
    assert re.match(r"layer by layer, one sequence at a time because in batches the squared gradients", engine.account)
    assert_right(engine, model, sequences)
    assert engine_for(model, names=names, needs=frozenset({"grad"})).together  # in a sum nothing need be told apart


def test_a_stateful_model_is_caught_though_each_batch_is_right(tiny_model, sequences):
    """One batch after the other through a layer: what it remembers is of another batch by then."""
    model, seen = tiny_model("llama"), []
    model.model.layers[0].register_forward_hook(lambda module, args, output: (seen.clear(), seen.append(output))[0])
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + 0.1 * seen[0].detach())
    engine = engine_for(model)
    assert engine.name == WHOLE_MODEL
    assert_right(engine, model, sequences)


@pytest.mark.parametrize("needs", [{"grad"}, set()])
def test_a_model_that_is_not_causal_is_refused(needs):
    with pytest.raises(RequestError, match="later tokens change this model's predictions of earlier ones"):
        engine_for(odd_models.bert(), needs=frozenset(needs))


def test_a_model_that_computes_something_else_each_time_is_refused():
    with pytest.raises(RequestError, match="gives other predictions when it is run again"):
        engine_for(odd_models.noisy())


def test_a_model_that_cannot_be_run_on_ids_is_refused(tiny_model):
    model = tiny_model("gpt2")
    model.transformer.h[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(RequestError, match="cannot be run forward and backward on the ids of a few tokens: ZeroDiv"):
        engine_for(model)


def test_a_small_vocabulary_is_enough(tiny_model):
    model = tiny_model("llama")
    model.resize_token_embeddings(3, mean_resizing=False)
    assert engine_for(model.requires_grad_(False)).name == LAYERWISE


def test_parameters_without_a_part_are_counted(tiny_model):
    model = tiny_model("llama")
    model.model.layers[1].mlp.unused = torch.nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
    assert engine_for(model).account.endswith("; 2 parameters took no part and are not proved")


def test_no_gradient_is_compared_where_losses_are_enough(tiny_model, monkeypatch):
    for module in (autograd_check, autograd_reference):
        monkeypatch.setattr(module, "numbers_of_rows", lambda gradient: pytest.fail("not needed"))
    assert "proved on 8 tokens" in engine_for(tiny_model("llama"), needs=frozenset()).account


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_obstacle(tiny_model, dtype):
    for name in ("gpt2", "neox", "llama"):
        assert engine_for(tiny_model(name, dtype)).name == LAYERWISE


def test_streamed_weights_that_must_be_held_are_refused_with_the_reason(tmp_path):
    save_model(shared_key_values(), tmp_path)
    loaded = models.load(str(tmp_path), weights="streamed")
    with pytest.raises(RequestError, match="--weights resident: it is run as a whole, because .* takes more than the"):
        engine_for(loaded.model, Settings(checkpoint=loaded.checkpoint))


def test_streamed_weights_of_a_model_that_is_not_causal_are_refused(tmp_path):
    save_model(odd_models.bert(), tmp_path)
    loaded = models.load(str(tmp_path), weights="streamed")
    with pytest.raises(RequestError, match="later tokens change"):
        engine_for(loaded.model, Settings(checkpoint=loaded.checkpoint))


def test_the_proof_of_streamed_weights_holds_no_more_than_a_layer(tiny_model, tmp_path, monkeypatch):
    save_model(tiny_model("llama", torch.float32), tmp_path)
    loaded = models.load(str(tmp_path), weights="streamed")
    structure_of_model = probe(loaded.model, loaded.checkpoint)
    absent = {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()}
    most = []

    def look(*_):
        here = {name for name, p in loaded.model.named_parameters() if p.data_ptr() != absent[name]}
        most.append({name.split(".mlp")[0].split(".self")[0] for name in here if ".layers." in name})

    numbers = autograd_reference.numbers_of_rows
    monkeypatch.setattr(autograd_reference, "numbers_of_rows", lambda tensor: (look(), numbers(tensor))[1])
    for layer in loaded.model.model.layers:
        layer.register_forward_hook(look)
    expected = autograd_reference.by_autograd(
        loaded.model, list(absent), frozenset({"grad"}), structure_of_model, loaded.checkpoint
    )
    assert expected.idle == set()
    assert len(most) > 60 and max(map(len, most)) <= 3
    assert {name: p.data_ptr() for name, p in loaded.model.named_parameters()} == absent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_in_float64(name, sequences, tmp_path):
    save_family(tmp_path, name, torch.float32)
    model = models.load(str(tmp_path), dtype="float64").model
    for engine in (engine_for(model), WholeModelEngine()):
        assert_right(engine, model, sequences, rtol=1e-5, of_largest=2e-6)
    assert engine_for(model).name == LAYERWISE


def test_processes_agree_on_what_the_weakest_of_them_can_do(tiny_model):
    engine = engine_for(tiny_model("llama"))
    mine = (engine.name, engine.together, engine.account)
    for others, name, together, account in [
        ([mine, mine], LAYERWISE, True, engine.account),
        ([mine, (LAYERWISE, False, "one by one")], LAYERWISE, False, "one by one"),
        ([mine, (WHOLE_MODEL, True, "whole"), (LAYERWISE, False, "one by one")], WHOLE_MODEL, True, "whole"),
    ]:
        agreed = [discovery._agreed(engine, list(order)) for order in itertools.permutations(others)]
        assert {(one.name, one.together, one.account) for one in agreed} == {(name, together, account)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.transformer.__setattr__("h", None), "it has no list of layers"),
        (lambda model: model.__setattr__("lm_head", torch.nn.Identity()), "its output head is not a linear map"),
        (lambda model: model.transformer.h[1].to("meta"), "its parameters are not all on one device"),
    ],
)
def test_the_probe_says_why_it_refuses(tiny_model, change, reason):
    model = tiny_model("gpt2")
    change(model)
    assert probe(model) == Refusal(reason)
