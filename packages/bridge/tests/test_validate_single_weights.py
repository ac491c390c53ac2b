"""Validations of single weights."""

import re

import pandas as pd
import pytest
from bridge import validate
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.existing_runs import read_manifest
from bridge.exchange.validation_run import choose_validation
from bridge.instrument.plan import plan
from bridge.report import html
from validations import options, starts

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.mark.slow
def test_single_weights_are_chosen_written_measured_and_correlated(tmp_path, output, python, capsys):
    lines = validate.validate(options(output, python, single_weights=12, metrics=["magnitude"]))
    folder = output / "validation_v"
    chosen = pd.read_csv(folder / "single_weights.csv")
    sampled = pd.read_csv(folder / "sampled_weights.csv")
    assert sampled.equals(pd.read_csv(output / "critical_analysis_1" / "sampled_weights.csv"))
    assert len(chosen) == 12
    assert set(chosen["score"]) <= set(sampled["score_magnitude"])
    assert (chosen["inclusion"] <= 1 / 7).all() and (chosen["inclusion"] > 0).all()
    assert "--per-weight=single_weights.csv" in starts(tmp_path)[0]["argv"]
    measured = pd.read_csv(folder / "measurements.csv").query("selection == 'weight'")
    places = ["parameter", "row", "col"]
    assert measured[places].astype({"row": int, "col": int}).values.tolist() == chosen[places].values.tolist()
    correlations = pd.read_csv(folder / "correlations.csv").query("unit == 'weights'")
    assert correlations["metric"].tolist() == ["grad_x_weight", "magnitude"]
    assert correlations["n"].tolist() == [12, 12]
    weights = 1 / chosen["inclusion"]
    assert correlations["n_effective"].tolist() == pytest.approx([weights.sum() ** 2 / (weights**2).sum()] * 2)
    assert correlations["population_rho"].between(-1, 1).all()
    layers = pd.read_csv(folder / "correlations.csv").query("unit == 'layers'")
    inclusion = pd.read_csv(folder / "targets.csv")["inclusion"]
    assert inclusion.tolist() == [1, 1, 1] + [4 / 9] * 4
    assert layers["n_effective"].tolist() == pytest.approx([12**2 / (3 + 4 * (9 / 4) ** 2)])
    n = len(pd.read_csv(folder / "measurements.csv"))
    assert f"{n} measurements (8 targets x 4 sets of weights, 12 single weights) on 90" in capsys.readouterr().err
    assert len(lines) == 7
    assert "Over all weights of the model, estimated from 12 single weights, " in lines[6]
    assert " ".join(lines[6].split()) in (folder / "report.md").read_text().replace("\\", "")
    identity = read_manifest(folder)["identity"]
    assert identity["options"]["single_weights"] == 12
    assert "sampled_weights.csv" in identity["discovery"]


@pytest.mark.slow
def test_single_weights_and_the_whole_model_without_layers(output, python):
    lines = validate.validate(options(output, python, layers=0, control_layers=0, single_weights=5))
    assert lines[4] == "No single layer was measured."
    assert "estimated from 5 single weights" in lines[6]
    assert not any("restricted" in note for note in pd.read_csv(output / "validation_v" / "correlations.csv")["note"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["global", "both"])
def test_single_weights_alone(tmp_path, output, python, mode):
    if mode == "global":  # the lists of each layer are not needed
        for path in output.glob("*/top_*_per_layer_*.csv"):
            path.unlink()
    chosen = options(output, python, layers=0, control_layers=0, global_set=False, single_weights=8)
    lines = validate.validate(chosen)
    folder = output / "validation_v"
    measured = pd.read_csv(folder / "measurements.csv")
    assert set(measured["selection"]) == {"weight"} and len(measured) == 8
    assert not any(word.startswith(("--target-layer", "--weights-csv")) for word in starts(tmp_path)[0]["argv"])
    correlations = pd.read_csv(folder / "correlations.csv")
    assert set(correlations["unit"]) == {"weights"} and correlations["spearman"].notna().all()
    assert any("estimated from 8 single weights" in line for line in lines)
    for report in ("report.html", "report.md"):
        assert "nan" not in re.sub(r"base64,[^\"]*", "", (folder / report).read_text()).split()
    assert html.write_report(choose_validation([str(folder)])) == lines[1:]


@pytest.mark.slow
def test_single_weights_alone_that_changed_nothing(output, python, monkeypatch, no_plots):
    monkeypatch.setenv("FAKE", "zero")
    with pytest.raises(RunError, match="changed the loss nowhere"):
        validate.validate(options(output, python, layers=0, control_layers=0, global_set=False, single_weights=8))


def test_other_single_weights_are_another_validation(output, python):
    identities = [plan(options(output, python, single_weights=n)).identity for n in (0, 5, 6)]
    path = output / "critical_analysis_1" / "sampled_weights.csv"
    table = pd.read_csv(path)
    table.assign(value=table["value"] + 1).to_csv(path, index=False)
    identities.append(plan(options(output, python, single_weights=6)).identity)
    assert identities[0].keys() == identities[1].keys() - {"single_weights"}
    assert len({identity.get("single_weights") for identity in identities}) == 4


@pytest.mark.slow
def test_more_single_weights_than_were_sampled(output, python, no_plots, capsys):
    validate.validate(options(output, python, single_weights=1000))
    warning = "--single-weights 1000: the discovery sampled 69, all of them are taken"
    assert f"WARNING: {warning}" in capsys.readouterr().err
    assert read_manifest(output / "validation_v")["warnings"] == [warning]
    assert len(pd.read_csv(output / "validation_v" / "single_weights.csv")) == 69


def test_a_sample_of_unknown_probability_is_asked_for_again(output, python):
    path = output / "critical_analysis_1" / "sampled_weights.csv"
    pd.read_csv(path).drop(columns="inclusion").to_csv(path, index=False)
    assert plan(options(output, python)).single_weights is None
    with pytest.raises(RequestError, match=r"lacks the column inclusion of sampled weights; run the discovery again$"):
        plan(options(output, python, single_weights=3))


@pytest.mark.parametrize("inclusion", ["0", "1.5", "-0.2", "nan"])
def test_a_probability_is_above_0_and_at_most_1(output, python, inclusion):
    path = output / "critical_analysis_1" / "sampled_weights.csv"
    pd.read_csv(path).assign(inclusion=inclusion).to_csv(path, index=False)
    with pytest.raises(RequestError, match=r"line 2: column inclusion should be a number above 0 and at most 1, not"):
        plan(options(output, python, single_weights=3))


def test_discovery_without_sampled_weights(output, python):
    (output / "critical_analysis_1" / "sampled_weights.csv").unlink()
    assert plan(options(output, python)).single_weights is None
    with pytest.raises(RequestError, match=r"sampled_weights\.csv is missing: .* run the discovery again"):
        validate.validate(options(output, python, single_weights=3))
    assert not (output / "validation_v").exists()


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("score_magnitude", "inf", "is damaged: a value or a score is not a finite number"),
        ("score_magnitude", "high", "column score_magnitude should be a number, not 'high'"),
        ("parameter", "twice.weight", "is damaged: a weight occurs twice"),
    ],
)
def test_damaged_sampled_weights(output, python, column, text, message):
    path = output / "critical_analysis_1" / "sampled_weights.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[[0, 6, 12, 18, 24, 30, 35, 41, 47, 53, 58, 64], column] = text
    table.to_csv(path, index=False)
    with pytest.raises(RequestError, match=message):
        plan(options(output, python, single_weights=3))
