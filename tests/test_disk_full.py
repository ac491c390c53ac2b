"""Every command on a file system that becomes full: one line, exit code 1; with more room it goes on."""

import os
import subprocess
from pathlib import Path

import pytest
from bridge.exchange.existing_runs import read_manifest
from conftest import PACKAGES
from tiny_models import save_checkpoint, word_tokenizer

PYTHON = PACKAGES / "critical_weight_analysis" / ".venv" / "bin" / "python"
BRIDGE = PACKAGES / "bridge" / ".venv" / "bin" / "bridge"
TEXTS = PACKAGES / "llm_perturb/src/llm_perturb/data/eval_texts.txt"
COMMON = ["--eval-limit=12", "--max-length=64", "--experiment-id=x"]
ENDS = ["top_20_weights_grad_x_weight.csv", "baseline.json", "measurements.csv", "correlations.csv"]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A folder on a file system of its own, in memory."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, "neox", n_layers=3, tokenizer=word_tokenizer(TEXTS.read_text()))
    return folder


def commands(model: Path, output: Path) -> dict[str, list[str]]:
    """The commands in their order, by the kind of their run folder."""
    scripts = PACKAGES / "llm_perturb" / "scripts"
    weights = ["--k", "5", "--selection", "top", "random", "--target-layer", "gpt_neox.layers.1"]
    measured = ["--model", model, "--output", output, *COMMON]
    discovery = PACKAGES / "critical_weight_analysis/phase1_runner.py"
    flags = ["--from", output, "--output", output, "--control-layers", "3", "--seeds", "0", "--experiment-id=x"]
    return {
        "critical_analysis": [PYTHON, discovery, "--topk", "20", *measured],
        "baseline": [PYTHON, scripts / "run_baseline.py", *measured],
        "perturb": [PYTHON, scripts / "run_topk_perturb.py", *weights, *measured],
        "validation": [BRIDGE, "validate", *flags],
    }


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


def fill(folder: Path, left: int) -> Path:
    """A file that leaves so many bytes free."""
    state = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - left)))
    return filler


def test_a_full_disk_ends_each_command_in_one_line_and_it_goes_on_with_more_room(small_disk, model, offline):
    disk, left = small_disk, 100_000
    output = disk / "out"
    output.mkdir()
    n_failed = 0
    for (kind, command), table in zip(commands(model, output).items(), ENDS, strict=True):
        filler = fill(disk, left)
        done = run(command, offline)
        folder = output / f"{kind}_x"
        if done.returncode != 0:  # with more room left, a command that writes little may end well
            name = "bridge validate" if kind == "validation" else Path(command[1]).name
            own = [line for line in done.stderr.splitlines() if line.startswith(f"{name}: error: ")]
            assert (done.returncode, len(own)) == (1, 1), done.stderr[-2000:]
            assert "no room on the disk" in own[0] or "No space left" in own[0]
            assert "Traceback" not in done.stderr
            assert not list(folder.rglob("*.tmp"))
            manifest = read_manifest(folder)
            assert manifest["status"] == "failed" and "No space left" in manifest["error"]
            n_failed += 1
        filler.unlink()
        if done.returncode != 0:
            done = run(command, offline)
        assert done.returncode == 0, done.stderr[-2000:]
        assert read_manifest(folder)["status"] == "complete"
        assert (folder / table).stat().st_size > 0
        assert not (folder / ".reserve").exists()
    assert n_failed >= 2
