import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.report.effect_figures import ablation, effect_by_layer
from pixels import assert_drawn, assert_drawn_in_both_themes

METRICS = ("grad_x_weight", "magnitude")


@pytest.fixture(scope="module")
def example():
    return synthetic.evidence(n=4, metrics=METRICS, ks=(1, 100))


@pytest.mark.slow
@pytest.mark.parametrize("draw", [effect_by_layer, ablation])
def test_the_figure_is_drawn_in_both_themes(tmp_path, example, draw):
    assert_drawn_in_both_themes(draw, example, tmp_path / "figure.png")


def test_the_same_data_give_the_same_bytes(tmp_path, example):
    first, second = (effect_by_layer(example, tmp_path / name) for name in ("1.png", "2.png"))
    assert first.read_bytes() == second.read_bytes()


def test_nothing_to_draw_is_no_file(tmp_path, example):
    table = example.measurements
    whole = synthetic.evidence_of(table[table["target_layer"] == "ALL"])
    assert effect_by_layer(whole, tmp_path / "a.png") is None
    assert ablation(synthetic.evidence_of(table[table["k"] == 1]), tmp_path / "b.png") is None
    assert list(tmp_path.iterdir()) == []


def test_hostile_names_are_drawn_as_they_are(tmp_path):
    names = ["$\\frac{", "a$b$c", "层.注意力", "<b>|`", "model." + "deep." * 60 + "x"]
    renamed = {
        "target_layer": dict(zip(synthetic.layer_names(5), names, strict=True)),
        "selection": {"top_grad_x_weight": "top_$\\x"},
    }
    table = synthetic.measurements(n=5, metrics=("grad_x_weight",)).replace(renamed)
    assert_drawn(effect_by_layer(synthetic.evidence_of(table), tmp_path / "layers.png"))


@pytest.mark.parametrize("effects", [[np.inf, np.nan, 0.0, -0.5], [np.nan] * 4, [0.0] * 4])
def test_extreme_effects_are_drawn(tmp_path, effects):
    table = synthetic.measurements(n=3, metrics=("obd",), ks=(1,))
    changed = table["selection"] == "top_obd"
    for column in ["delta_nll", "ci_low", "ci_high"]:
        table.loc[changed, column] = effects
    assert_drawn(effect_by_layer(synthetic.evidence_of(table), tmp_path / "layers.png"))
    curve = pd.concat([table, table.assign(k=10)])
    whole = synthetic.evidence_of(curve[curve["target_layer"] == "ALL"])
    assert_drawn(ablation(whole, tmp_path / "ablation.png"))


@pytest.mark.slow
def test_single_weights_do_not_enter(tmp_path, example):
    weights = synthetic.with_single_weights(example.measurements, synthetic.sampled())
    both = synthetic.evidence_of(weights)
    for draw in (effect_by_layer, ablation):
        assert draw(both, tmp_path / "1.png").read_bytes() == draw(example, tmp_path / "2.png").read_bytes()


@pytest.mark.parametrize("draw", [effect_by_layer, ablation])
def test_of_two_perturbations_the_first_one_is_drawn(tmp_path, draw):
    both, alone = synthetic.evidence_of_two_perturbations()
    drawn, zero, sign_flip = (
        draw(evidence, tmp_path / "figure.png").read_bytes() for evidence in (both, alone["zero"], alone["sign_flip"])
    )
    assert drawn == zero != sign_flip
