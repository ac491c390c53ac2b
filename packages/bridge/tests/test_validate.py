from dataclasses import replace

import pandas as pd
import pytest
from bridge import validate
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.existing_runs import read_manifest
from bridge.exchange.fingerprint import read_fingerprint
from bridge.instrument import process
from bridge.instrument.plan import plan
from bridge.instrument.validation_options import ValidationOptions
from discovery_folder import fingerprint, make_discovery, snapshot
from validations import HERE, TABLES, options, starts

pytestmark = pytest.mark.usefixtures("blank_figures")


def test_validation_from_start_to_end(tmp_path, output, python, capsys, monkeypatch):
    monkeypatch.setenv("TARGET_LAYER", "a.stale.setting")
    discovery = snapshot(output)
    lines = validate.validate(options(output, python, metrics=["magnitude", "grad_x_weight"]))
    folder = output / "validation_v"
    assert {*TABLES, "report.html", "report.md", "manifest.json", "perturb.log"} <= {p.name for p in folder.iterdir()}
    assert lines[0] == f"report: {folder / 'report.html'}"
    assert len(lines) == 6
    measured = pd.read_csv(folder / "measurements.csv")
    targets = pd.read_csv(folder / "targets.csv")
    assert targets["role"].tolist() == ["top"] * 3 + ["control"] * 4
    assert list(measured["target_layer"].unique()) == [*targets["target_layer"], "ALL"]
    assert set(measured["selection"]) == {"top_magnitude", "top_grad_x_weight", "random"}
    assert set(measured["k"]) == {5}
    assert read_fingerprint(folder) == fingerprint()
    manifest = read_manifest(folder)
    assert manifest["status"] == "complete"
    assert len(manifest["identity"]["discovery"]) == 7
    assert manifest["instrument"][:2] == [python, str(process.SCRIPT)]
    assert {name: value for name, value in snapshot(output).items() if name in discovery} == discovery
    assert "measuring 40/40" in capsys.readouterr().err
    log = (folder / "perturb.log").read_text()
    assert "BASELINE_PERPLEXITY: 33.1" in log
    assert "\nmeasuring 40/40" in log
    assert [start["target"] for start in starts(tmp_path)] == [None]


def test_flags_of_the_instrument(tmp_path, python):
    data = tmp_path / "texts.txt"
    data.write_text("a text\n")
    make_discovery(
        tmp_path / "o", model={"revision": "0" * 40}, data_file=str(data), eval_limit=9, packing="windows", dataset=None
    )
    chosen = options(
        tmp_path / "o", python, device="cpu", batch_size=4, k=[3, 7], seeds=[2, 1, 2], layers=1, bottom=True
    )
    ready = plan(chosen)
    words = ready.command
    for word in (
        "--model=tiny",
        f"--revision={'0' * 40}",
        "--dtype=float32",
        "--device=cpu",
        "--batch-size=4",
        f"--data-file={data}",
        "--packing=windows",
        "--max-length=64",
        "--eval-limit=9",
    ):
        assert word in words
    text = " ".join(words)
    assert text.endswith(
        "--perturbation zero --seeds 2 1 --k 3 7 --selection top random bottom --metric grad_x_weight magnitude"
    )
    files = [path.name for path in ready.weights_files.values()]
    assert files == ["top_20_per_layer_grad_x_weight.csv", "top_20_per_layer_magnitude.csv"]
    assert "dataset" not in text
    assert "trust" not in text


def test_numbers_of_the_perturbations_are_handed_on_and_make_another_validation(output, python):
    kinds = ["scale", "gaussian_noise", "bit_flip", "quantize"]
    plain = plan(options(output, python, perturbations=kinds))
    given = {"factor": 0.9, "sigma": 0.5, "bit": 0, "n_bits": 8}
    ready = plan(options(output, python, perturbations=kinds, **given))
    assert "--factor=0.9 --sigma=0.5 --bit=0 --n-bits=8" in " ".join(ready.command)
    assert not any(word.startswith(("--factor", "--sigma", "--bit", "--n-bits")) for word in plain.command)
    assert ready.identity != plain.identity


def test_all_layers_and_no_global_set(output, python):
    ready = plan(options(output, python, all_layers=True, global_set=False))
    assert len(ready.targets) == 12
    assert ready.options["target_layers"] == ready.targets["target_layer"].tolist()


@pytest.mark.slow
def test_layers_too_small_for_a_control_are_left_out(tmp_path, python, no_plots, capsys):
    folder = make_discovery(tmp_path / "o")
    path = folder / "layer_summary_grad_x_weight.csv"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace(",40,", ",14,")  # two metrics and a control of 5 take 15
    path.write_text("\n".join(lines) + "\n")
    validate.validate(options(tmp_path / "o", python, all_layers=True, k=[2, 5]))
    assert "WARNING: 1 layers of fewer than 15 weights are left out" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "o" / "validation_v" / "targets.csv")) == 11


@pytest.mark.slow
def test_perturbation_with_a_number(output, python, no_plots, monkeypatch):
    validate.validate(options(output, python, perturbations=["zero", "scale"]))
    found = pd.read_csv(output / "validation_v" / "measurements.csv")["perturbation"]
    assert set(found) == {"zero", "scale(0.5)"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metrics": ["obd"]}, "has no metric 'obd'"),
        ({"k": [21]}, "holds the top 20 of each parameter by grad_x_weight, not 21; lower --k, or run the discovery"),
        ({"k": [20]}, "no layer has the 60 weights that the top 20 of 2 metrics and a control of 20 take; lower --k"),
        ({"k": [0]}, "--k must be at least 1, not 0"),
        ({"seeds": [-1]}, "--seeds must be at least 0"),
        ({"single_weights": -1}, "--single-weights must be at least 0, not -1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"layers": -2}, "cannot be negative: -2"),
        ({"layers": 0, "control_layers": 0, "global_set": False}, "nothing is to be measured"),
        ({"factor": 0.1}, "--factor is for --perturbations scale, which is not asked for"),
        ({"n_bits": 3, "perturbations": ["bit_flip"]}, "--n-bits is for --perturbations quantize"),
        ({"shard": "3/2"}, "--shard '3/2' must be i/n"),
        ({"shard": "1/2", "merge": ["x"]}, "--shard measures a part and --merge puts the parts together"),
        ({"num_processes": 0}, "--num-processes must be at least 1, not 0"),
        ({"baseline": "/no/baseline.json"}, "--baseline /no/baseline.json cannot be read"),
        ({"output": __file__}, "cannot be created"),
        ({"perturb_python": "/no/python"}, "--perturb-python /no/python is not a program"),
        ({"experiment_id": "a/b"}, "must be a plain name"),
    ],
)
def test_wrong_request_starts_and_writes_nothing(tmp_path, output, python, more, message):
    before = snapshot(output)
    with pytest.raises(RequestError, match=message):
        validate.validate(options(output, python, **more))
    assert snapshot(output) == before
    assert starts(tmp_path) == []


def test_missing_environment_is_named(output, monkeypatch, tmp_path):
    monkeypatch.setattr(process, "PYTHON", tmp_path / "none" / "python")
    with pytest.raises(RequestError, match=r'make it with: nox -s "env\(llm_perturb\)"'):
        plan(options(output, None))


def test_default_environment_and_script_are_those_of_the_repository():
    packages = HERE.parents[1]
    assert packages / "llm_perturb" / ".venv" / "bin" / "python" == process.PYTHON
    assert packages / "llm_perturb" / "scripts" / "run_topk_perturb.py" == process.SCRIPT


@pytest.mark.slow
def test_the_report_reads_the_instruments_comparisons(output, python, monkeypatch):
    monkeypatch.setenv("FAKE", "compared")
    lines = validate.validate(options(output, python))
    folder = output / "validation_v"
    copied = (folder / "comparisons.csv").read_bytes()
    assert copied == next(folder.glob("perturb_*/comparisons.csv")).read_bytes()
    assert any("; +0.5" in line and "more than their mean" in line for line in lines)
    assert "did more damage than each of 3 random draws" in (folder / "report.md").read_text()
    assert next(iter(read_manifest(folder)["identity"]["options"])) == "primary"


def test_the_primary_analysis_is_the_first_of_the_request(output, python):
    request = options(
        output, python, metrics=["magnitude", "grad_x_weight"], k=[2, 1], perturbations=["sign_flip", "zero"]
    )
    primary = plan(request).options["primary"]
    assert primary == {"unit": "layers", "metric": "grad_x_weight", "perturbation": "sign_flip", "k": 2}


def test_the_primary_analysis_may_be_named(output, python):
    request = options(output, python, metrics=["grad_x_weight", "magnitude"], k=[2, 1])
    named = plan(replace(request, primary="magnitude"))
    assert named.options["primary"] == {"unit": "layers", "metric": "magnitude", "perturbation": "zero", "k": 2}
    assert named.identity["options"]["primary"] != plan(request).identity["options"]["primary"]
    refusal = r"^--primary magnitude is none of the metrics that are compared: grad_x_weight$"
    with pytest.raises(RequestError, match=refusal):
        plan(replace(request, primary="magnitude", metrics=["grad_x_weight"]))
    with pytest.raises(RequestError, match=r"--primary magnitud is none .* \(did you mean 'magnitude'\?\): grad_x"):
        plan(replace(request, primary="magnitud"))


def test_by_default_layers_are_drawn_and_none_is_certain(output, python):
    ready = plan(ValidationOptions(from_=[str(output)], perturb_python=python, experiment_id="v"))
    assert set(ready.targets["role"]) == {"control"}
    assert ready.targets["inclusion"].tolist() == [1.0] * 12  # fewer than 40: all of them
    few = [plan(options(output, python, layers=0, control_layers=3, draw_seed=seed)) for seed in (0, 0, 1, 2, 3)]
    drawn = [tuple(ready.targets["target_layer"]) for ready in few]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert few[0].identity == few[1].identity != few[2].identity
    assert few[2].options["draw_seed"] == 1


def test_the_cost_is_the_number_of_measurements(output, python):
    many = {"perturbations": ["gaussian_noise", "sign_flip"], "seeds": [0, 1], "k": [2, 3], "bottom": True}
    ready = plan(options(output, python, single_weights=4, **many))
    # a layer, by k: noise on 2 tops and 2 bottoms with 2 seeds, 2 random ones; flipped 2 tops, 2 bottoms, 2 random ones
    assert ready.cost == ("268 measurements (8 targets x 32 sets of weights, 12 single weights) on 90 predicted tokens")


@pytest.mark.parametrize("file", ["layer_summary_magnitude.csv", "top_5_per_layer_magnitude.csv", "baseline.json"])
def test_cut_off_file_of_the_discovery(output, python, file):
    path = output / "critical_analysis_1" / file
    path.write_bytes(path.read_bytes()[:-25])
    with pytest.raises(RequestError, match=file):
        validate.validate(options(output, python))
    assert not (output / "validation_v").exists()


def test_model_or_data_that_is_not_here(tmp_path, python):
    make_discovery(tmp_path / "a", model={"id": "models/tiny", "revision": "local-12"})
    with pytest.raises(RequestError, match="the model 'models/tiny' of critical_analysis_1 is not here"):
        plan(options(tmp_path / "a", python))
    make_discovery(tmp_path / "b", data_file="texts.txt")
    with pytest.raises(RequestError, match=r"the data file 'texts\.txt' of critical_analysis_1 is not here"):
        plan(options(tmp_path / "b", python))


def test_code_of_the_model_runs_only_when_asked_for_here(tmp_path, python):
    make_discovery(tmp_path / "a", trust_remote_code=True)
    with pytest.raises(RequestError, match="was discovered with --trust-remote-code; give it here too"):
        plan(options(tmp_path / "a", python))
    assert "--trust-remote-code" in plan(options(tmp_path / "a", python, trust_remote_code=True)).command


def test_weights_that_the_discovery_left_out_are_left_out_again(tmp_path, python):
    make_discovery(tmp_path / "a", allow_unused_weights=["*.bias", "score.*"])
    command = plan(options(tmp_path / "a", python)).command
    at = command.index("--allow-unused-weights")
    assert command[at + 1 : at + 3] == ["*.bias", "score.*"] and command[at + 3].startswith("--")
    make_discovery(tmp_path / "b", allow_unused_weights=[])
    assert "--allow-unused-weights" not in plan(options(tmp_path / "b", python)).command


@pytest.mark.parametrize("kernel", ["eager", None])
def test_attention_is_computed_as_in_the_discovery(tmp_path, python, kernel):
    make_discovery(tmp_path / "a", attn_implementation=kernel)
    command = plan(options(tmp_path / "a", python)).command
    assert [word for word in command if "attn" in word] == ([f"--attn-implementation={kernel}"] if kernel else [])


@pytest.mark.slow
def test_complete_validation_is_never_overwritten(output, python, no_plots):
    validate.validate(options(output, python))
    before = snapshot(output)
    with pytest.raises(RequestError, match="is already complete"):
        validate.validate(options(output, python))
    assert snapshot(output) == before


@pytest.mark.slow
def test_changed_discovery_is_not_mixed_in(output, python, monkeypatch):
    monkeypatch.setenv("FAKE", "fail")
    with pytest.raises(RunError, match="not finite"):
        validate.validate(options(output, python))
    path = output / "critical_analysis_1" / "top_5_per_layer_magnitude.csv"
    path.write_text(path.read_text().replace(",0.1,", ",0.2,"))
    with pytest.raises(RequestError, match="begun with another discovery"):
        validate.validate(options(output, python))
