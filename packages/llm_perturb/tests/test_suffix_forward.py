import copy

import pytest
import torch
from llm_perturb.batched_single_weights import group
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.decoder import Decoder
from llm_perturb.evaluation.parameters import layer_of, named_parameters
from llm_perturb.evaluation.perplexity import sequence_losses
from llm_perturb.measurement_condition import Condition
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Target
from llm_perturb.suffix_forward import SuffixForward
from llm_perturb.sweep import sweep
from reference import naive_losses, zeroed
from tiny_models import BUILDERS, build
from tiny_models.further_families import shared_key_values
from torch import nn

N_LAYERS = 3


def layers_of(model):
    return list(Decoder.of(model).layers.values())


def perturb_from(model, depth):
    """Change every tensor of the layers from ``depth`` on, and what comes after them."""
    generator = torch.Generator().manual_seed(depth)
    changed = 0
    for name, parameter in named_parameters(model).items():
        inside = any(parameter is p for layer in layers_of(model)[depth:] for p in layer.parameters())
        after = name.endswith(("ln_f.weight", "final_layer_norm.bias", "model.norm.weight"))
        if inside or after:
            changed += 1
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    assert changed > 4


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("boundary", range(N_LAYERS))
def test_losses_have_the_bits_of_a_full_pass(model, sequences, boundary, batch_size):
    suffix = SuffixForward(model, sequences, batch_size)
    suffix.move_to(boundary)
    assert torch.equal(suffix.losses(), sequence_losses(model, sequences, batch_size))
    for depth in range(N_LAYERS - 1, boundary - 1, -1):
        perturb_from(model, depth)
        found = suffix.losses()
        assert torch.equal(found, sequence_losses(model, sequences, batch_size))
        torch.testing.assert_close(found, naive_losses(model, sequences), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_bits_agree_in_narrow_models_too(sequences, dtype, batch_size):
    model = build("gpt2", dtype)
    suffix = SuffixForward(model, sequences, batch_size)
    for boundary in (1, 2):
        suffix.move_to(boundary)
        assert torch.equal(suffix.losses(), sequence_losses(model, sequences, batch_size))


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_the_layers_before_the_boundary_do_not_run(family, sequences):
    model = build(family)
    runs = [0] * N_LAYERS

    def count(number):
        def hook(module, inputs, output):
            runs[number] += 1

        return hook

    for number, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_hook(count(number))
    sequence_losses(model, sequences)  # whatever the model is asked only once is asked here
    suffix = SuffixForward(model, sequences)
    suffix.move_to(2)
    runs[:] = [0] * N_LAYERS
    suffix.losses()
    assert runs == [0, 0, len(sequences)]


def test_weights_before_the_boundary_no_longer_matter(sequences):
    """The other side of the bargain: what is kept is really used."""
    model = build("neox")
    suffix = SuffixForward(model, sequences)
    suffix.move_to(2)
    before = suffix.losses()
    model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight.data.add_(1.0)
    assert torch.equal(suffix.losses(), before)
    assert not torch.equal(sequence_losses(model, sequences), before)


@pytest.mark.parametrize("way", [[2, 1, 2], [1, 2, 0, 1], [2, 0, 2], [1, 1], [0, 2, 2, 1, 0]])
def test_the_boundary_moves_forth_and_back(model, sequences, way):
    expected = sequence_losses(model, sequences, 3)
    suffix = SuffixForward(model, sequences, 3)
    for boundary in way:
        suffix.move_to(boundary)
        assert suffix.boundary == boundary
        assert torch.equal(suffix.losses(), expected)


def test_moving_back_forgets_what_was_kept(sequences):
    model = build("llama")
    suffix = SuffixForward(model, sequences)
    suffix.move_to(2)
    model.model.layers[0].mlp.down_proj.weight.data.add_(1.0)
    for boundary in (1, 0):
        suffix.move_to(boundary)
        assert torch.equal(suffix.losses(), sequence_losses(model, sequences))


@pytest.mark.parametrize("boundary", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_model_that_nothing_has_measured_yet_can_begin_at_a_layer(sequences, boundary, batch_size):
    suffix = SuffixForward(build("llama"), sequences, batch_size)
    suffix.move_to(boundary)
    torch.testing.assert_close(suffix.losses(), naive_losses(build("llama"), sequences), rtol=1e-12, atol=0)


def is_clean(model):
    return all("forward" not in vars(layer) and not layer._forward_hooks for layer in layers_of(model))


def test_the_layers_are_as_before_afterwards(model, sequences):
    suffix = SuffixForward(model, sequences)
    suffix.move_to(2)
    assert is_clean(model)
    suffix.losses()
    assert is_clean(model)
    assert torch.equal(sequence_losses(model, sequences), sequence_losses(copy.deepcopy(model), sequences))


def test_the_layers_are_as_before_after_an_exception(sequences):
    model = build("llama")
    sequence_losses(model, sequences)
    suffix = SuffixForward(model, sequences)
    suffix.move_to(1)

    def fail(module, inputs):
        raise KeyboardInterrupt("in the norm")

    handle = model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt, match="in the norm"):
        suffix.losses()
    assert is_clean(model)
    handle.remove()
    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt, match="in the norm"):
        suffix.move_to(2)
    assert is_clean(model)
    handle.remove()
    assert torch.equal(suffix.losses(), sequence_losses(model, sequences))


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_depth_is_the_first_layer_that_holds_one_of_the_parameters(family, sequences):
    model = build(family)
    path, layers = Decoder.of(model).path, layers_of(model)
    suffix = SuffixForward(model, sequences)
    names = {
        number: f"{path}.{number}.{next(iter(dict(layer.named_parameters())))}" for number, layer in enumerate(layers)
    }
    assert [suffix.depth_of([names[number]]) for number in range(N_LAYERS)] == [0, 1, 2]
    assert suffix.depth_of([names[2], names[1]]) == 1
    embedding = next(iter(named_parameters(model)))
    assert suffix.depth_of([embedding]) == 0
    assert suffix.depth_of([names[2], embedding]) == 0


def test_a_tenth_layer_is_not_the_first(sequences):
    suffix = SuffixForward(build("llama"), sequences)
    assert suffix.depth_of(["model.layers.12.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]) == 2
    assert suffix.depth_of(["model.layers.12.mlp.up_proj.weight"]) == 12


class NoList(nn.Module):
    """Layers that can be indexed, but are no list of modules."""

    def __init__(self, layers):
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    def __getitem__(self, index):
        return list(self.children())[index]


def test_a_model_without_a_list_of_layers_runs_whole(sequences):
    model = build("llama")
    model.model.layers = NoList(model.model.layers)
    assert Decoder.of(model) is None
    suffix = SuffixForward(model, sequences, 3)
    assert suffix.depth_of(["model.layers.2.mlp.up_proj.weight"]) == 0
    assert torch.equal(suffix.losses(), sequence_losses(model, sequences, 3))


AFTER = {
    "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    "neox": {
        "gpt_neox.final_layer_norm.weight",
        "gpt_neox.final_layer_norm.bias",
        "embed_out.weight",
        "lm_head.weight",
    },
    "llama": {"model.norm.weight", "lm_head.weight"},
    "llama_tied": {"model.norm.weight"},
}


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_what_comes_after_all_layers_needs_none_of_them(family, sequences):
    """But not a head that is the embedding too, nor one that has been called before the layers."""
    model = build(family)
    suffix = SuffixForward(model, sequences, 3)
    named = named_parameters(model)
    after = {name for name in named if suffix.depth_of([name]) == N_LAYERS}
    assert after == AFTER[family] & named.keys()
    assert suffix.depth_of([*after, next(name for name in named if ".2." in name)]) == 2
    suffix.move_to(N_LAYERS)
    assert torch.equal(suffix.losses(), sequence_losses(model, sequences, 3))
    for name in after:
        named[name].data.mul_(1.5)
        assert torch.equal(suffix.losses(), sequence_losses(model, sequences, 3))
        torch.testing.assert_close(suffix.losses(), naive_losses(model, sequences), rtol=1e-12, atol=0)
    assert is_clean(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


# models that are not built as their list of layers looks


class Sharing(nn.Module):
    """A layer that also takes something of another one, by way of a dictionary that each pass begins anew."""

    def __init__(self, layer, number, shared):
        super().__init__()
        self.layer, self.number, self.shared = layer, number, shared

    def forward(self, hidden, *args, **kwargs):
        if self.number == 0:
            self.shared["hidden"] = hidden
        if self.number == 2:
            hidden = hidden + self.shared["hidden"]
        return self.layer(hidden, *args, **kwargs)


def sharing(new_for_each_pass):
    model, shared = build("llama"), {}
    model.model.layers = nn.ModuleList([Sharing(layer, n, shared) for n, layer in enumerate(model.model.layers)])
    if new_for_each_pass:
        model.model.embed_tokens.register_forward_hook(lambda *_: shared.clear())
    return model


class Reversed(nn.ModuleList):
    """A list of layers that is run from its end."""

    def __getitem__(self, index):
        chosen = super().__getitem__(index)
        return list(chosen)[::-1] if isinstance(index, slice) else chosen


def sweep_of(model, sequences):
    """Each layer's first matrix, one weight and many, against the state dict."""
    path, layers = Decoder.of(model).path, layers_of(model)
    named, conditions = named_parameters(model), []
    for number in range(len(layers)):
        name = next(n for n in named if n.startswith(f"{path}.{number}.") and named[n].ndim == 2)
        target = Target(layer_of(name), {name: named[name]})
        for positions, selection in (([5], "weight"), ([0, 3, 7], "random")):
            conditions.append(
                Condition(target, selection, Perturbation("zero"), len(positions), 0, torch.tensor(positions))
            )
    baseline = sequence_losses(model, sequences)
    outcomes = list(sweep(model, Corpus(sequences, {}), group(model, conditions), baseline))
    assert len(outcomes) == 2 * len(layers)
    for outcome in outcomes:
        parts = outcome.condition.target.split(outcome.condition.positions)
        expected = naive_losses(zeroed(model, {name: index.tolist() for name, index in parts.items()}), sequences)
        torch.testing.assert_close(outcome.losses, expected, rtol=1e-11, atol=0)


FULL = "every measurement is a full forward pass, because none can begin at a layer: "


@pytest.mark.parametrize("reason", ["KeyError: 'hidden'", "the unperturbed model gives other losses from there on"])
def test_states_that_layers_share_are_right_in_full_passes(sequences, reason, capsys):
    """An error where the state is gone, another loss where it is that of another batch."""
    sequences = [sequence[:5] for sequence in sequences if len(sequence) >= 5]
    sweep_of(sharing(new_for_each_pass="KeyError" in reason), sequences)
    assert capsys.readouterr().err.splitlines() == [FULL + reason]


@pytest.mark.slow
def test_keys_and_values_that_layers_share(sequences, capsys):
    sweep_of(shared_key_values(), sequences)
    assert capsys.readouterr().err.startswith(FULL)


def test_layers_that_run_in_another_order_are_run_whole(sequences, capsys):
    model = build("llama")
    model.model.layers = Reversed(model.model.layers)
    sweep_of(model, sequences)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == FULL + "RuntimeError: the layers are not called in the order of their list, each once"


def test_a_layer_that_cannot_be_left_out_is_said_once(sequences, capsys):
    model = sharing(new_for_each_pass=True)
    suffix = SuffixForward(model, sequences)
    for boundary in (2, 1, 2):
        suffix.move_to(boundary)
        if not suffix.is_exact(0, sequence_losses(model, sequences)):
            suffix.give_up("it does not work")
    assert suffix.boundary == 0
    assert capsys.readouterr().err.splitlines() == [FULL + "it does not work"]
    assert torch.equal(suffix.losses(), sequence_losses(model, sequences))


def test_another_list_of_modules_is_not_taken_for_the_layers():
    model = build("llama")
    model.extra = nn.ModuleList([nn.Identity() for _ in range(N_LAYERS)])
    assert Decoder.of(model).path == "model.layers"
    model.extra = nn.ModuleList([nn.Linear(1000, 100)])  # more parameters, but not as many modules as layers
    assert Decoder.of(model).path == "model.layers"
