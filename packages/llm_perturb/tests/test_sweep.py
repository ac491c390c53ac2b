import copy
import math

import pytest
import torch
from bridge.exchange.errors import RunError
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.parameters import match, named_parameters
from llm_perturb.evaluation.perplexity import sequence_losses
from llm_perturb.measurement_condition import Condition
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Target
from llm_perturb.sweep import sweep
from reference import every_bit, naive_losses, rewritten, zeroed
from tiny_models import BUILDERS, build

LAYERS = {
    "gpt2": ["transformer.h.2.mlp.c_fc", "transformer.wte", "transformer.h.1", "transformer.h.0.attn.c_attn.bias"],
    "neox": ["gpt_neox.layers.2.attention.query_key_value", "gpt_neox.embed_in", "gpt_neox.layers.1", "lm_head"],
    "llama": ["model.layers.2.mlp.down_proj", "model.embed_tokens", "model.layers.1", "lm_head"],
    "llama_tied": ["model.layers.2.mlp.down_proj", "lm_head", "model.layers.1", "model.norm"],
}
ZERO = Perturbation("zero")


def target_of(model, layer):
    named = named_parameters(model)
    return Target(layer, {name: named[name] for name in match(model, layer)})


def condition(model, layer, positions, perturbation=ZERO, selection="top_obd", seed=None):
    return Condition(target_of(model, layer), selection, perturbation, len(positions), seed, torch.tensor(positions))


def conditions_of(model, family):
    found = []
    for layer in LAYERS[family]:
        n = target_of(model, layer).n_weights
        found += [condition(model, layer, [n - 1, 0, n // 2]), condition(model, layer, [1], selection="random", seed=3)]
    return found


def measure(model, sequences, conditions, batch_size=1):
    baseline = sequence_losses(model, sequences, batch_size)
    return {o.condition.key: o for o in sweep(model, Corpus(sequences, {}), conditions, baseline, batch_size)}


@pytest.mark.parametrize("family", sorted(BUILDERS))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_zeroing_is_what_a_model_with_zeros_in_its_state_dict_gives(family, batch_size, sequences):
    model = build(family)
    conditions = conditions_of(model, family)
    found = measure(model, sequences, conditions, batch_size)
    assert len(found) == len(conditions)
    for c in conditions:
        twin = zeroed(model, {name: index.tolist() for name, index in c.target.split(c.positions).items()})
        expected = naive_losses(twin, sequences)
        torch.testing.assert_close(found[c.key].losses, expected, rtol=1e-12, atol=0)
        assert found[c.key].n_changed == len(c.positions)


def test_the_positions_of_a_target_of_many_tensors_are_the_right_weights(sequences):
    """Each tensor of a target zeroed by position, against zeroing it by name."""
    model = build("neox")
    target = target_of(model, "gpt_neox.layers.1")
    for name, start in target.offsets().items():
        size = target.parameters[name].numel()
        (outcome,) = measure(model, sequences, [condition(model, target.layer, [start, start + size - 1])]).values()
        expected = naive_losses(zeroed(model, {name: [0, size - 1]}), sequences)
        torch.testing.assert_close(outcome.losses, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("perturbation", "formula"),
    [
        (Perturbation("sign_flip"), lambda theta: -theta),
        (Perturbation("scale", factor=3.0), lambda theta: 3 * theta),
        (Perturbation("bit_flip", bit=63), lambda theta: -theta),
    ],
    ids=["sign_flip", "scale", "bit_flip"],
)
def test_other_changes_reach_the_model_too(sequences, perturbation, formula):
    model, name = build("llama"), "model.layers.1.mlp.gate_proj.weight"
    (outcome,) = measure(model, sequences, [condition(model, name, [7, 30], perturbation)]).values()
    theta = model.get_parameter(name).view(-1)
    twin = rewritten(model, {name: {j: formula(theta[j].item()) for j in (7, 30)}})
    torch.testing.assert_close(outcome.losses, naive_losses(twin, sequences), rtol=1e-12, atol=0)


def test_quantize_knows_how_the_matrix_is_stored(sequences):
    """Row 0 of a Conv1D is an input: its weights lie on the grids of many output channels."""
    model, name = build("gpt2"), "transformer.h.1.mlp.c_fc.weight"
    change = Perturbation("quantize", n_bits=3)
    (outcome,) = measure(model, sequences, [condition(model, name, list(range(20)), change)]).values()
    weight = model.get_parameter(name)
    steps = weight.abs().amax(0) / 3
    twin = rewritten(model, {name: dict(enumerate(((weight[0] / steps).round() * steps).tolist()))})
    torch.testing.assert_close(outcome.losses, naive_losses(twin, sequences), rtol=1e-12, atol=0)


def test_noise_depends_on_the_seed_and_on_nothing_else(sequences):
    model, name = build("llama"), "model.layers.1.mlp.gate_proj.weight"
    noise = Perturbation("gaussian_noise")
    conditions = [condition(model, name, [3, 5], noise, seed=seed) for seed in (0, 1)]
    first, again = measure(model, sequences, conditions), measure(model, sequences, conditions[::-1])
    assert len({tuple(outcome.losses.tolist()) for outcome in first.values()}) == 2
    assert all(torch.equal(first[key].losses, again[key].losses) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_the_order_of_conditions_changes_no_bit(family, sequences):
    model = build(family)
    conditions = conditions_of(model, family)
    forwards, backwards = (measure(model, sequences, order, 3) for order in (conditions, conditions[::-1]))
    alone = {key: o for c in conditions for key, o in measure(model, sequences, [c], 3).items()}
    assert forwards.keys() == backwards.keys() == alone.keys()
    for key in forwards:
        assert torch.equal(forwards[key].losses, backwards[key].losses)
        assert torch.equal(forwards[key].losses, alone[key].losses)


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_the_model_is_as_before_to_the_last_bit(family, sequences):
    model = build(family)
    before = every_bit(model)
    measure(model, sequences, conditions_of(model, family))
    assert every_bit(model) == before


def test_the_model_is_as_before_when_the_sweep_is_given_up(sequences):
    model = build("neox")
    before = every_bit(model)
    running = sweep(model, Corpus(sequences, {}), conditions_of(model, "neox"), sequence_losses(model, sequences))
    next(running)
    running.close()
    assert every_bit(model) == before


# the instrument checks itself


def unchanged(self, tensor, index, transposed, rng):
    return tensor.view(-1)[index]


def test_a_top_set_that_changes_nothing_is_a_failure_of_its_target(sequences, monkeypatch):
    monkeypatch.setattr(Perturbation, "new_values", unchanged)
    model = build("llama")
    chosen = [condition(model, "model.layers.2.mlp.down_proj", [4, 5], selection=s) for s in ("top_obd", "random")]
    top, random = measure(model, sequences, chosen).values()
    assert top.failure.startswith("zero of top_obd in model.layers.2.mlp.down_proj changes no weight of the model")
    assert random.failure is None


def test_a_random_set_may_hold_nothing_but_zeros(sequences):
    model = build("llama")
    model.model.layers[2].mlp.down_proj.weight.data.view(-1)[4] = 0.0
    c = condition(model, "model.layers.2.mlp.down_proj", [4], selection="random", seed=0)
    (outcome,) = measure(model, sequences, [c]).values()
    assert outcome.n_changed == 0
    assert torch.equal(outcome.losses, sequence_losses(model, sequences))


def test_a_write_that_does_not_arrive_is_an_error(sequences, monkeypatch):
    """As if the flat view were a copy: nothing is written, and that must not pass for an effect of zero."""
    model, real = build("llama"), torch.Tensor.view

    def copying(tensor, *shape):
        return real(tensor, *shape).clone() if shape == (-1,) else real(tensor, *shape)

    baseline = sequence_losses(model, sequences)
    monkeypatch.setattr(torch.Tensor, "view", copying)
    with pytest.raises(RunError, match="did not take the new value|was not restored"):
        list(sweep(model, Corpus(sequences, {}), [condition(model, "model.layers.0.mlp.down_proj", [4])], baseline))


def test_a_target_of_another_model_is_an_error(sequences):
    """Its tensors would take the change, be restored, and leave every loss alone."""
    model = build("llama")
    stranger = condition(copy.deepcopy(model), "model.layers.2.mlp.down_proj", [4, 5])
    with pytest.raises(RunError, match=r"model\.layers\.2\.mlp\.down_proj"):
        measure(model, sequences, [stranger])


@pytest.mark.parametrize("layer", ["model.embed_tokens", "model.layers.2.mlp.down_proj"])
def test_another_baseline_is_found_out_by_its_last_bit(sequences, layer):
    model = build("llama")
    baseline = sequence_losses(model, sequences)
    baseline[3] = math.nextafter(baseline[3].item(), math.inf)
    with pytest.raises(RunError, match="fails its own check: .* changes a loss by .* nats, and must by 0"):
        list(sweep(model, Corpus(sequences, {}), [condition(model, layer, [4])], baseline))


@pytest.mark.parametrize("layers", [["model.embed_tokens"], ["model.embed_tokens", "model.layers.1.mlp.up_proj"]])
def test_a_model_that_drifts_during_the_sweep_is_found_out(sequences, layers):
    model = build("llama")
    conditions = [condition(model, layer, [4]) for layer in layers]
    running = sweep(model, Corpus(sequences, {}), conditions, sequence_losses(model, sequences))
    next(running)
    model.model.norm.weight.data[0] *= 1 + 1e-9
    with pytest.raises(RunError, match="fails its own check"):
        list(running)


def test_padding_that_matters_only_under_a_perturbation_is_an_error(sequences):
    """As where attention takes the tokens of the highest scores and a perturbation makes scores equal."""
    model = build("llama")
    mlp = model.model.layers[2].mlp

    def by_length(module, args, output):
        return output * (1 + 1e-2 * output.shape[1]) if module.down_proj.weight[0, 4] == 0 else output

    mlp.register_forward_hook(by_length)
    zeroed_and_other = [condition(model, "model.layers.2.mlp.down_proj", [at]) for at in (4, 5)]
    measure(model, sequences, zeroed_and_other[1:], batch_size=4)
    measure(model, sequences, zeroed_and_other, batch_size=1)
    with pytest.raises(RunError, match=r"zero of top_obd in .*down_proj the padding .*: --batch-size 1"):
        measure(model, sequences, zeroed_and_other, batch_size=4)


def test_the_keys_of_different_conditions_differ():
    model = build("llama")
    layer, noise = "model.layers.0.mlp.up_proj", Perturbation("gaussian_noise", sigma=2.0)
    conditions = [
        condition(model, layer, [1]),
        condition(model, layer, [1, 2]),
        condition(model, f"{layer}.weight", [1]),
        condition(model, layer, [1], selection="random", seed=0),
        condition(model, layer, [1], selection="random", seed=1),
        condition(model, layer, [1], perturbation=noise),
        condition(model, layer, [1], perturbation=Perturbation("gaussian_noise")),
    ]
    assert len({c.key for c in conditions}) == len(conditions)
