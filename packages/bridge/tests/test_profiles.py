import numpy as np
import pandas as pd
import pytest
import reference
import synthetic
from bridge.analysis.components import COMPONENTS
from bridge.analysis.profiles import (
    DEPTHS,
    profile_correlation,
    profile_cosine,
    profile_margins,
    relative_depth,
    score_profiles,
    top_weight_profiles,
)

TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
NEOX = TWO_HEADS | {"model_type": "gpt_neox", "hidden_size": 16, "head_dim": 8}
GPT2 = TWO_HEADS | {"model_type": "gpt2", "hidden_size": 64, "head_dim": 32}


def test_depths_are_five_parts_and_what_is_outside():
    parts = ("depth 1 of 5", "depth 2 of 5", "depth 3 of 5", "depth 4 of 5", "depth 5 of 5")
    assert list(DEPTHS) == [*parts, "outside"]


def test_relative_depth_is_the_middle_of_the_layer():
    assert [relative_depth(depth, 4) for depth in range(4)] == [0.125, 0.375, 0.625, 0.875]


def test_depth_is_relative():
    top = pd.DataFrame({"rank": [1, 2], "parameter": ["model.layers.3.mlp.up_proj.weight"] * 2, "row": 0, "col": 0})
    shallow, deep = top_weight_profiles([top, top], [synthetic.summary(4), synthetic.summary(40)], [{}, {}])
    assert shallow.loc["mlp in", "depth 5 of 5"] == 1
    assert deep.loc["mlp in", "depth 1 of 5"] == 1


def test_without_weights_every_share_is_zero():
    (profile,) = top_weight_profiles([synthetic.top_weights(k=1)[:0]], [synthetic.summary(2)], [{}])
    assert (profile == 0).all().all()


def test_fused_projections_make_one_component_for_all_models():
    llama = pd.DataFrame({"parameter": ["model.layers.0.self_attn.q_proj.weight"], "row": 0, "col": 0})
    neox = pd.DataFrame({"parameter": ["gpt_neox.layers.0.attention.query_key_value.weight"], "row": 0, "col": 0})
    summaries = [
        synthetic.summary(2),
        pd.DataFrame({"parameter": neox["parameter"], "n_weights": [12], "score_sum": [1.0]}),
    ]
    profiles = top_weight_profiles([llama, neox], summaries, [{}, {}])
    assert [profile.loc["attention query_key_value"].sum() for profile in profiles] == [1, 1]
    mixed = pd.concat([neox, neox.assign(parameter="gpt_neox.layers.0.attention.dense.weight")])
    of_mixed = top_weight_profiles([llama, mixed], [summaries[0], summaries[1]], [{}, {}])
    assert of_mixed[0].loc["attention query_key_value"].sum() == 1
    assert of_mixed[1].loc[["attention query_key_value", "attention output"]].sum(axis=1).tolist() == [0.5, 0.5]
    alone = top_weight_profiles([llama, llama], [summaries[0]] * 2, [{}, {}])[0]
    assert alone.loc["attention query"].sum() == 1


def test_neox_projections_are_told_apart_by_the_heads_of_the_model():
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    top = pd.DataFrame({"parameter": [name] * 4, "row": [0, 9, 47, 24], "col": 0})  # two heads of 8
    summary = pd.DataFrame({"parameter": [name], "n_weights": [48 * 16], "score_sum": [1.0]})
    profile = top_weight_profiles([top], [summary], [NEOX])[0].sum(axis=1)
    assert profile[["attention query", "attention key", "attention value"]].tolist() == [0.5, 0.25, 0.25]
    assert top_weight_profiles([top], [summary], [{}])[0].loc["attention query_key_value"].sum() == 1


def test_gpt2_projections_are_told_apart_by_column():
    name = "transformer.h.0.attn.c_attn.weight"
    top = pd.DataFrame({"parameter": [name] * 4, "row": 0, "col": [0, 64, 128, 191]})
    summary = pd.DataFrame({"parameter": [name], "n_weights": [3 * 64 * 64], "score_sum": [1.0]})
    profile = top_weight_profiles([top], [summary], [GPT2])[0].sum(axis=1)
    assert profile[["attention query", "attention key", "attention value"]].tolist() == [0.25, 0.25, 0.5]


def test_profiles_without_a_common_cell_have_cosine_zero():
    first, second = (pd.DataFrame(np.eye(2)), pd.DataFrame(1 - np.eye(2)))
    assert profile_cosine(first, second) == 0


def test_correlation_is_over_the_cells_that_both_have():
    first, second = score_profiles([synthetic.summary(15, seed=1), synthetic.summary(10, seed=2)])
    both = (first.notna() & second.notna()).to_numpy()
    rho, n_cells = profile_correlation(first, second)
    assert n_cells == both.sum() == 26
    assert rho == pytest.approx(reference.spearman(first.to_numpy()[both], second.to_numpy()[both]))
    assert np.isnan(profile_correlation(first.iloc[:0], second.iloc[:0])[0])


def test_every_profile_has_all_components_and_all_depths_in_one_order():
    summary = synthetic.summary(2)
    for profile in [*top_weight_profiles([synthetic.top_weights(2)], [summary], [{}]), *score_profiles([summary])]:
        assert (tuple(profile.index), tuple(profile.columns)) == (tuple(COMPONENTS), DEPTHS)


@pytest.mark.parametrize("constant", [0, 1])
def test_a_profile_of_equal_cells_has_no_correlation(constant):
    profiles = [pd.DataFrame([[0.1, 0.4, 0.2, 0.3]])] * 2
    profiles[constant] = pd.DataFrame([[0.25] * 4])
    rho, n_cells = profile_correlation(*profiles)
    assert np.isnan(rho) and n_cells == 4


def test_cells_that_range_from_zero_to_one_have_a_correlation():
    first, second = pd.DataFrame([[0.0, 1.0, 0.2, 0.3]]), pd.DataFrame([[0.0, 0.5, 1.0, 0.7]])
    assert profile_correlation(first, second) == (pytest.approx(0.2), 4)


def test_cells_that_one_of_the_models_lacks_do_not_count():
    first = pd.DataFrame([[0.1, np.nan, 0.4, 0.2, 0.3, 0.6]])
    second = pd.DataFrame([[0.2, 0.9, np.nan, 0.1, 0.3, 0.4]])
    assert profile_correlation(first, second) == (pytest.approx(0.8), 4)
    assert np.isnan(profile_correlation(first.iloc[:, :5], second.iloc[:, :5]).rho)


def test_scores_that_are_all_zero_have_no_shares():
    (profile,) = score_profiles([synthetic.summary(2).assign(score_sum=0.0)])
    assert np.nansum(profile) == 0


def test_shares_of_the_score_in_each_cell():
    summary = pd.DataFrame(
        {
            "parameter": [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 0, 1)] + ["model.norm.weight"],
            "score_sum": [1.0, 2.0, 4.0, 1.0],
        }
    )
    profiles = score_profiles([summary, summary.assign(score_sum=summary["score_sum"] / 16)])
    cells = {("mlp in", "depth 2 of 5"): 3 / 8, ("mlp in", "depth 4 of 5"): 4 / 8, ("norm", "outside"): 1 / 8}
    assert [profile.stack().dropna().to_dict() for profile in profiles] == [cells] * 2


def test_cosine_is_the_product_over_the_norms():
    first, second = pd.DataFrame([[3.0, 0.0], [0.0, 4.0]]), pd.DataFrame([[2.0, 0.0], [0.0, 0.0]])
    assert profile_cosine(first, second) == 3 / 5
    assert profile_cosine(first, first) == 1
    assert np.isnan(profile_cosine(first, 0 * second))


def test_margins_are_the_components_and_then_the_depths():
    profile = pd.DataFrame([[0.5, 0.25], [0.0, 0.25]], index=["norm", "head"], columns=["depth 1", "outside"])
    shares = {"share norm": 0.75, "share head": 0.25, "share depth 1": 0.5, "share outside": 0.5}
    assert list(profile_margins(profile).items()) == list(shares.items())
