"""Every command killed at random moments: nothing is left of it, and the same command again ends with the same tables.

The moments are drawn from a seed: half of them within the first seconds; the others as soon as so many measurements
are recorded, or from the moment on at which the run folder is opened. ``KILLS=50`` in the environment asks for so many
kills of each command instead of the few of every test run.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from bridge.exchange.existing_runs import is_complete
from bridge.exchange.layout import MEASUREMENTS_FILE, SINGLE_WEIGHTS_FILE, TRACEBACK_FILE
from bridge.instrument import process as instrument
from bridge.instrument.command import launcher
from conftest import PACKAGES
from leftover_processes import MARK, marked, survivors
from tiny_models import save_checkpoint, word_tokenizer

PYTHON = PACKAGES / "critical_weight_analysis" / ".venv" / "bin" / "python"
BRIDGE = PACKAGES / "bridge" / ".venv" / "bin" / "bridge"
KILLS = int(os.environ.get("KILLS", "2"))
PER_RUN = 4  # the most that one run meets before it may end
FIRST_SECONDS = 3.0


@dataclass(frozen=True)
class Inputs:
    """What the commands read: a model, a folder of texts, and the output folder of a discovery."""

    model: Path
    texts: Path
    discovery: Path


def discover(inputs: Inputs) -> list[str]:
    words = ["--metric", "grad_x_weight", "obd", "--topk", "20", "--eval-limit", "12"]
    words += ["--model", inputs.model, "--dataset", inputs.texts, "--no-save-plots"]
    return [PYTHON, PACKAGES / "critical_weight_analysis" / "phase1_runner.py", *words]


def perturb(inputs: Inputs, n_processes: int) -> list[str]:
    """As the bridge starts it."""
    targets = "gpt_neox.layers.0.mlp.dense_h_to_4h,gpt_neox.layers.1.mlp.dense_4h_to_h"
    words = ["--target-layer", targets, "--k", "1", "5", "20", "--seeds", *map(str, range(12))]
    words += ["--model", inputs.model, "--eval-limit", "12"]
    return [*launcher(instrument.PYTHON, n_processes, "cpu"), *words]


def validate(inputs: Inputs, n_processes: int) -> list[str]:
    words = ["--layers=2", "--control-layers=2", "--single-weights=8", f"--num-processes={n_processes}"]
    return [BRIDGE, "validate", f"--from={inputs.discovery}", *words, "--seeds", *map(str, range(12))]


@dataclass(frozen=True)
class Command:
    """A command that is killed; ``kind`` is what the name of its run folder begins with."""

    kind: str
    words: Callable[[Inputs], list[str]]


COMMANDS = {
    "discovery": Command("critical_analysis", discover),
    "perturb": Command("perturb", lambda inputs: perturb(inputs, 1)),
    "perturb-2": Command("perturb", lambda inputs: perturb(inputs, 2)),
    "validate": Command("validation", lambda inputs: validate(inputs, 1)),
    "validate-2": Command("validation", lambda inputs: validate(inputs, 2)),
}


def start(words, environment, output, *more):
    words = list(map(str, [*words, *more, f"--output={output}"]))
    if "accelerate.commands.launch" in words:  # it and its processes end with the one that starts them
        words, tied = instrument.tied(words)
        environment = environment | {key: value for key, value in tied.items() if key not in os.environ}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_opened(process, output):
    """Wait until the process has written a manifest into the output folder, or ended."""
    begun = time.time()
    while process.poll() is None and not any(path.stat().st_mtime > begun for path in output.glob("*/manifest.json")):
        time.sleep(0.02)


def n_recorded(output):
    """How many measurements the progress logs in an output folder hold."""
    return sum(log.read_bytes().count(b"\n") for log in output.rglob("progress-*.jsonl"))


def n_measured(folder):
    """How many measurements a finished run has made; 0 of a discovery."""
    tables = [folder / name for name in (MEASUREMENTS_FILE, SINGLE_WEIGHTS_FILE)]
    return sum(len(pd.read_csv(table)) for table in tables if table.exists())


def wait_until_recorded(process, output, n):
    """Wait until the process has recorded its ``n``-th measurement, or ended."""
    while process.poll() is None and n_recorded(output) < n:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    texts = (PACKAGES / "llm_perturb/src/llm_perturb/data/eval_texts.txt").read_text()
    save_checkpoint(folder / "model", "neox", n_layers=2, tokenizer=word_tokenizer(texts))
    (folder / "texts").mkdir()
    (folder / "texts" / "test.txt").write_text(texts)
    return Inputs(folder / "model", folder / "texts", folder / "critical_analysis")


@pytest.fixture(scope="module")
def quiet(inputs, offline):
    """Run a command without a break, in one process: its run folder, and how many seconds it worked there."""

    @cache
    def measure(kind):
        if kind == "validation":
            measure("critical_analysis")
        (words,) = [each.words(inputs) for name, each in COMMANDS.items() if each.kind == kind and "-2" not in name]
        process = start(words, offline, inputs.discovery.with_name(kind))
        wait_until_opened(process, inputs.discovery.with_name(kind))
        begun = time.monotonic()
        _, err = process.communicate()
        assert process.returncode == 0, err[-2000:]
        (folder,) = inputs.discovery.with_name(kind).iterdir()
        return folder, time.monotonic() - begun

    return measure


def kill(process, mark, draw):
    """SIGKILL to the command, or to one of the processes that it started; wait until nothing of it is left."""
    started = sorted(set(marked(mark)) - {process.pid})
    victim = draw.choice(started) if started and draw.random() < 0.5 else process.pid
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.communicate(timeout=60)
    assert survivors(mark) == {}


def contents(folder):
    """The names of all files, and the tables; the other files hold times."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.name != TRACEBACK_FILE}
    tables = {name: path.read_bytes() for name, path in paths.items() if path.suffix in {".csv", ".parquet"}}
    return paths.keys(), tables


@pytest.mark.parametrize("number", range(0, KILLS, PER_RUN))
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_moments_it_goes_on_to_the_same_tables(name, number, inputs, quiet, offline, tmp_path):
    draw, command = random.Random(f"{name} {number}"), COMMANDS[name]
    (expected, seconds), words = quiet(command.kind), command.words(inputs)
    output, temporary, mark = tmp_path / "out", tmp_path / "temporary", str(tmp_path)
    temporary.mkdir()
    environment = offline | {MARK: mark, "TMPDIR": str(temporary)}
    for kill_number in range(min(PER_RUN, KILLS - number)):
        since = ["the start", "a measurement", "the start", "the opening"][kill_number % 4]
        process = start(words, environment, output)
        if since == "a measurement" and n_measured(expected):
            wait_until_recorded(process, output, draw.randrange(1, n_measured(expected)))
            moment = 0.0
        elif since == "the start":
            moment = draw.uniform(0, FIRST_SECONDS)
        else:
            wait_until_opened(process, output)
            moment = draw.uniform(0, seconds)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            n_files = len(list(output.rglob("*")))
            print(f"killed {moment:.2f} s after {since}: {n_files} files, {n_recorded(output)} measurements recorded")
            kill(process, mark, draw)
        if any(map(is_complete, output.glob("*/"))):
            break
    # the same command once more; where it was complete when it was killed, it says so and measures nothing again
    complete = [folder for folder in output.glob("*/") if is_complete(folder)]
    more = [f"--experiment-id={folder.name.removeprefix(f'{command.kind}_')}" for folder in complete]
    process = start(words, environment, output, *more)
    _, err = process.communicate()
    assert process.returncode == (2 if complete else 0), err[-2000:]
    assert not complete or "is already complete" in err
    (folder,) = output.iterdir()
    assert contents(folder) == contents(expected)
    assert list(temporary.iterdir()) == []


def test_of_a_killed_launcher_nothing_is_left(inputs, quiet, offline, tmp_path):
    """Killed as soon as it has started its processes: these end, and the command says which of them was killed."""
    quiet("critical_analysis")
    mark = str(tmp_path)
    process = start(validate(inputs, 2), offline | {MARK: mark}, tmp_path / "out")
    deadline = time.monotonic() + 120
    while len([words for words in marked(mark).values() if " -u -m bridge.instrument.worker " in words]) < 2:
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
def test_foreign_or_damaged_lists_get_one_line(inputs, quiet, offline, tmp_path, damage, complaint):
    output = tmp_path / "out"
    quiet("critical_analysis")
    shutil.copytree(inputs.discovery, output)
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
    process = start(validate(replace(inputs, discovery=output), 1), offline, output)
    _, err = process.communicate()
    last = err.strip().splitlines()[-1]
    assert process.returncode == 2, err[-2000:]
    assert last.startswith("bridge validate: error: ") and complaint in last
    assert "Traceback" not in err
