import pytest
from bridge.analysis.components import (
    COMPONENTS,
    Layout,
    component_of_weight,
    conv1d_qkv_shape,
    interleaved_head_dim,
    place_of,
    relative_depth,
)


@pytest.mark.parametrize(
    ("parameter", "component", "depth"),
    [
        ("transformer.wte.weight", "embedding", None),
        ("transformer.wpe.weight", "embedding", None),
        ("transformer.h.3.ln_1.weight", "norm", 3),
        ("transformer.h.3.attn.c_attn.bias", "attention query_key_value", 3),
        ("transformer.h.3.attn.c_proj.weight", "attention output", 3),
        ("transformer.h.10.mlp.c_fc.weight", "mlp in", 10),
        ("transformer.h.10.mlp.c_proj.weight", "mlp out", 10),
        ("transformer.ln_f.weight", "norm", None),
        ("gpt_neox.embed_in.weight", "embedding", None),
        ("gpt_neox.layers.5.attention.query_key_value.weight", "attention query_key_value", 5),
        ("gpt_neox.layers.5.attention.dense.weight", "attention output", 5),
        ("gpt_neox.layers.5.mlp.dense_h_to_4h.weight", "mlp in", 5),
        ("gpt_neox.layers.5.mlp.dense_4h_to_h.weight", "mlp out", 5),
        ("gpt_neox.layers.5.post_attention_layernorm.bias", "norm", 5),
        ("gpt_neox.final_layer_norm.weight", "norm", None),
        ("embed_out.weight", "head", None),
        ("model.embed_tokens.weight", "embedding", None),
        ("model.layers.11.self_attn.q_proj.weight", "attention query", 11),
        ("model.layers.11.self_attn.k_proj.weight", "attention key", 11),
        ("model.layers.11.self_attn.v_proj.bias", "attention value", 11),
        ("model.layers.11.self_attn.o_proj.weight", "attention output", 11),
        ("model.layers.11.self_attn.q_norm.weight", "norm", 11),
        ("model.layers.11.mlp.gate_proj.weight", "mlp gate", 11),
        ("model.layers.11.mlp.up_proj.weight", "mlp in", 11),
        ("model.layers.11.mlp.down_proj", "mlp out", 11),
        ("model.layers.1.input_layernorm.weight", "norm", 1),
        ("model.norm.weight", "norm", None),
        ("lm_head.weight", "head", None),
        ("model.decoder.layers.0.self_attn.out_proj.weight", "attention output", 0),
        ("model.decoder.layers.0.fc1.weight", "mlp in", 0),
        ("model.decoder.layers.0.fc2.bias", "mlp out", 0),
        ("model.decoder.embed_positions.weight", "embedding", None),
        ("model.layers.3.block_sparse_moe.gate.weight", "other", 3),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "mlp out", 3),
        ("something.else", "other", None),
    ],
)
def test_place_is_read_from_the_name(parameter, component, depth):
    assert place_of(parameter) == (component, depth)
    assert component in COMPONENTS


@pytest.mark.parametrize(
    ("column", "part"), [(0, "query"), (63, "query"), (64, "key"), (127, "key"), (128, "value"), (191, "value")]
)
def test_columns_of_c_attn_are_query_key_value_in_thirds(column, part):
    name = "transformer.h.0.attn.c_attn.weight"
    assert component_of_weight(name, 7, column, shape=(64, 192)) == f"attention {part}"
    assert component_of_weight("transformer.h.0.attn.c_attn.bias", column, shape=(192,)) == f"attention {part}"


@pytest.mark.parametrize(("row", "part"), [(0, "query"), (8, "key"), (23, "value"), (24, "query"), (40, "value")])
def test_rows_of_query_key_value_are_interleaved_by_head(row, part):
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert component_of_weight(name, row, 3, head_dim=8) == f"attention {part}"


@pytest.mark.parametrize(
    ("parameter", "n_weights", "model", "head_dim"),
    [
        ("gpt_neox.layers.0.attention.query_key_value.weight", 24 * 8, {"num_attention_heads": 2, "head_dim": 4}, 4),
        ("gpt_neox.layers.0.attention.query_key_value.bias", 24, {"num_attention_heads": 2, "head_dim": 4}, 4),
        ("gpt_neox.layers.0.attention.query_key_value.weight", 24 * 8, {}, None),
        # 71 heads of query, one of key and one of value
        ("transformer.h.0.self_attention.query_key_value.weight", 4672 * 4544,
         {"num_attention_heads": 71, "head_dim": 64}, None),
        ("gpt_neox.layers.0.attention.dense.weight", 24 * 8, {"num_attention_heads": 2, "head_dim": 4}, None),
    ],
)  # fmt: skip
def test_head_dim_of_an_interleaved_projection(parameter, n_weights, model, head_dim):
    assert interleaved_head_dim(parameter, n_weights, model) == head_dim


def test_gate_and_up_of_a_fused_projection():
    name = "model.layers.0.mlp.gate_up_proj.weight"
    assert component_of_weight(name, 9, 0, shape=(20, 8)) == "mlp gate"
    assert component_of_weight(name, 10, 0, shape=(20, 8)) == "mlp in"


@pytest.mark.parametrize(
    "name", ["transformer.h.0.attn.c_attn.weight", "gpt_neox.layers.0.attention.query_key_value.weight"]
)
def test_without_the_fact_a_fused_weight_stays_fused(name):
    assert component_of_weight(name, 5, 5) == "attention query_key_value"


def test_shape_of_c_attn_follows_from_its_size():
    assert conv1d_qkv_shape("transformer.h.0.attn.c_attn.weight", 3 * 64 * 64) == (64, 192)
    assert conv1d_qkv_shape("transformer.h.0.attn.c_attn.bias", 192) == (192,)
    assert conv1d_qkv_shape("transformer.h.0.attn.c_attn.weight", 100) is None
    assert conv1d_qkv_shape("model.layers.0.mlp.up_proj.weight", 3 * 64 * 64) is None


def test_relative_depth_is_the_middle_of_the_layer():
    assert [relative_depth(d, 4) for d in range(4)] == [0.125, 0.375, 0.625, 0.875]


def test_layout_takes_apart_what_it_can():
    names = ["transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"]
    gpt2 = Layout({names[0]: 3 * 64 * 64, names[1]: 7}, {})
    assert gpt2.components(names[0]) == ("attention query", "attention key", "attention value")
    assert gpt2.components(names[1]) == ("mlp in",)
    assert gpt2.component(names[0], 0, 70) == "attention key"
    name = "gpt_neox.layers.5.attention.query_key_value.weight"
    neox = Layout({name: 24 * 8}, {"num_attention_heads": 2, "head_dim": 4})
    assert neox.component(name, 5, 0) == "attention key"
    assert neox.components(name) == gpt2.components(names[0])
    unknown = Layout({name: 24 * 8}, {})
    assert (unknown.components(name), unknown.component(name, 5, 0)) == (
        ("attention query_key_value",),
        "attention query_key_value",
    )
