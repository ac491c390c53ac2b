import pytest
from bridge.analysis.components import (
    COMPONENTS,
    FusedProjection,
    ModelComponents,
    decoder_part,
    fused_projection,
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
def test_component_and_depth_are_read_from_the_name(parameter, component, depth):
    assert decoder_part(parameter) == (component, depth)
    assert component in COMPONENTS


QUERY_KEY_VALUE = ("attention query", "attention key", "attention value")
C_ATTN = "transformer.h.0.attn.c_attn.weight"
C_ATTN_BIAS = "transformer.h.0.attn.c_attn.bias"
NEOX = "gpt_neox.layers.0.attention.query_key_value.weight"
TWO_HEADS_OF_4 = {
    "model_type": "gpt_neox", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip
GPT2 = TWO_HEADS_OF_4 | {"model_type": "gpt2", "hidden_size": 64, "head_dim": 32}


@pytest.mark.parametrize(
    ("column", "part"), [(0, "query"), (63, "query"), (64, "key"), (127, "key"), (128, "value"), (191, "value")]
)
def test_columns_of_c_attn_are_query_key_value_in_thirds(column, part):
    assert fused_projection(C_ATTN, 64 * 192, GPT2).component(7, column) == f"attention {part}"
    assert fused_projection(C_ATTN_BIAS, 192, GPT2).component(column, None) == f"attention {part}"


@pytest.mark.parametrize(("row", "part"), [(0, "query"), (8, "key"), (23, "value"), (24, "query"), (40, "value")])
def test_rows_of_query_key_value_are_interleaved_by_head(row, part):
    fused = fused_projection(NEOX, 48 * 16, TWO_HEADS_OF_4 | {"hidden_size": 16, "head_dim": 8})
    assert fused.component(row, 3) == f"attention {part}"


@pytest.mark.parametrize(
    ("parameter", "n_weights", "model"),
    [
        (C_ATTN, 64 * 192, {}),
        (C_ATTN, 64 * 192, GPT2 | {"model_type": "not in the table"}),
        (C_ATTN, 100, GPT2),
        ("transformer.h.0.crossattention.c_attn.weight", 64 * 128, GPT2),
        (NEOX, 24 * 8, {"num_attention_heads": 2, "head_dim": 4}),  # as manifests of earlier versions
        (NEOX, 16 * 8, TWO_HEADS_OF_4),
        ("gpt_neox.layers.0.attention.dense.weight", 24 * 8, TWO_HEADS_OF_4),
        ("model.layers.0.mlp.up_proj.weight", 3 * 64 * 64, TWO_HEADS_OF_4),
    ],
)  # fmt: skip
def test_a_projection_whose_order_is_not_known_is_not_taken_apart(parameter, n_weights, model):
    assert fused_projection(parameter, n_weights, model) is None


@pytest.mark.parametrize("bias", [0, 1])
def test_bias_and_weight_of_query_key_value_have_the_same_order(bias):
    name = NEOX.replace("weight", "bias") if bias else NEOX
    assert fused_projection(name, 24 if bias else 24 * 8, TWO_HEADS_OF_4).runs == tuple(
        (component, 4) for component in QUERY_KEY_VALUE
    )


def shares(parameter, n_weights, model, n_rows):
    """The share of rows that each component has."""
    fused = fused_projection(parameter, n_weights, model)
    parts = [fused.component(row, 0) for row in range(n_rows)]
    return [parts.count(component) / n_rows for component in QUERY_KEY_VALUE]


def test_grouped_queries_have_a_larger_share_than_keys_and_values():
    """Falcon: eight query heads of 4 in two groups; GPT-BigCode: two query heads, one key, one value."""
    falcon = {
        "model_type": "falcon", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4,
    }  # fmt: skip
    name = "transformer.h.0.self_attention.query_key_value.weight"
    assert shares(name, 48 * 32, falcon, 48) == [2 / 3, 1 / 6, 1 / 6]
    bigcode = TWO_HEADS_OF_4 | {"model_type": "gpt_bigcode", "num_key_value_heads": 1}
    assert shares(C_ATTN, 16 * 8, bigcode, 16) == [0.5, 0.25, 0.25]


def test_runs_may_have_different_lengths_and_begin_again():
    """Two groups of three queries that share a key and a value, heads of 2."""
    fused = FusedProjection(axis=0, runs=(("attention query", 6), ("attention key", 2), ("attention value", 2)))
    rows = [fused.component(row, 0).removeprefix("attention ")[0] for row in range(20)]
    assert "".join(rows) == "qqqqqqkkvv" * 2
    assert fused.components == QUERY_KEY_VALUE


def test_gate_and_up_projection_may_be_taken_apart_too():
    fused = FusedProjection(axis=0, runs=(("mlp gate", 10), ("mlp in", 10)))
    assert [fused.component(row, 0) for row in (0, 9, 10, 19)] == ["mlp gate", "mlp gate", "mlp in", "mlp in"]


def test_the_components_of_a_model_are_taken_apart_where_that_is_possible():
    mlp = "transformer.h.0.mlp.c_fc.weight"
    gpt2 = ModelComponents({C_ATTN: 3 * 64 * 64, mlp: 7}, GPT2)
    assert gpt2.of_parameter(C_ATTN) == QUERY_KEY_VALUE
    assert gpt2.of_parameter(mlp) == ("mlp in",)
    assert gpt2.of_weight(C_ATTN, 0, 70) == "attention key"
    assert gpt2.of_weight(mlp, 0, 70) == "mlp in"
    neox = ModelComponents({NEOX: 24 * 8}, TWO_HEADS_OF_4)
    assert neox.of_weight(NEOX, 5, 0) == "attention key"
    assert neox.of_parameter(NEOX) == QUERY_KEY_VALUE


def test_the_components_stay_fused_where_their_order_is_not_known():
    unknown = ModelComponents({NEOX: 24 * 8}, {})
    assert unknown.of_parameter(NEOX) == ("attention query_key_value",)
    assert unknown.of_weight(NEOX, 5, 0) == "attention query_key_value"
