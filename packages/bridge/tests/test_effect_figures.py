import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.correlation import correlate
from bridge.report.effect_figures import ablation, effect_by_layer, predicted_and_measured, single_weights
from bridge.report.figure_style import DARK, LIGHT
from bridge.report.placement_figures import _place_counts, where_top_weights_sit
from matplotlib.image import imread

METRICS = ("grad_x_weight", "magnitude")


@pytest.fixture(scope="module")
def measurements():
    return synthetic.measurements(n=4, metrics=METRICS, ks=(1, 100))


def assert_drawn(path):
    pixels = imread(path)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 700
    assert len(np.unique(pixels[..., :3].sum(axis=2))) > 20


def figures(measurements, folder, theme):
    sampled = synthetic.sampled(metrics=METRICS)
    weights = synthetic.with_single_weights(measurements, sampled)
    top = {metric: synthetic.top_weights() for metric in METRICS}
    summaries = {metric: synthetic.summary() for metric in METRICS}
    return [
        predicted_and_measured(measurements, correlate(measurements), folder / "predicted.png", theme),
        effect_by_layer(measurements, folder / "layers.png", theme),
        ablation(measurements, folder / "ablation.png", theme),
        single_weights(weights, sampled, correlate(weights, sampled=sampled), folder / "weights.png", theme),
        where_top_weights_sit(top, summaries, {}, folder / "where.png", theme),
    ]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_figure_is_drawn(tmp_path, measurements, theme):
    for path in figures(measurements, tmp_path, theme):
        assert_drawn(path)
        background = imread(path)[0, 0, :3]
        assert background.mean() > 0.9 if theme is LIGHT else background.mean() < 0.2


def test_the_same_data_give_the_same_bytes(tmp_path, measurements):
    first, second = (effect_by_layer(measurements, tmp_path / name) for name in ("1.png", "2.png"))
    assert first.read_bytes() == second.read_bytes()


def test_nothing_to_draw_is_no_file(tmp_path, measurements):
    whole = measurements[measurements["target_layer"] == "ALL"]
    assert predicted_and_measured(whole, correlate(whole), tmp_path / "a.png") is None
    assert effect_by_layer(whole, tmp_path / "b.png") is None
    assert ablation(measurements[measurements["k"] == 1], tmp_path / "c.png") is None
    assert where_top_weights_sit({}, {}, {}, tmp_path / "d.png") is None
    assert single_weights(whole, synthetic.sampled(), correlate(whole), tmp_path / "e.png") is None
    assert single_weights(whole, None, correlate(whole), tmp_path / "e.png") is None
    assert list(tmp_path.iterdir()) == []


def test_hostile_names_are_drawn_as_they_are(tmp_path):
    names = ["$\\frac{", "a$b$c", "层.注意力", "<b>|`", "model." + "deep." * 60 + "x"]
    measurements = synthetic.measurements(n=5, metrics=("grad_x_weight",)).replace(
        {
            "target_layer": dict(zip(synthetic.layer_names(5), names, strict=True)),
            "selection": {"top_grad_x_weight": "top_$\\x"},
        }
    )
    assert_drawn(effect_by_layer(measurements, tmp_path / "layers.png"))
    assert_drawn(predicted_and_measured(measurements, correlate(measurements), tmp_path / "predicted.png"))


@pytest.mark.parametrize("effects", [[np.inf, np.nan, 0.0, -0.5], [np.nan] * 4, [0.0] * 4])
def test_extreme_effects_are_drawn(tmp_path, effects):
    measurements = synthetic.measurements(n=3, metrics=("obd",), ks=(1,))
    changed = measurements["selection"] == "top_obd"
    for column in ["delta_nll", "ci_low", "ci_high"]:
        measurements.loc[changed, column] = effects
    assert_drawn(predicted_and_measured(measurements, correlate(measurements), tmp_path / "predicted.png"))
    assert_drawn(effect_by_layer(measurements, tmp_path / "layers.png"))
    curve = pd.concat([measurements, measurements.assign(k=10)])
    assert_drawn(ablation(curve[curve["target_layer"] == "ALL"], tmp_path / "ablation.png"))


@pytest.mark.parametrize("effects", [[np.inf, np.nan, 0.0, -0.5, 1e-9], [np.nan] * 5, [0.0] * 5])
def test_extreme_single_weights_are_drawn(tmp_path, effects):
    sampled = synthetic.sampled(5, metrics=("obd", "magnitude")).assign(score_obd=[0.0, 1e-12, 2.0, 0.0, 0.0])
    table = synthetic.with_single_weights(synthetic.measurements(n=1), sampled)
    for column in ["delta_nll", "ci_low", "ci_high"]:
        table.loc[table["selection"] == "weight", column] = effects
    assert_drawn(single_weights(table, sampled, correlate(table, sampled=sampled), tmp_path / "weights.png"))


def test_single_weights_enter_no_other_figure(tmp_path, measurements):
    weights = synthetic.with_single_weights(measurements, synthetic.sampled())
    for draw in (effect_by_layer, ablation):
        assert draw(weights, tmp_path / "1.png").read_bytes() == draw(measurements, tmp_path / "2.png").read_bytes()
    pair = [predicted_and_measured(m, correlate(m), tmp_path / f"{len(m)}.png") for m in (weights, measurements)]
    assert pair[0].read_bytes() == pair[1].read_bytes()


def test_scores_of_zero_are_drawn(tmp_path):
    measurements = synthetic.measurements(n=5, metrics=("obd",)).assign(score_sum=0.0)
    assert_drawn(predicted_and_measured(measurements, correlate(measurements), tmp_path / "predicted.png"))


def test_weights_of_a_fused_projection_are_counted_in_their_parts():
    name = "gpt_neox.layers.2.attention.query_key_value.weight"
    top = pd.DataFrame({"parameter": [name] * 3, "row": [0, 5, 13], "col": 0})  # two heads of 4
    summary = pd.DataFrame({"parameter": [name, "gpt_neox.embed_in.weight"], "n_weights": [24 * 8, 10]})
    counts = _place_counts(top, summary, {"num_attention_heads": 2, "head_dim": 4})
    assert counts[2].to_dict() == {
        "attention key": 1, "attention query": 2, "attention value": 0, "embedding": 0,
    }  # fmt: skip
    assert counts.loc["embedding", -1] == 0
    assert _place_counts(top, summary, {}).loc["attention query_key_value", 2] == 3
