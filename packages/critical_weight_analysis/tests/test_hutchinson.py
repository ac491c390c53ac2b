import pandas as pd
import pytest
import torch
from bridge.exchange.errors import RunError
from critical_weight_analysis import hutchinson
from critical_weight_analysis.discovery import discover, engine_for
from critical_weight_analysis.hutchinson import hessian_diagonal, rademacher
from engines import WHOLE_MODEL
from llm_perturb.evaluation.parameters import in_scope
from reference import naive_hessian_diagonal, naive_hessian_product, naive_top
from scipy.linalg import hadamard
from tiny_models.further_families import DECODERS, build_decoder
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GAINS = {
    "gpt2": "transformer.h.1.ln_2.weight",
    "llama": "model.layers.1.post_attention_layernorm.weight",
    "llama_tied": "model.layers.1.post_attention_layernorm.weight",
    "neox": "gpt_neox.layers.1.post_attention_layernorm.weight",
}


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def explicit_hessian(model, sequences, name, size):
    """Column by column."""
    columns = torch.eye(size, dtype=torch.float64)
    return torch.stack([naive_hessian_product(model, sequences, {name: column})[name] for column in columns], dim=1)


def test_one_probe_is_the_signs_times_the_difference_of_two_gradients(model, sequences):
    names = names_of(model)
    signs = {name: rademacher(name, p.detach(), 3, 0) for name, p in model.named_parameters()}
    expected = naive_hessian_product(model, sequences[:4], signs)
    found = hessian_diagonal(model, sequences[:4], names, 1, seed=3)
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name], signs[name] * expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DECODERS))
def test_one_probe_of_other_families(sequences, name):
    model = build_decoder(name)
    signs = {name: rademacher(name, p.detach(), 0, 0) for name, p in model.named_parameters()}
    expected = naive_hessian_product(model, sequences[:2], signs, step=1e-4)  # some compute parts in float32
    found = hessian_diagonal(model, sequences[:2], names_of(model), 1)
    scale = max(product.abs().max() for product in expected.values())
    for name in found:
        torch.testing.assert_close(found[name], signs[name] * expected[name], rtol=0, atol=5e-4 * scale)


def test_several_probes_are_their_mean(tiny_model, sequences):
    model, names = tiny_model("llama"), ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    weights = dict(model.named_parameters())
    expected = dict.fromkeys(names, 0)
    for probe in range(3):
        signs = {name: rademacher(name, weights[name].detach(), 0, probe) for name in names}
        products = naive_hessian_product(model, sequences[:2], signs)
        expected = {name: expected[name] + signs[name] * products[name] / 3 for name in names}
    found = hessian_diagonal(model, sequences[:2], names, 3)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GAINS))
def test_orthogonal_signs_leave_the_exact_diagonal(tiny_model, sequences, name, monkeypatch):
    model, gain = tiny_model(name), GAINS[name]
    rows = torch.tensor(hadamard(8), dtype=torch.float64)  # over which every product of two columns sums to 0
    monkeypatch.setattr(hutchinson, "rademacher", lambda name, like, seed, probe: rows[probe])
    found = hessian_diagonal(model, sequences[:3], [gain], 8)[gain]
    expected = naive_hessian_diagonal(model, sequences[:3], gain, range(8))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, explicit_hessian(model, sequences[:3], gain, 8).diagonal(), rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_the_mean_of_many_probes_comes_to_the_diagonal_at_its_own_rate(tiny_model, sequences, name):
    model, gain, n_probes = tiny_model(name), GAINS[name], 800
    hessian = explicit_hessian(model, sequences[:1], gain, 8)
    sigma = (hessian.square().sum(1) - hessian.diagonal().square()).sqrt() / n_probes**0.5
    off = (hessian_diagonal(model, sequences[:1], [gain], n_probes)[gain] - hessian.diagonal()) / sigma
    assert off.abs().max() < 4
    assert off.square().mean() > 0.1  # neither is it the diagonal by another way


@pytest.mark.slow
def test_tied_tensor_has_the_second_derivatives_of_both_uses(tiny_model, sequences):
    model, name = tiny_model("gpt2"), "transformer.wte.weight"
    token = sequences[0][0].item()
    indices = [(token, 2), ((token + 1) % 50, 5), (49, 0)]
    exact = naive_hessian_diagonal(model, sequences[:1], name, indices)
    probes = [hessian_diagonal(model, sequences[:1], [name], 1, seed=seed)[name] for seed in range(300)]
    drawn = torch.stack([torch.stack([probe[index] for index in indices]) for probe in probes])
    assert ((drawn.mean(0) - exact).abs() < 4 * drawn.std(0) / 300**0.5 + 1e-6).all()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    one_use = naive_hessian_diagonal(model, sequences[:1], name, indices)
    assert (exact - one_use).abs().max() > 1e-4


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_in_any_order_of_names_and_another_seed_others(tiny_model, sequences):
    model = tiny_model("neox")
    names = names_of(model)
    first = hessian_diagonal(model, sequences, names, 2, seed=7)
    second = hessian_diagonal(model, sequences, names[::-1], 2, seed=7)
    other = hessian_diagonal(model, sequences, names, 2, seed=8)
    shuffled = hessian_diagonal(model, sequences[::-1], names, 2, seed=7)
    for name in names:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(first[name], shuffled[name], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(first[name], other[name])
    again = hessian_diagonal(model, sequences, names, 2, seed=7)
    assert all(torch.equal(first[name], again[name]) for name in names)


def test_a_parameter_that_takes_no_part_has_a_diagonal_of_zeros(tiny_model, sequences):
    model = tiny_model("llama")
    model.unused = torch.nn.Linear(3, 2, bias=False)
    diagonal = hessian_diagonal(model, sequences[:2], ["unused.weight", GAINS["llama"]], 1)
    assert torch.equal(diagonal["unused.weight"], torch.zeros(2, 3, dtype=diagonal["unused.weight"].dtype))
    assert diagonal[GAINS["llama"]].any()


def test_signs_are_plus_and_minus_one_and_their_own_for_each_parameter_probe_and_seed():
    like = torch.empty(101, 33, dtype=torch.float32)
    drawn = [rademacher(*key) for key in [("a", like, 0, 0), ("b", like, 0, 0), ("a", like, 0, 1), ("a", like, 1, 0)]]
    for signs in drawn:
        assert signs.shape == like.shape and signs.dtype == like.dtype
        assert torch.equal(signs.abs(), torch.ones_like(signs))
    apart = torch.corrcoef(torch.stack([signs.flatten() for signs in drawn])) - torch.eye(4)
    assert apart.abs().max() < 0.08
    assert max(signs.mean().abs() for signs in drawn) < 0.08


def test_signs_of_a_seed_stay_what_they_are():
    """The bits of ``default_rng([2, 1, *b"signs of the Hessian's diagonal/a.weight"]).bytes(3)``, 0xf99745."""
    signs = [2 * int(bit) - 1 for bit in f"{0xF99745:024b}"]
    for n in range(1, 25):
        assert rademacher("a.weight", torch.empty(n), 2, 1).tolist() == signs[:n]


def test_bar_counts_every_probe_and_the_last_one_frees_the_graph(tiny_model, sequences, monkeypatch):
    bars, kept, backward = [], [], torch.autograd.backward

    class Bar(hutchinson.Progress):
        def __init__(self, *args):
            super().__init__(*args)
            bars.append(self)

    def recorded(*args, retain_graph):
        kept.append(retain_graph)
        backward(*args, retain_graph=retain_graph)

    monkeypatch.setattr(hutchinson, "Progress", Bar)
    monkeypatch.setattr(torch.autograd, "backward", recorded)
    hessian_diagonal(tiny_model("llama"), sequences[:2], ["model.norm.weight"], 3)
    assert [(bar.done, bar.total) for bar in bars] == [(6, 6)]
    assert kept == [True, True, False] * 2


def test_what_it_costs_is_said_before(caplog):
    caplog.set_level("INFO", "critical_weight_analysis")
    hutchinson._announce(n_sequences=7, n_probes=3, n_weights=10**9)
    assert "3 probes of 7 sequences, 21 products" in caplog.text
    assert "5 times the 1000000000 weights in scope in float32 (20.0 GB)" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_differentiated_in_float32(tiny_model, sequences, dtype):
    narrow = tiny_model("neox", dtype)
    wide = tiny_model("neox", dtype).to(torch.float32)
    found, expected = (hessian_diagonal(m, sequences[:2], names_of(m), 1) for m in (narrow, wide))
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    for name in expected:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_leaves_the_model_as_it_was(tiny_model, sequences):
    model = tiny_model("gpt2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hessian_diagonal(model, sequences[:2], names_of(model), 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_attention_of_another_kind_is_put_aside_for_a_while(tiny_model, sequences):
    expected = hessian_diagonal(tiny_model("llama"), sequences[:2], ["model.norm.weight"], 1)
    AttentionInterface.register(
        "double", lambda *args, **kwargs: (sdpa_attention_forward(*args, **kwargs)[0] * 2, None)
    )
    model = tiny_model("llama")
    model.set_attn_implementation("double")
    found = hessian_diagonal(model, sequences[:2], ["model.norm.weight"], 1)
    assert model.config._attn_implementation == "double"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # eager attention has its softmax in float32


class Once(torch.autograd.Function):
    """The identity, whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


def test_a_kernel_that_can_be_differentiated_only_once_is_an_error(tiny_model, sequences):
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: Once.apply(output))
    with pytest.raises(RunError, match="needs a model that can be differentiated twice: .*once_differentiable"):
        hessian_diagonal(model, sequences[:1], ["model.layers.0.mlp.up_proj.weight"], 1)


def test_a_loss_without_second_derivatives_is_an_error(tiny_model, sequences):
    model = tiny_model("llama")
    model.extra = torch.nn.Linear(2, 2, dtype=torch.float64)
    with pytest.raises(RunError, match="every second derivative is 0"):
        hessian_diagonal(model, sequences[:1], ["extra.weight"], 1)


def test_a_loss_that_is_not_finite_names_the_sequence(tiny_model, sequences):
    model = tiny_model("gpt2")
    model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(RunError, match="loss of sequence 0 is nan"):
        hessian_diagonal(model, sequences[:1], ["transformer.ln_f.weight"], 1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, WHOLE_MODEL])
def test_discovery_ranks_it_beside_the_other_metrics(model, sequences, engine):
    parameters = in_scope(model)
    metrics = ["obd", "hutchinson_diag"]
    found = discover(
        engine or engine_for(model), model, sequences[:2], parameters, metrics, 30, seed=4, hutchinson_probes=2
    )
    alone = discover(engine or engine_for(model), model, sequences[:2], parameters, metrics[:1], 30)
    diagonal = hessian_diagonal(model, sequences[:2], list(parameters), 2, seed=4)
    expected = naive_top({name: estimate.abs() for name, estimate in diagonal.items()}, 30)
    top = found.rankings["hutchinson_diag"].top(30)
    assert list(zip(top["parameter"], top["row"], top["col"], strict=True)) == [line[:3] for line in expected]
    assert top["score"].tolist() == pytest.approx([line[3] for line in expected], rel=1e-12)
    assert (found.controls.bottom("hutchinson_diag", 5)["score"] <= top["score"].min()).all()
    assert "score_hutchinson_diag" in found.sampled
    assert found.rankings["obd"].top(30).equals(alone.rankings["obd"].top(30))


def test_discovery_without_any_metric_of_the_pass(tiny_model, sequences):
    model, metric = tiny_model("llama_tied"), "hutchinson_diag"
    parameters = in_scope(model)
    options = {"seed": 4, "hutchinson_probes": 2}
    alone, both = (
        discover(engine_for(model), model, sequences[:2], parameters, metrics, 30, **options)
        for metrics in ([metric], ["grad_x_weight", metric])
    )
    pd.testing.assert_frame_equal(alone.rankings[metric].top(30), both.rankings[metric].top(30))
    torch.testing.assert_close(alone.losses, both.losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", [None, WHOLE_MODEL])
def test_discovery_may_be_stopped_by_its_losses_before_the_hessian(tiny_model, sequences, engine, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(hutchinson, "hessian_diagonal", lambda *args: pytest.fail("too late"))

    def stop(losses):
        raise RunError(f"{len(losses)} losses of another setup")

    with pytest.raises(RunError, match="2 losses"):
        discover(
            engine or engine_for(model), model, sequences[:2], in_scope(model), ["hutchinson_diag"], 5, on_losses=stop
        )
