"""Validations whose instrument fails, or measures another model."""

import json
import shutil

import pandas as pd
import pytest
from bridge import validate
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.existing_runs import read_manifest
from bridge.exchange.fingerprint import write_fingerprint
from bridge.report import html
from discovery_folder import fingerprint, parameters
from validations import command, options, plain_report, starts

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("refuse", RequestError, r"run_topk_perturb\.py refused: the target has no such weight"),
        ("fail", RunError, r"failed with exit code 1: .*the loss of sequence 2 is not finite; see .*perturb\.log"),
        ("zero", RunError, "changed the loss nowhere"),
        ("baseline", RunError, "corpus_sha256 is dddd.*, was cccc.*, nll is 3.6, was 3.5; run the discovery again"),
        (
            "other",
            RunError,
            r"not the discovery's: they differ in model\.layers\.2\.mlp\.weight; run the discovery again",
        ),
        ("short", RunError, "the measurements lack the top 5 of ALL by grad_x_weight"),
    ],
)
def test_instrument_that_goes_wrong(output, python, monkeypatch, mode, error, message, no_plots):
    monkeypatch.setenv("FAKE", mode)
    with pytest.raises(error, match=message):
        validate.validate(options(output, python))
    folder = output / "validation_v"
    assert read_manifest(folder)["status"] == "failed"
    assert not (folder / "report.html").exists()
    assert not (folder / "measurements.csv").exists()


@pytest.mark.slow
def test_single_weight_that_was_not_measured(output, python, monkeypatch, no_plots):
    monkeypatch.setenv("FAKE", "lost")
    with pytest.raises(RunError, match=r"the measurements lack 1 of 4 single weights \(sign_flip\)"):
        validate.validate(options(output, python, single_weights=4, perturbations=["zero", "sign_flip"]))
    monkeypatch.setenv("FAKE", "")


def test_wrong_baseline_stops_the_instrument_at_once(output, python, monkeypatch, no_plots):
    monkeypatch.setenv("FAKE", "baseline")
    with pytest.raises(RunError, match="corpus_sha256"):
        validate.validate(options(output, python))
    assert not (output / "validation_v" / "perturb_measure" / "measurements.csv").exists()


def test_another_model_of_equal_loss_stops_the_instrument_at_once(output, python, monkeypatch, no_plots):
    """Same id, revision, dtype, texts and loss; one parameter has other values."""
    monkeypatch.setenv("FAKE", "other")
    with pytest.raises(RunError, match=r"differ in model\.layers\.2\.mlp\.weight"):
        validate.validate(options(output, python))
    assert not (output / "validation_v" / "perturb_measure" / "measurements.csv").exists()


def without_fingerprint(discovery):
    """As an earlier version left it."""
    (discovery / "fingerprint.json").unlink()
    baseline = json.loads((discovery / "baseline.json").read_text())
    old = {key: value for key, value in baseline.items() if not key.endswith("_xxh3")}
    (discovery / "baseline.json").write_text(json.dumps(old))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["discovery", "measurement"])
def test_run_of_an_earlier_version_is_accepted_with_a_warning(output, python, monkeypatch, no_plots, which):
    if which == "discovery":
        without_fingerprint(output / "critical_analysis_1")
    else:
        monkeypatch.setenv("FAKE", "old")
    validate.validate(options(output, python))
    manifest = read_manifest(output / "validation_v")
    assert manifest["status"] == "complete"
    (warning,) = manifest["warnings"]
    assert warning.startswith(f"the {which} has no fingerprint")
    assert warning.endswith("so the values of the models could not be compared")


@pytest.mark.slow
def test_baseline_of_an_earlier_version_is_accepted_with_a_warning(tmp_path, output, python, no_plots):
    copy = tmp_path / "copy"
    shutil.copytree(output / "critical_analysis_1", copy)
    without_fingerprint(copy)
    validate.validate(options(output, python, baseline=str(copy / "baseline.json")))
    (warning,) = read_manifest(output / "validation_v")["warnings"]
    assert warning.startswith(f"--baseline {copy / 'baseline.json'} has no fingerprint")


def test_baseline_of_another_model_is_refused_before_anything_starts(tmp_path, output, python):
    copy = tmp_path / "copy"
    shutil.copytree(output / "critical_analysis_1", copy)
    changed = fingerprint(parameters()[4])
    write_fingerprint(copy, changed)
    baseline = json.loads((copy / "baseline.json").read_text())
    (copy / "baseline.json").write_text(json.dumps(baseline | changed.totals))
    with pytest.raises(RequestError, match=r"the models differ in model\.layers\.4\.mlp\.weight"):
        validate.validate(options(output, python, baseline=str(copy / "baseline.json")))
    assert starts(tmp_path) == []


@pytest.mark.slow
def test_failed_validation_goes_on_when_its_cause_is_gone(tmp_path, output, python, monkeypatch, no_plots):
    monkeypatch.setenv("FAKE", "fail")
    with pytest.raises(RunError, match="not finite"):
        validate.validate(options(output, python))
    monkeypatch.setenv("FAKE", "")
    validate.validate(options(output, python))
    assert read_manifest(output / "validation_v")["status"] == "complete"
    assert read_manifest(output / "validation_v")["error"] is None


@pytest.mark.slow
def test_finished_measurement_is_read_and_not_repeated(tmp_path, output, python, monkeypatch):
    def fails(*args, **content):
        raise RunError("no space left")

    monkeypatch.setattr(html, "write_report", fails)
    with pytest.raises(RunError, match="no space left"):
        validate.validate(options(output, python))
    monkeypatch.setattr(html, "write_report", plain_report)
    validate.validate(options(output, python))
    assert len(starts(tmp_path)) == 1


@pytest.mark.slow
def test_failing_target_is_recorded_and_the_rest_goes_on(tmp_path, output, python, monkeypatch, capsys):
    monkeypatch.setenv("FAKE", "broken")
    with pytest.raises(validate.TargetsFailedError, match="1 targets failed") as caught:
        validate.validate(options(output, python))
    folder = output / "validation_v"
    targets = pd.read_csv(folder / "targets.csv")["target_layer"].tolist()
    measured = pd.read_csv(folder / "measurements.csv")
    assert list(measured["target_layer"].unique()) == [targets[0], targets[1], *targets[3:], "ALL"]
    manifest = read_manifest(folder)
    assert manifest["status"] == "complete"
    assert list(manifest["failed_targets"]) == [targets[2]]
    assert "changes no weight of the model" in manifest["failed_targets"][targets[2]]
    assert f"{targets[2]} could not be measured" in (folder / "report.md").read_text().replace("\\", "")
    assert caught.value.lines[0] == f"report: {folder / 'report.html'}"
    assert len(pd.read_csv(folder / "correlations.csv")) == 2


@pytest.mark.slow
def test_the_table_of_an_earlier_attempt_is_not_taken_when_the_last_failed_otherwise(output, python, monkeypatch):
    def fails(*args, **content):
        raise RunError("no space left")

    monkeypatch.setattr(html, "write_report", fails)
    monkeypatch.setenv("FAKE", "broken")
    with pytest.raises(RunError, match="no space left"):
        validate.validate(options(output, python))
    monkeypatch.setattr(html, "write_report", plain_report)
    monkeypatch.setenv("FAKE_ALSO", "RunError: the instrument fails its own check")
    with pytest.raises(RunError) as caught:
        validate.validate(options(output, python))
    assert not isinstance(caught.value, validate.TargetsFailedError)
    monkeypatch.delenv("FAKE_ALSO")
    with pytest.raises(validate.TargetsFailedError):
        validate.validate(options(output, python))


@pytest.mark.slow
def test_command_reports_and_exits_with_1_when_a_target_failed(output, python, monkeypatch, capsys):
    process = command(output, python, FAKE="broken")
    out, err = process.communicate()
    assert process.returncode == 1
    assert out.startswith("report: ")
    assert "bridge validate: error: 1 targets failed" in err.splitlines()[-1]


@pytest.mark.slow
def test_failure_of_the_last_target_is_a_failure(output, python, monkeypatch, no_plots):
    monkeypatch.setenv("FAKE", "broken")
    chosen = options(output, python, layers=1, control_layers=0, global_set=False)
    with pytest.raises(RunError, match="changes no weight of the model"):
        validate.validate(chosen)
    assert read_manifest(output / "validation_v")["status"] == "failed"
