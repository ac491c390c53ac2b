"""The whole path killed again and again: the same command goes on, and ends with the tables of a quiet run."""

import os
import random
import shutil
import signal
import subprocess
import time
from functools import cache

import pytest
from conftest import PACKAGES
from survivors import MARK, marked, survivors
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


def kill(process, mark, first):
    """SIGKILL to ``bridge validate``; to all that it started first, or to none of these; nothing of it may be left."""
    victims = set(marked(mark)) - {process.pid} if first else set()
    for pid in [*victims, process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()
    assert survivors(mark) == {}


@pytest.fixture(scope="module")
def quiet(discovery, offline):
    """Measure without a break in so many processes: the folder, and how many seconds that took."""

    @cache
    def measure(n_processes):
        began = time.monotonic()
        name = f"quiet{n_processes}"
        process = start(discovery, offline, f"--experiment-id={name}", f"--num-processes={n_processes}")
        _, err = process.communicate()
        assert process.returncode == 0, err[-2000:]
        return discovery / f"validation_{name}", time.monotonic() - began

    return measure


def moments(draw, n_processes, takes):
    """When to kill, in seconds: of one process over the whole time, of several while they are being started."""
    if n_processes == 1:
        return sorted(draw.uniform(0.2, 1.0) * takes for _ in range(3))
    return sorted(draw.uniform(0.5, 5.0) for _ in range(2))


@pytest.mark.parametrize(("n_processes", "seed"), [(1, 1), (2, 2)])
def test_kills_at_random_moments_change_no_table(discovery, quiet, offline, tmp_path, n_processes, seed):
    draw, output, temporary = random.Random(seed), tmp_path / "out", tmp_path / "temporary"
    expected, takes = quiet(n_processes)
    shutil.copytree(discovery, output, ignore=shutil.ignore_patterns("validation_*"))
    temporary.mkdir()
    mark = f"{output}-{seed}"
    environment = offline | {MARK: mark, "TMPDIR": str(temporary)}
    killed = 0
    for moment in moments(draw, n_processes, takes):
        process = start(output, environment, f"--num-processes={n_processes}")
        try:
            process.communicate(timeout=moment)
            break  # it was faster
        except subprocess.TimeoutExpired:
            kill(process, mark, first=n_processes == 1 and killed % 2)  # the instrument first, or the bridge alone
            killed += 1
    assert killed
    assert len(list(output.glob("validation_*"))) <= 1
    if n_processes > 1:
        kill_launcher(output, environment, n_processes, mark)
    if not list(output.glob("validation_*/report.html")):
        process = start(output, environment, f"--num-processes={n_processes}")
        _, err = process.communicate()
        assert process.returncode == 0, err[-2000:]
    (folder,) = output.glob("validation_*")
    for table in TABLES:
        assert (folder / table).read_bytes() == (expected / table).read_bytes(), table
    assert not list(folder.rglob("*.tmp"))
    assert not list(temporary.glob("torchelastic_*"))  # the folders for logs that the launcher makes of itself
    again = start(output, offline, "--experiment-id", folder.name.removeprefix("validation_"))
    assert "is already complete" in again.communicate()[1]
    assert again.returncode == 2


def kill_launcher(output, environment, n_processes, mark):
    """Kill what starts the processes as soon as it has started them: a failed run, of which nothing is left."""
    process = start(output, environment, f"--num-processes={n_processes}")
    deadline = time.monotonic() + 120
    while (
        len([pid for pid, words in marked(mark).items() if " -u -m bridge.instrument.worker " in words]) < n_processes
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    (launcher,) = [pid for pid, words in marked(mark).items() if " -m accelerate.commands.launch " in words]
    os.kill(launcher, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err[-2000:]
    assert "run_topk_perturb.py was ended by signal 9 (SIGKILL)" in err.splitlines()[-1]
    assert survivors(mark) == {}


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
