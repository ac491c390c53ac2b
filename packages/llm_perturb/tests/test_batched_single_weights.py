import copy
import re

import pytest
import torch
from bridge.exchange.errors import RunError
from llm_perturb import batched_single_weights
from llm_perturb.batched_single_weights import ONE_BY_ONE, Copies, even_parts, group, linear_maps
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.parameters import layer_of, named_parameters
from llm_perturb.evaluation.perplexity import measure, reference_of, sequence_losses
from llm_perturb.measurement_condition import Condition
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Target
from llm_perturb.sweep import sweep
from reference import every_bit, naive_losses, rewritten, zeroed
from tiny_models import BUILDERS, build
from torch import nn

ZERO = Perturbation("zero")
N_MAPS = {"gpt2": 4, "neox": 4, "llama": 7, "llama_tied": 7}  # linear maps in each of the three layers


def single(model, name, index, perturbation=ZERO, seed=None):
    parameter = named_parameters(model)[name]
    row, col = divmod(index, parameter.shape[1]) if parameter.ndim == 2 else (index, None)
    target = Target(layer_of(name), {name: parameter})
    return Condition(target, "weight", perturbation, 1, seed, torch.tensor([index]), row=row, col=col)


def some_of_every_map(model, perturbation=ZERO, seed=None):
    names = sorted(linear_maps(model))
    return [
        single(model, name, index, perturbation, seed)
        for name in names
        for index in (0, named_parameters(model)[name].numel() // 2 + 1)
    ]


def run(model, sequences, conditions, batch_size=1, units=None, **options):
    baseline = measure(model, sequences, batch_size)
    units = group(model, conditions) if units is None else units
    found = sweep(model, Corpus(sequences, {}), units, baseline.losses, batch_size, **options)
    return {outcome.condition.key: outcome for outcome in found}


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_the_maps_of_every_layer_are_found(family):
    model = build(family)
    maps = linear_maps(model)
    assert len(maps) == 3 * N_MAPS[family]
    assert all(model.get_parameter(name) is module.weight for name, module in maps.items())
    assert not any("embed" in name or "head" in name or "norm" in name or "ln_" in name for name in maps)


@pytest.mark.parametrize("family", sorted(BUILDERS))
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_copy_gives_what_a_model_with_a_zero_in_its_state_dict_gives(family, batch_size, sequences, capsys):
    model = build(family)
    conditions = some_of_every_map(model)
    units = group(model, conditions)
    assert all(isinstance(unit, Copies) for unit in units)
    found = run(model, sequences, conditions, batch_size, units)
    assert len(found) == len(conditions) == 2 * 3 * N_MAPS[family]
    for c in conditions:
        ((name, index),) = c.target.split(c.positions).items()
        expected = naive_losses(zeroed(model, {name: index.tolist()}), sequences)
        torch.testing.assert_close(found[c.key].losses, expected, rtol=1e-11, atol=0)
        assert found[c.key].n_changed == 1
    assert ONE_BY_ONE not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("perturbation", "seed"),
    [
        (Perturbation("sign_flip"), None),
        (Perturbation("scale", factor=3.0), None),
        (Perturbation("bit_flip", bit=61), None),
        (Perturbation("quantize", n_bits=3), None),
        (Perturbation("gaussian_noise"), 4),
    ],
    ids=lambda value: value.kind if isinstance(value, Perturbation) else str(value),
)
def test_every_change_of_a_copy_is_the_change_of_the_weight(family, sequences, perturbation, seed, capsys):
    model = build(family)
    conditions = some_of_every_map(model, perturbation, seed)[::3]
    together = run(model, sequences, conditions)
    assert ONE_BY_ONE not in capsys.readouterr().err
    alone = run(model, sequences, conditions, units=conditions)
    for key, outcome in alone.items():
        torch.testing.assert_close(together[key].losses, outcome.losses, rtol=1e-10, atol=0)
        assert torch.equal(together[key].measured.correct, outcome.measured.correct)
        assert together[key].n_changed == outcome.n_changed
    assert sum(outcome.n_changed for outcome in together.values()) > len(conditions) / 2  # some lie on the grid


def test_the_divergence_of_a_copy_is_that_of_the_changed_model(sequences, capsys):
    model = build("neox")
    conditions = some_of_every_map(model)
    kept = reference_of(model, sequences, 3)
    together = run(model, sequences, conditions, 3, reference=kept)
    assert ONE_BY_ONE not in capsys.readouterr().err
    alone = run(model, sequences, conditions, 3, units=conditions, reference=kept)
    for key, outcome in alone.items():
        assert outcome.measured.divergence.sum() > 1e-9
        torch.testing.assert_close(
            together[key].measured.divergence, outcome.measured.divergence, rtol=1e-8, atol=1e-13
        )


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_the_number_of_copies_changes_nothing(sequences, monkeypatch, at_once, capsys):
    model = build("llama")
    conditions = some_of_every_map(model)
    expected = run(model, sequences, conditions)
    monkeypatch.setattr(batched_single_weights, "AT_ONCE", at_once)
    monkeypatch.setattr(batched_single_weights, "GROUP", 5)
    for key, outcome in run(model, sequences, conditions).items():
        torch.testing.assert_close(outcome.losses, expected[key].losses, rtol=1e-12, atol=0)
    assert ONE_BY_ONE not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_order_of_the_weights_changes_no_bit(batch_size, sequences):
    model = build("neox", torch.float32)
    conditions = some_of_every_map(model)
    forwards, backwards = (run(model, sequences, order, batch_size) for order in (conditions, conditions[::-1]))
    assert all(torch.equal(forwards[key].losses, backwards[key].losses) for key in forwards)


def test_the_groups_are_those_of_the_set_of_weights_whatever_their_order(monkeypatch):
    monkeypatch.setattr(batched_single_weights, "GROUP", 3)
    model = build("llama")
    conditions = some_of_every_map(model)
    orders = conditions, conditions[::-1], conditions[1::2] + conditions[::2]
    groups = [{tuple(c.key for c in unit.conditions) for unit in group(model, order)} for order in orders]
    assert groups[0] == groups[1] == groups[2]
    assert all(list(keys) == sorted(keys) and len(keys) in (2, 3) for keys in groups[0])
    assert all(len({key.split(".")[2] for key in keys}) == 1 for keys in groups[0])  # of one layer
    assert sorted(key for keys in groups[0] for key in keys) == sorted(c.key for c in conditions)


def test_a_group_alone_gives_the_bits_that_it_gives_among_others(sequences):
    """Or what a resumed run measures would depend on what was finished before."""
    model = build("neox", torch.float32)
    conditions = some_of_every_map(model)
    expected = run(model, sequences, conditions)
    for unit in group(model, conditions):
        for key, outcome in run(model, sequences, [], units=[unit]).items():
            assert torch.equal(outcome.losses, expected[key].losses)


def test_the_weights_are_never_touched(sequences):
    model = build("llama")
    before = every_bit(model)
    running = sweep(
        model, Corpus(sequences, {}), group(model, some_of_every_map(model)), sequence_losses(model, sequences)
    )
    next(running)
    running.close()
    assert every_bit(model) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_weight_that_is_zero_already_has_no_effect_and_says_so(sequences):
    model, name = build("llama", torch.float32), "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).data.view(-1)[7] = 0
    conditions = [single(model, name, index) for index in (6, 7, 8)]
    found = run(model, sequences, conditions)
    assert [found[c.key].n_changed for c in conditions] == [1, 0, 1]
    assert torch.equal(found[conditions[1].key].losses, sequence_losses(model, sequences))


def test_a_change_of_nothing_is_the_feature_as_it_is(model):
    for name, index in ((name, 13) for name in linear_maps(model)):
        change = batched_single_weights.change_of(model, single(model, name, index))
        assert change.changes_value
        same = batched_single_weights.unchanged(change)
        assert (same.module, same.feature, same.changes_value) == (change.module, change.feature, False)
        assert (same.weights != change.weights).sum() == 1  # the one that is zero in the change


def test_other_weights_go_the_other_way(sequences):
    model = build("llama_tied")
    named = named_parameters(model)
    names = [name for name in named if name not in linear_maps(model)]
    assert any("norm" in name for name in names)
    conditions = [single(model, name, 1) for name in names]
    assert group(model, conditions) == conditions
    (outcome,) = run(model, sequences, [single(model, "model.norm.weight", 1)]).values()
    expected = naive_losses(zeroed(model, {"model.norm.weight": [1]}), sequences)
    torch.testing.assert_close(outcome.losses, expected, rtol=1e-12, atol=0)


def test_single_weights_are_gathered_among_other_conditions():
    model = build("llama")
    single_weights = some_of_every_map(model)
    other = Condition(single_weights[0].target, "top_obd", ZERO, 2, None, torch.tensor([1, 2]))
    units = group(model, [other, *single_weights])
    assert units[0] is other
    assert sum(len(unit.conditions) for unit in units[1:]) == len(single_weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_changed_in_their_weights(dtype):
    """There the rounding of a copy would be larger than what most weights do."""
    assert linear_maps(build("llama", dtype)) == {}


class Expert(nn.Module):
    """A map that sees only some of the tokens, one that is used twice, one that is not used, and one with a keyword."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.some, self.twice, self.never, self.keyword = (nn.Linear(8, 8).double() for _ in range(4))

    def forward(self, x):
        self.some(x[:, :2])
        self.keyword(input=x)
        return self.inner(x) + self.twice(self.twice(x))


def test_maps_that_do_not_see_each_token_once_are_left_out():
    model = build("llama")
    model.model.layers[1].mlp = Expert(model.model.layers[1].mlp)
    maps = linear_maps(model)
    assert "model.layers.1.mlp.inner.up_proj.weight" in maps
    assert not any(part in name for part in ("some", "twice", "never", "keyword") for name in maps)


def rows_of_tokens():
    """What a map receives of two sequences of six tokens, the first two alike, the rest not."""
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-1.5, 1.5)
    x[0, 5, 7] = -2  # the largest
    x[1, :2] = x[0, :2]
    return x


def test_rows_are_tokens_where_those_in_common_are_alike_and_others_are_not():
    x, rows_are_tokens = rows_of_tokens(), batched_single_weights._rows_are_tokens
    assert rows_are_tokens(x) and rows_are_tokens(x.view(12, 8))
    assert not rows_are_tokens(x.transpose(0, 1))
    assert not rows_are_tokens(x[:, :5]) and not rows_are_tokens(torch.cat([x, x], 1))
    for row in range(2):
        for sign in (1, -1):
            for change, are in ((0.9, True), (1.1, False)):
                other = x.clone()
                other[1, row, 3] += sign * change * 1e-3 * 2
                assert rows_are_tokens(other) is are
    alike = x.clone()
    alike[1] = alike[0]
    assert not rows_are_tokens(alike)
    alike[1, 4, 2] += 1e-9
    assert rows_are_tokens(alike)


def test_a_weight_of_two_modules_is_left_out():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert len(linear_maps(model)) == 3 * N_MAPS["llama"] - 2


# the instrument checks itself


@pytest.mark.slow
def test_a_copy_that_does_not_get_its_change_is_found_out(sequences, monkeypatch, capsys):
    """The change is made to another output feature; the model itself is changed instead, and a line says so."""
    model, real = build("llama"), batched_single_weights.change_of
    conditions = some_of_every_map(model)
    alone = run(model, sequences, conditions, units=conditions)

    def wrong(model, condition):
        change = real(model, condition)
        return batched_single_weights.Change(
            change.module, 1 - min(change.feature, 1), change.weights, change.changes_value
        )

    monkeypatch.setattr("llm_perturb.sweep.change_of", wrong)
    found = run(model, sequences, conditions)
    assert all(torch.equal(found[key].losses, outcome.losses) for key, outcome in alone.items())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(
        re.search("in the model one by one, because .*: model.layers.* in a copy is .* away", li) for li in lines
    )


class MixesBatch(nn.Module):
    """A map whose result depends on how many sequences are run."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * (1 + 0.1 * len(x))


@pytest.mark.slow
def test_copies_that_influence_each_other_are_found_out(sequences, capsys):
    model = build("llama")
    model.model.layers[1].mlp = MixesBatch(model.model.layers[1].mlp)
    conditions = some_of_every_map(model)
    found = run(model, sequences, conditions)
    for key, outcome in run(model, sequences, conditions, units=conditions).items():
        torch.testing.assert_close(found[key].losses, outcome.losses, rtol=1e-11, atol=0)
    assert "because copies of a batch prove wrong" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_which_no_copies_can_be_made_is_changed_itself(sequences, capsys):
    model = build("llama")
    conditions = some_of_every_map(model)
    units = group(model, conditions)

    def fail(module, args):
        if len(args[0]) > 1:
            raise RuntimeError("one sequence\nat a time")

    model.model.layers[2].mlp.register_forward_pre_hook(fail)
    found = run(model, sequences, conditions, units=units)
    for key, outcome in run(model, sequences, conditions, units=conditions).items():
        assert torch.equal(found[key].losses, outcome.losses)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("because copies of a batch prove wrong: RuntimeError: one sequence at a time")


def test_a_baseline_of_another_model_is_no_matter_of_copies(sequences):
    model = build("llama")
    conditions = some_of_every_map(model)
    units, baseline = group(model, conditions), sequence_losses(model, sequences)
    model.model.norm.register_forward_hook(lambda module, inputs, output: output + 1e-2 * output.roll(1, 0))
    with pytest.raises(RunError, match="fails its own check: the unperturbed model at the end changes a loss"):
        list(sweep(model, Corpus(sequences, {}), units, baseline))


class TokensFirst(nn.Module):
    """A part that works on (T, B, H)."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def test_maps_that_see_the_tokens_in_another_order_are_left_out():
    model = build("llama")
    model.model.layers[1].mlp = TokensFirst(model.model.layers[1].mlp)
    assert not any("layers.1.mlp" in name for name in linear_maps(model))
    assert len(linear_maps(model)) == 3 * N_MAPS["llama"] - 3


def test_a_model_that_no_trial_can_be_made_of_has_no_copies(capsys):
    model = build("llama")
    conditions = some_of_every_map(model)
    model.model.norm.register_forward_pre_hook(lambda module, args: 1 / (2 - len(args[0])))
    assert group(model, conditions) == conditions
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("because no two sequences can be run together: ZeroDivisionError: division by zero")


def test_a_target_of_another_model_is_an_error(sequences):
    model = build("llama")
    name = "model.layers.2.mlp.down_proj.weight"
    with pytest.raises(RunError, match="is not the tensor of the model that is measured"):
        run(model, sequences, [], units=[Copies((single(copy.deepcopy(model), name, 3),))])


def test_parts_are_even():
    assert [list(part) for part in even_parts(range(9), 4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [list(part) for part in even_parts(range(4), 4)] == [[0, 1, 2, 3]]
    assert even_parts([], 4) == []


def test_an_overflowing_copy_is_a_result(sequences):
    model, name = build("llama", torch.float32), "model.layers.1.mlp.up_proj.weight"
    theta = model.get_parameter(name).view(-1)[5].item()
    condition = single(model, name, 5, Perturbation("scale", factor=float("inf")))
    (outcome,) = run(model, sequences, [condition]).values()
    assert not outcome.losses.isfinite().any()
    assert not naive_losses(rewritten(model, {name: {5: theta * float("inf")}}), sequences).isfinite().any()


@pytest.mark.parametrize("in_copies", [True, False])
def test_padding_that_matters_only_when_a_weight_is_zero_is_an_error(sequences, in_copies, capsys):
    """Whether the model shows it for a copy as well, or only when it is really changed and copies prove wrong."""
    model = build("llama")
    mlp = model.model.layers[2].mlp
    row, seen = mlp.down_proj.weight[0].clone(), {}
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))

    def by_length(module, args, output):
        changed = (seen["x"] @ row - output[..., 0]).abs().amax(1) > 1e-9  # (B,)
        applies = changed if in_copies else (module.down_proj.weight[0, 4] == 0).expand(len(output))
        return torch.where(applies[:, None, None], output * (1 + 1e-2 * output.shape[1]), output)

    mlp.register_forward_hook(by_length)
    weights = [single(model, "model.layers.2.mlp.down_proj.weight", at) for at in (4, 5)]
    assert isinstance(group(model, weights)[0], Copies)
    run(model, sequences, weights)
    with pytest.raises(RunError, match=r"zero of weight in .*down_proj the padding .*: --batch-size 1"):
        run(model, sequences, weights, batch_size=4)
    assert (ONE_BY_ONE in capsys.readouterr().err) != in_copies
