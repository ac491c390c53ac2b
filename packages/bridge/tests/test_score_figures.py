from dataclasses import replace

import numpy as np
import pytest
import synthetic
from bridge.report import score_figures
from bridge.report.score_figures import predicted_and_measured, single_weights
from pixels import assert_drawn, assert_drawn_in_both_themes

METRICS = ("grad_x_weight", "magnitude")


@pytest.fixture(scope="module")
def example():
    return synthetic.evidence(n=4, metrics=METRICS, ks=(1, 100))


@pytest.fixture(scope="module")
def with_weights(example):
    sampled = synthetic.sampled(metrics=METRICS)
    return synthetic.evidence_of(synthetic.with_single_weights(example.measurements, sampled), sampled)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [predicted_and_measured, single_weights])
def test_the_figure_is_drawn_in_both_themes(tmp_path, with_weights, draw):
    assert_drawn_in_both_themes(draw, with_weights, tmp_path / "figure.png")


def test_nothing_to_draw_is_no_file(tmp_path, example):
    table = example.measurements
    whole = synthetic.evidence_of(table[table["target_layer"] == "ALL"])
    assert predicted_and_measured(whole, tmp_path / "a.png") is None
    assert single_weights(whole, tmp_path / "b.png") is None
    assert single_weights(replace(whole, sampled=synthetic.sampled()), tmp_path / "c.png") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("draw", [predicted_and_measured, single_weights])
def test_the_line_of_equality_is_drawn_for_scores_in_nats_alone(tmp_path, with_weights, draw):
    """Whether a score estimates the change of loss is what the discovery's manifest says, and not its name."""
    lines = []
    for unit in ("nats per token", "horsepower"):
        definitions = {"grad_x_weight": {"formula": "f", "unit": unit}}
        manifest = synthetic.manifest() | {"metrics": definitions}
        lines.append(draw(replace(with_weights, discovery_manifest=manifest), tmp_path / "figure.png").read_bytes())
    without = {"metrics": {"grad_x_weight": {"formula": "f"}}}
    unknown = draw(replace(with_weights, discovery_manifest=synthetic.manifest() | without), tmp_path / "figure.png")
    assert lines[0] != lines[1]
    assert unknown.read_bytes() == lines[1]


def test_hostile_names_are_drawn_as_they_are(tmp_path):
    names = ["$\\frac{", "a$b$c", "层.注意力", "<b>|`", "model." + "deep." * 60 + "x"]
    renamed = {
        "target_layer": dict(zip(synthetic.layer_names(5), names, strict=True)),
        "selection": {"top_grad_x_weight": "top_$\\x"},
    }
    table = synthetic.measurements(n=5, metrics=("grad_x_weight",)).replace(renamed)
    assert_drawn(predicted_and_measured(synthetic.evidence_of(table), tmp_path / "predicted.png"))


@pytest.mark.parametrize("effects", [[np.inf, np.nan, 0.0, -0.5], [np.nan] * 4, [0.0] * 4])
def test_extreme_effects_are_drawn(tmp_path, effects):
    table = synthetic.measurements(n=3, metrics=("obd",), ks=(1,))
    changed = table["selection"] == "top_obd"
    for column in ["delta_nll", "ci_low", "ci_high"]:
        table.loc[changed, column] = effects
    assert_drawn(predicted_and_measured(synthetic.evidence_of(table), tmp_path / "predicted.png"))


@pytest.mark.parametrize("effects", [[np.inf, np.nan, 0.0, -0.5, 1e-9], [np.nan] * 5, [0.0] * 5])
def test_extreme_single_weights_are_drawn(tmp_path, effects):
    sampled = synthetic.sampled(5, metrics=("obd", "magnitude")).assign(score_obd=[0.0, 1e-12, 2.0, 0.0, 0.0])
    table = synthetic.with_single_weights(synthetic.measurements(n=1), sampled)
    for column in ["delta_nll", "ci_low", "ci_high"]:
        table.loc[table["selection"] == "weight", column] = effects
    assert_drawn(single_weights(synthetic.evidence_of(table, sampled), tmp_path / "weights.png"))


def test_single_weights_do_not_enter_the_figure_of_layers(tmp_path, example, with_weights):
    pair = [predicted_and_measured(e, tmp_path / "figure.png").read_bytes() for e in (example, with_weights)]
    assert pair[0] == pair[1]


def test_scores_of_zero_are_drawn(tmp_path):
    table = synthetic.measurements(n=5, metrics=("obd",)).assign(score_sum=0.0)
    assert_drawn(predicted_and_measured(synthetic.evidence_of(table), tmp_path / "predicted.png"))


@pytest.mark.parametrize("draw", [predicted_and_measured, single_weights])
def test_of_two_perturbations_the_first_one_is_drawn(tmp_path, draw):
    both, alone = synthetic.evidence_of_two_perturbations()
    drawn, zero, sign_flip = (
        draw(evidence, tmp_path / "figure.png").read_bytes() for evidence in (both, alone["zero"], alone["sign_flip"])
    )
    assert drawn == zero != sign_flip


def test_a_panel_says_what_rho_is_of(example):
    row = example.correlations[example.correlations["unit"] == "layers"].head(1)
    row = row.assign(spearman=0.5, ci_low=-0.25, ci_high=0.75, n=40, n_effective=40.0, population_rho=0.3)
    setting = row["perturbation"].iloc[0], int(row["k"].iloc[0])
    assert score_figures._rho_title(row, *setting) == "ρ = 0.50 [−0.25,\u00a00.75], n = 40"
    weighted = row.assign(n_effective=20.0, population_low=np.nan, population_high=np.nan)
    assert score_figures._rho_title(weighted, *setting) == "ρ = 0.30 over all\n0.50 [−0.25,\u00a00.75] over 40 drawn"
    assert score_figures._rho_title(row.assign(spearman=np.nan), *setting) == "no rank correlation"
