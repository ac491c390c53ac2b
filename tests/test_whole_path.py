"""Discovery, validation and report through the commands, on a random model."""

import json

import bridge
import pandas as pd
import pytest
from bridge.analysis.measured_sets import text_effects
from conftest import PACKAGES

PYTHON = {name: PACKAGES / name / ".venv" / "bin" for name in ("bridge", "llm_perturb", "critical_weight_analysis")}
DISCOVER = PACKAGES / "critical_weight_analysis" / "phase1_runner.py"


@pytest.fixture(scope="module")
def results(shell, workspace):
    """A discovery and its validation."""
    done = shell(
        f"{PYTHON['critical_weight_analysis']}/python {DISCOVER} --model gpt2 "
        "--metric grad_x_weight magnitude --topk 20 --eval-limit 20 --output discovery_results/\n"
        f"{PYTHON['bridge']}/bridge validate --from discovery_results/ --layers 2 --control-layers 4",
        workspace,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (validation,) = (workspace / "discovery_results").glob("validation_*/")
    return validation, done.stdout


def test_validation_measures_layers_and_the_global_set(results):
    validation, _ = results
    measured = pd.read_csv(validation / "measurements.csv")
    assert measured["target_layer"].nunique() == 2 + 4 + 1
    assert set(measured["selection"]) == {"top_grad_x_weight", "top_magnitude", "random"}
    everywhere = measured.query("target_layer == 'ALL' and selection == 'top_grad_x_weight'")
    discovered = pd.read_csv(next(validation.parent.glob("critical_analysis_*/top_20_weights_grad_x_weight.csv")))
    assert everywhere["n_weights"].item() == 20
    assert everywhere["score_sum"].item() == pytest.approx(discovered["score"].sum(), rel=1e-9)
    assert everywhere["delta_nll"].item() != 0


def test_validation_writes_a_report_and_says_where(results):
    validation, said = results
    assert f"{validation.name}/report.html" in said
    assert (validation / "report.html").read_text().count("<img") >= 2
    correlations = pd.read_csv(validation / "correlations.csv")
    layers = correlations.query("unit == 'layers'")
    assert set(layers["metric"]) >= {"grad_x_weight", "magnitude"}
    assert layers["n"].tolist() == [6] * len(layers)
    assert json.loads((validation / "manifest.json").read_text())["status"] == "complete"


def test_the_losses_of_every_text_reach_the_bridge(results):
    """They add up to the effects; were these all layers, rho would have an interval over texts."""
    validation = bridge.load_validation(results[0])
    losses, measurements = validation.sequence_losses(), validation.measurements()
    effects, n_tokens = text_effects(losses, "top_magnitude", "zero", 20)
    rows = measurements[measurements["selection"] == "top_magnitude"].set_index("target_layer")
    whole = effects.sum(axis=1) / n_tokens.sum()
    assert whole.to_dict() == pytest.approx(rows["delta_nll"].to_dict(), rel=1e-6, abs=1e-12)
    every = validation.targets().assign(n_layers=6)
    table = bridge.correlate(measurements, targets=every, losses=losses, n_resamples=9).query("unit == 'layers'")
    assert (table["texts_low"] < table["spearman"]).all() and (table["spearman"] < table["texts_high"]).all()
    assert pd.read_csv(results[0] / "correlations.csv")["texts_low"].isna().all()  # of more layers than these


def test_both_ends_saw_the_same_tokens(results):
    validation, _ = results
    (discovery,) = validation.parent.glob("critical_analysis_*/")
    baseline = json.loads((discovery / "baseline.json").read_text())
    measured = pd.read_csv(validation / "measurements.csv")
    assert set(measured["corpus_sha256"]) == {baseline["corpus_sha256"]}
    assert measured["baseline_nll"].tolist() == pytest.approx([baseline["nll"]] * len(measured), rel=1e-6)


def test_two_processes_measure_the_same_against_a_baseline_of_its_own(results, shell, workspace):
    validation, _ = results
    done = shell(
        f"{PYTHON['llm_perturb']}/python {PACKAGES}/llm_perturb/scripts/run_baseline.py --model gpt2 --eval-limit 20 "
        "--experiment-id own\n"
        f"{PYTHON['bridge']}/bridge validate --from discovery_results/ --layers 2 --control-layers 4 --num-processes 2 "
        "--baseline outputs/baseline_own/baseline.json --output two/",
        workspace,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (workspace / "two").glob("validation_*/")
    assert json.loads((folder / "perturb_measure" / "manifest.json").read_text())["world_size"] == 2
    one, two = (pd.read_csv(place / "measurements.csv") for place in (validation, folder))
    pd.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-6)
    done = shell(
        f"{PYTHON['bridge']}/bridge validate --from discovery_results/ --layers 0 --control-layers 0 --num-processes 2 "
        "--perturbations bit_flip --bit 99 --output three/ 2>error",
        workspace,
    )
    last = (workspace / "error").read_text().strip().splitlines()[-1]
    assert done.returncode == 2, last
    assert last.startswith("bridge validate: error: run_topk_perturb.py refused: ") and "bit" in last


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (f"critical_weight_analysis/python {DISCOVER} --metrik x", "unknown flag"),
        (f"critical_weight_analysis/python {DISCOVER} --metric x", "is unknown"),
        (f"critical_weight_analysis/python {DISCOVER} --model no/such", "no/such"),
        (f"llm_perturb/python {PACKAGES}/llm_perturb/scripts/run_baseline.py --data-file absent.txt", "absent.txt"),
        ("bridge/bridge validate --from empty", "empty"),
        ("bridge/bridge targets --from nowhere", "nowhere"),
    ],
)
def test_a_wrong_request_gets_one_line_and_exit_code_2(shell, tmp_path, command, complaint):
    (tmp_path / "empty").mkdir()
    package, _, rest = command.partition("/")
    done = shell(f"{PYTHON[package]}/{rest} 2>error", tmp_path)
    assert done.returncode == 2
    last = (tmp_path / "error").read_text().strip().splitlines()[-1]
    assert ": error: " in last
    assert complaint in last
    assert "Traceback" not in (tmp_path / "error").read_text()
    assert not list(tmp_path.glob("outputs/*"))
