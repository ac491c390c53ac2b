import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from bridge import validate
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.existing_runs import read_manifest
from bridge.exchange.fingerprint import read_fingerprint, write_fingerprint
from bridge.exchange.validation_run import choose_validation
from bridge.instrument import process
from bridge.instrument.plan import plan
from bridge.instrument.validation_options import ValidationOptions
from bridge.report import html
from discovery_folder import fingerprint, make_discovery, parameters, snapshot

TABLES = ("measurements.csv", "targets.csv", "correlations.csv")
NEW = "validation_2*"  # named by the time
HERE = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("blank_figures")


def plain_report(validation) -> list[str]:
    """A report without its plots, which take seconds to draw."""
    (validation.folder / "report.html").write_text("report")
    return ["a finding"]


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(html, "write_report", plain_report)


def stand_in(script: Path) -> Path:
    """A script that hands its flags to fake_instrument.py, with its own path before them."""
    begin = f"import runpy, sys\nsys.path.insert(0, {str(HERE)!r})\nsys.argv.insert(0, '')\n"
    script.write_text(f"{begin}runpy.run_path({str(HERE / 'fake_instrument.py')!r}, run_name='__main__')\n")
    return script


@pytest.fixture
def python(tmp_path, monkeypatch) -> str:
    """A Python that takes the place of llm_perturb's, beside a script that takes the place of the instrument's."""
    monkeypatch.setattr(process, "SCRIPT", stand_in(tmp_path / "run_topk_perturb.py"))
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("FAKE_STARTS", str(tmp_path / "starts.jsonl"))
    return str(wrapper)


@pytest.fixture
def output(tmp_path) -> Path:
    """A folder with one discovery run in it."""
    folder = tmp_path / "out puts"
    make_discovery(folder)
    return folder


def starts(tmp_path) -> list[dict]:
    file = tmp_path / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def options(place, python, **more) -> ValidationOptions:
    more = {"layers": 3, "control_layers": 4, "experiment_id": "v", "perturb_python": python, **more}
    return ValidationOptions(from_=[str(place)], **more)


def command(output, python, **environment) -> subprocess.Popen:
    """``bridge validate`` as a process of its own."""
    code = (
        "import sys; from pathlib import Path; import test_validate; from bridge import cli; "
        "from bridge.instrument import process; from bridge.report import html\n"
        "process.SCRIPT = Path(sys.argv.pop()); html.write_report = test_validate.plain_report; cli.main()"
    )
    words = ["validate", f"--from={output}", "--layers", "3", "--control-layers", "4", "--perturb-python", python]
    return subprocess.Popen(
        [sys.executable, "-c", code, *words, str(Path(python).with_name("run_topk_perturb.py"))],
        env={**os.environ, "PYTHONPATH": str(HERE), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background job
    )


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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


def judging_texts(folder, content="a text that judges\n") -> Path:
    path = folder / "judging.txt"
    path.write_text(content)
    return path


@pytest.mark.slow
def test_the_damage_is_measured_on_other_texts(tmp_path, output, python):
    path = judging_texts(tmp_path)
    lines = validate.validate(options(output, python, eval_data_file=str(path), eval_limit=7))
    assert f"on {path} (" in lines[1]
    folder = output / "validation_v"
    manifest = read_manifest(folder)
    assert manifest["identity"]["corpus"]["corpus_sha256"] == "c" * 64
    assert manifest["measured_corpus"]["corpus_sha256"] == "e" * 64
    assert manifest["identity"]["evaluation"]["data_file"] == str(path)
    words = manifest["instrument"]
    assert f"--data-file={path}" in words and "--eval-limit=7" in words and "--max-length=64" in words
    assert set(pd.read_csv(folder / "measurements.csv")["baseline_nll"]) == {3.9}  # the instrument's own baseline
    report = (folder / "report.md").read_text()
    assert "Texts of the scores" in report and "shipped passages" in report
    assert "measured on other texts than gave the scores" in report
    assert "MEASURED ON THE TEXTS THAT GAVE THE SCORES" not in report


@pytest.mark.slow
def test_without_other_texts_the_report_says_so_loudly(output, python):
    validate.validate(options(output, python))
    report = (output / "validation_v" / "report.md").read_text()
    assert "MEASURED ON THE TEXTS THAT GAVE THE SCORES" in report
    captions = [line for line in report.splitlines() if line.startswith(("Each point is", "Change of loss by layer"))]
    assert captions and all(line.endswith("Measured on the texts that gave the scores.") for line in captions)


@pytest.mark.slow
def test_another_model_is_refused_on_other_texts_too(tmp_path, output, python, monkeypatch, no_plots):
    monkeypatch.setenv("FAKE", "other")
    with pytest.raises(RunError, match="the model that was measured is not the discovery's"):
        validate.validate(options(output, python, eval_data_file=str(judging_texts(tmp_path))))


def test_other_content_of_the_judging_texts_is_another_validation(tmp_path, output, python):
    path = judging_texts(tmp_path)
    chosen = options(output, python, eval_data_file=str(path))
    first = plan(chosen).identity
    assert plan(chosen).identity == first
    judging_texts(tmp_path, "other\n")
    assert plan(chosen).identity != first
    assert "evaluation" not in plan(options(output, python)).identity


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({"eval_split": "test"}, "name them with --eval-data-file or --eval-dataset"),
        ({"eval_limit": 3}, "name them with --eval-data-file or --eval-dataset"),
        ({"eval_dataset": "a", "eval_data_file": "b"}, "exclude each other"),
        ({"eval_dataset": "a", "eval_limit": 0}, "--eval-limit must be at least 1, not 0"),
        ({"eval_data_file": "gone.txt"}, "--eval-data-file gone.txt: no such file"),
    ],
)
def test_judging_texts_that_cannot_be(output, python, chosen, complaint):
    with pytest.raises(RequestError, match=complaint):
        plan(options(output, python, **chosen))


def test_a_discovery_of_an_older_version_is_measured_on_its_own_token_sequences(tmp_path, python):
    """It parsed special tokens inside texts, put no BOS token in windows and recorded a split that it did not use."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}')
    make_discovery(tmp_path / "o", dataset=str(data), split="test", packing="windows")
    words = plan(options(tmp_path / "o", python)).command
    assert "--parse-special-tokens" in words and "--window-bos=never" in words
    assert not any(word.startswith("--split") for word in words)
    new = {"parse_special_tokens": False, "window_bos": "auto", "max_length": None}
    make_discovery(tmp_path / "n", dataset="wikitext", split="test", packing="windows", **new)
    words = plan(options(tmp_path / "n", python)).command
    assert "--parse-special-tokens" not in words and "--window-bos=auto" in words and "--split=test" in words


def test_numbers_of_the_perturbations_are_handed_on_and_make_another_validation(output, python):
    kinds = ["scale", "gaussian_noise", "bit_flip", "quantize"]
    plain = plan(options(output, python, perturbations=kinds))
    given = {"factor": 0.9, "sigma": 0.5, "bit": 0, "n_bits": 8}
    ready = plan(options(output, python, perturbations=kinds, **given))
    assert "--factor=0.9 --sigma=0.5 --bit=0 --n-bits=8" in " ".join(ready.command)
    assert not any(word.startswith(("--factor", "--sigma", "--bit", "--n-bits")) for word in plain.command)
    assert ready.identity != plain.identity


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Say how many GPUs the instrument's torch finds, of a machine with three cores."""

    def has(n_gpus: int) -> None:
        body = f"def is_available(): return {n_gpus > 0}\ndef device_count(): return {n_gpus}"
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("print('a word of its own')\nfrom torch import cuda")
        (tmp_path / "torch" / "cuda.py").write_text(body)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5}, raising=False)
    return has


def test_several_processes_are_started_by_the_launcher_from_the_shipped_configuration(output, python, machine):
    machine(0)
    one, three = (plan(options(output, python, num_processes=n)) for n in (1, 3))
    start = three.command[: -len(one.command) + 2]
    assert one.command[:2] == [python, str(process.SCRIPT)]
    assert three.command[len(start) :] == one.command[2:]
    config = Path(process.__file__).parent / "accelerate_config.yaml"
    assert start[:5] == [python, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    assert start[5:7] == ["--log_dir", os.devnull]
    assert start[7:] == ["--num_processes", "3", "-m", "bridge.instrument.worker", str(process.SCRIPT)]
    assert one.identity == three.identity  # the table does not depend on it


@pytest.mark.parametrize(
    ("n_gpus", "device", "message"),
    [
        (0, "auto", "--num-processes 9 is more than this machine has cores; give at most 3"),
        (2, "auto", "--num-processes 9 is more than this machine has GPUs; give at most 2"),
        (8, "cuda", "--num-processes 9 is more than this machine has GPUs; give at most 8"),
        (9, "cpu", "--num-processes 9 is more than this machine has cores; give at most 3"),
        (9, "auto", None),
    ],
)
def test_more_processes_than_the_machine_has_room_for(tmp_path, output, python, machine, n_gpus, device, message):
    machine(n_gpus)
    chosen = options(output, python, num_processes=9, device=device)
    if message is None:
        assert plan(chosen).command[8] == "9"
        return
    before = snapshot(output)
    with pytest.raises(RequestError, match=f"^{message}$"):
        validate.validate(chosen)
    assert snapshot(output) == before and starts(tmp_path) == []


def test_environment_without_torch_cannot_say_how_many_processes_it_has_room_for(output, python):
    message = "cannot say how many GPUs there are for --num-processes: ModuleNotFoundError: No module named 'torch'"
    with pytest.raises(RequestError, match=message):
        plan(options(output, python, num_processes=2))


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("raise SystemExit(print('X: error: no such weight', file=sys.stderr) or 2)", RequestError, "refused: no such"),
        ("raise SystemExit(print('X: error: not finite', file=sys.stderr) or 1)", RunError, "exit code 1: not finite"),
    ],
)
def test_what_a_worker_said_is_found_behind_what_the_launcher_adds(tmp_path, monkeypatch, script, error, message):
    monkeypatch.setattr(process, "SCRIPT", tmp_path / "X")
    process.SCRIPT.write_text(f"import sys\n{script}")
    added = "import subprocess, sys\ncode = subprocess.call(sys.argv[1:])\n"
    added += "print('ChildFailedError:\\n  exitcode  :', code, '(pid: 7)', file=sys.stderr)\nsys.exit(1)"
    (tmp_path / "launcher.py").write_text(added)
    command = [sys.executable, str(tmp_path / "launcher.py")]
    command += [sys.executable, "-m", "bridge.instrument.worker", str(process.SCRIPT)]
    with pytest.raises(error, match=message):
        process.measure(command, cwd=tmp_path, log=tmp_path / "log", folder=tmp_path / "folder", watch=lambda: None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_worker_ends_with_its_launcher_and_finds_what_lies_beside_its_script(tmp_path):
    (tmp_path / "neighbour.py").write_text("import os\npid = os.getpid()")
    body = (
        "import neighbour, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(neighbour.pid))\ntime.sleep(60)"
    )
    (tmp_path / "script.py").write_text(body)
    start = (
        "import os, subprocess, sys\nfrom bridge.exchange import parent_process\n"
        "os.environ[parent_process.VARIABLE] = parent_process.name_of_this()\n"
        "subprocess.run([sys.executable, '-m', 'bridge.instrument.worker', *sys.argv[1:]])"
    )
    words = [str(tmp_path / "script.py"), str(tmp_path / "pid")]
    launcher = subprocess.Popen([sys.executable, "-c", start, *words])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())), 5)


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
    with pytest.raises(RequestError, match="an inclusion probability is not above 0 and at most 1"):
        plan(options(output, python, single_weights=3))


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


@pytest.fixture
def merge(tmp_path, monkeypatch):
    """The script that puts shards together, and its stand-in behind the same Python."""
    monkeypatch.setattr(process, "MERGE", stand_in(tmp_path / "merge_shards.py"))


@pytest.mark.slow
def test_shards_and_their_merge_make_the_tables_of_one_run(tmp_path, output, python, merge, no_plots):
    more = {"single_weights": 6, "experiment_id": None}
    validate.validate(options(output, python, **more | {"experiment_id": "whole"}))
    for number in (1, 2, 3):
        part, following = validate.validate(options(output, python, shard=f"{number}/3", **more))
        assert part.startswith(f"shard {number}/3: {output}/partial_validation_")
        assert "--merge THAT_FOLDER" in following
        assert not list(Path(part.partition(": ")[2]).glob("report*"))
    lines = validate.validate(options(output, python, merge=[str(output)], **more | {"experiment_id": "merged"}))
    assert choose_validation([str(output)]).folder.name == "validation_merged"  # a part is none
    for table in TABLES:
        whole = (output / "validation_whole" / table).read_bytes()
        assert (output / "validation_merged" / table).read_bytes() == whole
    assert lines == [f"report: {output / 'validation_merged' / 'report.html'}", "a finding"]
    assert len({json.dumps(start["argv"][2:-3]) for start in starts(tmp_path)[1:]}) == 1  # as the merge demands


@pytest.mark.slow
def test_parts_of_another_request_are_not_merged(output, python, merge, no_plots):
    validate.validate(options(output, python, shard="1/1"))
    with pytest.raises(RequestError, match="the 1 parts there are of another request"):
        validate.validate(options(output, python, seeds=[5], merge=[str(output)]))
    with pytest.raises(RequestError, match="holds no complete partial_validation"):
        validate.validate(options(output, python, merge=[str(output / "critical_analysis_1")]))
    assert not (output / "validation_v").exists()


@pytest.mark.slow
def test_missing_shard_is_named(output, python, merge, no_plots):
    validate.validate(options(output, python, shard="1/2"))
    with pytest.raises(RequestError, match=r"merge_shards\.py refused: shard 2/2 is missing"):
        validate.validate(options(output, python, merge=[str(output)]))


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


def held(output, python, tmp_path) -> subprocess.Popen:
    """``bridge validate`` at work, five rows measured, until the file ``release`` exists."""
    process = command(output, python, FAKE="hold", FAKE_RELEASE=str(tmp_path / "release"))
    wait_for(lambda: any(file.read_text().count("\n") == 5 for file in output.glob(f"{NEW}/perturb_measure/progress*")))
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_killed_validation_takes_the_instrument_along_and_goes_on(tmp_path, output, python, no_plots, capsys):
    validate.validate(options(output, python, experiment_id="whole"))
    process = held(output, python, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not alive(starts(tmp_path)[-1]["pid"]), 5)
    capsys.readouterr()
    lines = validate.validate(options(output, python, experiment_id=None))
    (folder,) = output.glob(NEW)
    assert lines[0] == f"report: {folder / 'report.html'}"
    err = capsys.readouterr().err
    assert "measuring 6/40" in err
    assert "measuring 5/40" not in err
    for table in TABLES:
        assert (folder / table).read_bytes() == (output / "validation_whole" / table).read_bytes()


@pytest.mark.slow
def test_two_at_once(tmp_path, output, python):
    process = held(output, python, tmp_path)
    with pytest.raises(RequestError, match="another process is at work in"):
        validate.validate(options(output, python, experiment_id=None))
    (tmp_path / "release").touch()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith("report: ")
    assert len(list(output.glob(NEW))) == 1


@pytest.mark.slow
def test_interrupt_ends_both_and_can_be_continued(tmp_path, output, python, no_plots):
    process = held(output, python, tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not alive(starts(tmp_path)[-1]["pid"])
    validate.validate(options(output, python, experiment_id=None))
    assert len(list(output.glob(NEW))) == 1
