import copy

import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation import parameters
from tiny_models import build

TIED = {"gpt2": ["transformer.wte.weight"], "llama_tied": ["model.embed_tokens.weight"]}


def test_every_tensor_is_named_once_in_model_order(model):
    named = parameters.named_parameters(model)
    pointers = [parameter.data_ptr() for parameter in named.values()]
    assert len(set(pointers)) == len(pointers)
    assert set(pointers) == {tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert list(named) == [name for name in model.state_dict() if name in named]


@pytest.mark.parametrize("family", sorted(TIED))
def test_a_tied_tensor_goes_by_its_first_name_and_answers_to_the_other(family):
    model = build(family)
    (first,) = TIED[family]
    assert first in parameters.named_parameters(model)
    assert "lm_head.weight" not in parameters.named_parameters(model)
    assert parameters.tied_groups(model) == [[first, "lm_head.weight"]]
    for name in ("lm_head", "lm_head.weight", first, first.removesuffix(".weight")):
        assert parameters.match(model, name) == [first]


def test_an_untied_head_is_a_tensor_of_its_own():
    model = build("llama")
    assert parameters.tied_groups(model) == []
    assert parameters.match(model, "lm_head") == ["lm_head.weight"]
    assert "lm_head.weight" in parameters.match(model, "ALL")


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn"),
        ("neox", "gpt_neox.layers.2.mlp.dense_h_to_4h"),
        ("llama", "model.layers.0.mlp.down_proj"),
    ],
)
def test_a_layer_with_or_without_weight_is_its_matrix_and_nothing_else(family, layer):
    model = build(family)
    assert parameters.match(model, layer) == [f"{layer}.weight"]
    assert parameters.match(model, f"{layer}.weight") == [f"{layer}.weight"]


def test_a_bias_or_a_gain_can_be_named_exactly():
    model = build("gpt2")
    assert parameters.match(model, "transformer.h.0.mlp.c_fc.bias") == ["transformer.h.0.mlp.c_fc.bias"]
    assert parameters.match(model, "transformer.ln_f") == ["transformer.ln_f.weight"]


def test_all_is_every_matrix_once(model):
    expected = [name for name, p in model.named_parameters() if p.ndim >= 2]
    assert parameters.match(model, "ALL") == expected


def test_a_module_prefix_is_every_matrix_below_it_and_stops_at_a_dot():
    model = build("neox")
    prefix = "gpt_neox.layers.1"
    matrices = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    assert parameters.match(model, prefix) == [f"{prefix}.{matrix}.weight" for matrix in matrices]
    with pytest.raises(RequestError, match="names no parameter"):
        parameters.match(model, "gpt_neox.layers.1.ml")


def test_a_pattern_may_speak_of_layers_or_of_parameters():
    model = build("llama")
    down = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    assert parameters.match(model, "model.layers.*.mlp.down_proj") == down
    assert parameters.match(model, "*down_proj.weight") == down
    assert parameters.match(model, "model.layers.[02].mlp.down_proj") == [down[0], down[2]]


@pytest.mark.parametrize(
    "nonsense", ["gpt_neox.layers.99.mlp.dense_h_to_4h", "transformer.h.1.mlp.c_fcc", "", "all", "."]
)
def test_what_names_nothing_is_refused(nonsense):
    with pytest.raises(RequestError, match=r"names no parameter of this GPT2LMHeadModel.*--list-layers"):
        parameters.match(build("gpt2"), nonsense)


def test_the_error_names_the_closest_layers():
    with pytest.raises(RequestError, match=r"closest: .*'transformer\.h\.1\.mlp\.c_fc'"):
        parameters.match(build("gpt2"), "transformer.h.1.mlp.c_fcc")


def test_layer_of_is_the_path_of_the_module():
    assert parameters.layer_of("a.b.weight") == "a.b"
    assert parameters.layer_of("a.b.bias") == "a.b"


def test_scope_matrices_leaves_out_vectors_and_all_leaves_out_nothing(model):
    matrices, everything = parameters.in_scope(model), parameters.in_scope(model, "all")
    assert all(parameter.ndim >= 2 for parameter in matrices.values())
    assert list(everything) == list(parameters.named_parameters(model))
    assert set(everything) - set(matrices) == {n for n, p in parameters.named_parameters(model).items() if p.ndim < 2}


def test_include_and_exclude_work_together_on_names():
    model = build("gpt2")
    chosen = parameters.in_scope(model, include=["transformer.h.*"], exclude=["*.attn.*", "transformer.h.2.*"])
    assert list(chosen) == [f"transformer.h.{i}.mlp.{m}.weight" for i in (0, 1) for m in ("c_fc", "c_proj")]
    by_layer = parameters.in_scope(model, include=["transformer.h.1.mlp.c_fc"])
    assert list(by_layer) == ["transformer.h.1.mlp.c_fc.weight"]
    assert list(parameters.in_scope(model, "all", include=["transformer.ln_f*"])) == [
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ]


def test_a_scope_with_nothing_in_it_is_refused():
    with pytest.raises(RequestError, match="leaves no parameter"):
        parameters.in_scope(build("gpt2"), include=["*.ln_1.weight"])
    with pytest.raises(RequestError, match="leaves no parameter"):
        parameters.in_scope(build("gpt2"), exclude=["*"])


@pytest.mark.parametrize(("family", "transposed"), [("gpt2", True), ("neox", False), ("llama", False)])
def test_orientation_follows_the_module_not_the_shape(family, transposed):
    model = build(family)
    inside = [name for name in parameters.match(model, "ALL") if ".0." in name]
    assert inside
    assert {parameters.stored_transposed(model, name) for name in inside} == {transposed}


def test_conv1d_orientation_is_what_the_forward_pass_does():
    """A unit of the output is a column: zeroing a column (and bias) of c_fc silences exactly one output."""
    layer = copy.deepcopy(build("gpt2").transformer.h[0].mlp.c_fc)
    with torch.no_grad():
        layer.weight[:, 3] = 0
        layer.bias[3] = 0
        silent = (layer(torch.randn(5, 8, dtype=torch.float64)) == 0).all(0)
    assert silent.nonzero().tolist() == [[3]]


def test_the_embedding_of_gpt2_is_not_transposed():
    assert not parameters.stored_transposed(build("gpt2"), "transformer.wte.weight")


def test_the_table_lists_every_parameter_with_its_other_names(model):
    lines = parameters.table(model).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(parameters.named_parameters(model))
    for group in parameters.tied_groups(model):
        assert any(line.startswith(group[0]) and f"also {group[1]}" in line for line in lines)
