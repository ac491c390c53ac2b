import pandas as pd
import pytest
from critical_weight_analysis.plots import (
    OUTSIDE,
    component_and_layer,
    count_grid,
    plot_heat_map,
    plot_scores_by_rank,
)


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ("gpt_neox.layers.5.mlp.dense_h_to_4h.weight", ("mlp.dense_h_to_4h.weight", 5)),
        ("transformer.h.11.attn.c_attn.weight", ("attn.c_attn.weight", 11)),
        ("model.layers.2.mlp.experts.7.w1.weight", ("mlp.experts.7.w1.weight", 2)),
        ("lm_head.weight", ("lm_head.weight", None)),
    ],
)
def test_component_and_layer(parameter, expected):
    assert component_and_layer(parameter) == expected


@pytest.fixture
def summary():
    names = ["embed.weight", "h.0.a.weight", "h.0.b.weight", "h.1.a.weight", "h.10.a.weight"]
    return pd.DataFrame({"parameter": names, "in_top_9": [1, 2, 0, 3, 3]})


def test_grid_has_components_by_layers_and_holes_where_there_is_none(summary):
    grid = count_grid(summary, "in_top_9")
    assert list(grid.index) == ["embed.weight", "a.weight", "b.weight"]
    assert list(grid.columns) == [OUTSIDE, 0, 1, 10]
    assert grid.fillna(-1).to_numpy().tolist() == [[1, -1, -1, -1], [-1, 2, 3, 3], [-1, 0, -1, -1]]


def test_pictures_are_written(summary, tmp_path):
    tops = {"grad_x_weight": pd.DataFrame({"rank": [1, 2], "score": [3.0, 0.0]})}
    tops["magnitude"] = pd.DataFrame({"rank": [1, 2], "score": [0.0, 0.0]})  # nothing to draw on log axes
    plot_heat_map(summary, 9, "grad_x_weight", tmp_path / "heat.png")
    plot_scores_by_rank(tops, tmp_path / "rank.png")
    for name in ("heat.png", "rank.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
