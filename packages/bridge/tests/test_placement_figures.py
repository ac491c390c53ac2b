from dataclasses import replace

import pandas as pd
import pytest
import synthetic
from bridge.report.placement_figures import compared_profiles, component_counts, where_top_weights_sit
from pixels import assert_drawn, assert_drawn_in_both_themes


@pytest.fixture(scope="module")
def example():
    return synthetic.evidence(n=4)


def test_the_figure_is_drawn_in_both_themes(tmp_path, example):
    assert_drawn_in_both_themes(where_top_weights_sit, example, tmp_path / "figure.png")


def test_no_weights_are_no_file(tmp_path, example):
    empty = dict.fromkeys(example.top_weights, synthetic.top_weights().head(0))
    for top_weights in ({}, empty):
        assert where_top_weights_sit(replace(example, top_weights=top_weights), tmp_path / "figure.png") is None
    assert list(tmp_path.iterdir()) == []


def test_weights_of_a_fused_projection_are_counted_in_their_parts():
    name = "gpt_neox.layers.2.attention.query_key_value.weight"
    top = pd.DataFrame({"parameter": [name] * 3, "row": [0, 5, 13], "col": 0})  # two heads of 4
    summary = pd.DataFrame({"parameter": [name, "gpt_neox.embed_in.weight"], "n_weights": [24 * 8, 10]})
    model = {
        "model_type": "gpt_neox", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    }  # fmt: skip
    counts = component_counts(top, summary, model)
    assert counts[2].to_dict() == {
        "attention key": 1, "attention query": 2, "attention value": 0, "embedding": 0,
    }  # fmt: skip
    assert counts.loc["embedding", -1] == 0
    assert component_counts(top, summary, {}).loc["attention query_key_value", 2] == 3


def test_profiles_of_several_models_are_drawn(tmp_path):
    profiles = {
        name: pd.DataFrame({"depth 1 of 2": [0.3, share], "depth 2 of 2": [0.7 - share, 0.0]}, index=["mlp in", "head"])
        for name, share in [("one", 0.1), ("$two", 0.5)]
    }
    assert_drawn(compared_profiles(profiles, "obd", tmp_path / "figure.png"))
