import copy

import pytest
import torch
from bridge.exchange.errors import RunError
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.parameters import named_parameters
from llm_perturb.target_scores import target_scores
from reference import every_bit, naive_loss, naive_score
from tiny_models import build

METRICS = ("grad_x_weight", "grad_squared", "obd", "taylor2", "magnitude")
TARGETS = {
    "gpt2": ["transformer.h.1.attn.c_attn.weight", "transformer.h.2.mlp.c_proj.weight", "transformer.h.0.ln_1.weight"],
    "neox": [
        "gpt_neox.layers.1.attention.query_key_value.weight",
        "lm_head.weight",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.bias",
    ],
    "llama": ["model.layers.0.self_attn.k_proj.weight", "model.layers.2.mlp.gate_proj.weight", "lm_head.weight"],
    "llama_tied": ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"],
}
TIED = {"gpt2": "transformer.wte.weight", "llama_tied": "model.embed_tokens.weight"}


def scores_of(model, sequences, names, metrics=METRICS):
    named = named_parameters(model)
    return target_scores(model, Corpus(sequences, {}), {name: named[name] for name in names}, metrics)


@pytest.mark.parametrize("family", sorted(TARGETS))
def test_every_metric_is_its_definition(family, sequences):
    model = build(family)
    found = scores_of(model, sequences, TARGETS[family])
    assert list(found) == list(METRICS)
    for metric in METRICS:
        for name in TARGETS[family]:
            expected = naive_score(model, sequences, name, metric)
            torch.testing.assert_close(found[metric][name], expected, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("family", sorted(TIED))
def test_a_tied_tensor_has_the_gradients_of_both_uses(family, sequences):
    """The reference gradient, once more from an untied twin: that of the embedding plus that of the head."""
    model = build(family)
    twin = copy.deepcopy(model)
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.detach().clone())
    uses = [twin.get_parameter(TIED[family]).requires_grad_(True), twin.lm_head.weight.requires_grad_(True)]
    total = sum(naive_loss(twin, sequence) for sequence in sequences)
    gradient = sum(torch.autograd.grad(total, uses))
    n_tokens = sum(len(sequence) - 1 for sequence in sequences)
    expected = (uses[0].detach() * gradient / n_tokens).abs()
    found = scores_of(model, sequences, [TIED[family]], ["grad_x_weight"])["grad_x_weight"][TIED[family]]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-18)


def test_grad_x_weight_predicts_the_effect_of_a_small_shrink(sequences):
    """A check that owes nothing to autograd: a weight smaller by a millionth moves L by a millionth of its score."""
    model, name = build("llama"), "model.layers.1.mlp.down_proj.weight"
    scores = scores_of(model, sequences, [name], ["grad_x_weight"])["grad_x_weight"][name]
    row, col = divmod(int(scores.argmax()), scores.shape[1])
    n_tokens = sum(len(sequence) - 1 for sequence in sequences)
    losses = []
    for factor in (1 + 1e-6, 1 - 1e-6):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.get_parameter(name)[row, col] *= factor
        losses.append(sum(naive_loss(twin, sequence) for sequence in sequences).item() / n_tokens)
    assert abs(losses[0] - losses[1]) / 2e-6 == pytest.approx(scores[row, col].item(), rel=1e-5)


def test_targets_scored_together_have_the_scores_of_each_alone(model, sequences):
    names = [name for name, parameter in named_parameters(model).items() if parameter.ndim >= 2]
    together = scores_of(model, sequences, names)
    alone = scores_of(model, sequences, names[-1:])
    for metric in METRICS:
        torch.testing.assert_close(together[metric][names[-1]], alone[metric][names[-1]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_one_metric_alone_is_the_same_as_among_all(metric, sequences):
    model, name = build("gpt2"), "transformer.h.1.mlp.c_fc.weight"
    alone = scores_of(model, sequences, [name], [metric])
    assert list(alone) == [metric]
    assert torch.equal(alone[metric][name], scores_of(model, sequences, [name])[metric][name])


def test_magnitudes_need_no_pass_of_the_model():
    model, name = build("gpt2"), "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(
        scores_of(model, [None], [name], ["magnitude"])["magnitude"][name], model.get_parameter(name).abs()
    )
    assert scores_of(model, [torch.tensor([1, 2])], [name], []) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_narrow_weights_are_wide(sequences, dtype):
    model, name = build("llama", dtype), "model.layers.1.mlp.up_proj.weight"
    found = scores_of(model, sequences, [name])
    assert all(scores[name].dtype == torch.float32 for scores in found.values())


def test_the_model_is_left_as_it_was(model, sequences):
    before = every_bit(model)
    scores_of(model, sequences, list(named_parameters(model)))
    assert every_bit(model) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_left_as_it_was_after_an_exception(sequences, monkeypatch):
    model = build("neox")
    whole, calls = type(model).forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt("third pass")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(KeyboardInterrupt, match="third pass"):
        scores_of(model, sequences, list(named_parameters(model)))
    assert len(calls) == 3
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_score_that_is_not_finite_names_the_parameter(sequences):
    model, name = build("llama"), "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.inf
    with pytest.raises(RunError, match=r"of model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        scores_of(model, sequences, [name], ["grad_x_weight"])


def test_a_magnitude_that_is_not_finite_names_the_parameter_too(sequences):
    model, name = build("llama"), "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.nan
    with pytest.raises(RunError, match=r"of model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        scores_of(model, sequences, [name], ["magnitude"])
