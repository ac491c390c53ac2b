"""The whole path killed again and again: the same command goes on, and ends with the tables of a quiet run."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from conftest import PACKAGES
from tiny_models import save_checkpoint, word_tokenizer

PYTHON = PACKAGES / "critical_weight_analysis" / ".venv" / "bin" / "python"
BRIDGE = PACKAGES / "bridge" / ".venv" / "bin" / "bridge"
TABLES = ("measurements.csv", "targets.csv", "correlations.csv", "single_weights.csv")
FLAGS = ["--layers=2", "--control-layers=2", "--single-weights=8", "--seeds=0"]


@pytest.fixture(scope="module")
def discovery(tmp_path_factory, offline):
    """A folder with a discovery of a random model, and the model."""
    place = tmp_path_factory.mktemp("killed")
    texts = (PACKAGES / "llm_perturb/src/llm_perturb/data/eval_texts.txt").read_text()
    save_checkpoint(place / "model", "neox", n_layers=3, tokenizer=word_tokenizer(texts))
    words = ["--metric", "grad_x_weight", "obd", "--topk", "20", "--eval-limit", "12", "--output", place / "out"]
    command = [PYTHON, PACKAGES / "critical_weight_analysis/phase1_runner.py", "--model", place / "model", *words]
    done = subprocess.run([*command, "--no-save-plots"], env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return place / "out"


def start(output, environment, *more):
    command = [BRIDGE, "validate", f"--from={output}", *FLAGS, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(pid):
    """The processes that a process has started, and theirs."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found] + [grandchild for child in found for grandchild in children(child)]


@pytest.mark.parametrize("seed", [1])
def test_kills_at_random_moments_change_no_table(discovery, offline, tmp_path, seed):
    draw, output = random.Random(seed), tmp_path / "out"
    shutil.copytree(discovery, output)
    began = time.monotonic()
    quiet = start(discovery, offline, "--experiment-id=quiet")
    _, err = quiet.communicate()
    assert quiet.returncode == 0, err[-2000:]
    takes = time.monotonic() - began
    killed = 0
    for moment in sorted(draw.uniform(0.2, 1.0) for _ in range(3)):
        process = start(output, offline)
        try:
            process.communicate(timeout=moment * takes)
            break  # it was faster
        except subprocess.TimeoutExpired:
            victims = children(process.pid) if killed % 2 else []  # the instrument first, or the bridge alone
            for pid in [*victims, process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.communicate()
            killed += 1
    assert killed
    unfinished = list(output.glob("validation_*"))
    assert len(unfinished) <= 1
    if not list(output.glob("validation_*/report.html")):
        process = start(output, offline)
        _, err = process.communicate()
        assert process.returncode == 0, err[-2000:]
    (folder,) = output.glob("validation_*")
    for table in TABLES:
        assert (folder / table).read_bytes() == (discovery / "validation_quiet" / table).read_bytes(), table
    assert not list(folder.rglob("*.tmp"))
    again = start(output, offline, "--experiment-id", folder.name.removeprefix("validation_"))
    assert "is already complete" in again.communicate()[1]
    assert again.returncode == 2


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("place", "outside of"),
        ("value", "the list was made from another model or revision"),
        ("model", "gpt_neox.layers.7."),
        ("cut", "is the file cut off?"),
    ],
)
def test_foreign_or_damaged_lists_get_one_line(discovery, offline, tmp_path, damage, complaint):
    output = tmp_path / "out"
    shutil.copytree(discovery, output, ignore=shutil.ignore_patterns("validation_*"))
    for path in output.glob("*/top_20_per_layer_*.csv"):
        header, *rows = path.read_text().splitlines()
        first = rows[0].split(",")
        change = {"place": {3: "99999"}, "value": {5: "0.777"}}.get(damage, {})
        rows = [",".join([change.get(at, cell) for at, cell in enumerate(first)]), *rows[1:]]
        text = "\n".join([header, *rows]) + "\n"
        path.write_text(text[:-20] if damage == "cut" else text)
    if damage == "model":  # every list is of one that has other layers
        for path in output.glob("*/*.csv"):
            path.write_text(path.read_text().replace("gpt_neox.layers.1.", "gpt_neox.layers.7."))
    process = start(output, offline)
    _, err = process.communicate()
    last = err.strip().splitlines()[-1]
    assert process.returncode == 2, err[-2000:]
    assert last.startswith("bridge validate: error: ") and complaint in last
    assert "Traceback" not in err
