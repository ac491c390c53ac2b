"""Several processes under the launcher find what one finds."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny_models import save_checkpoint

PACKAGE = Path(__file__).parent.parent
CONFIG = PACKAGE.parents[1] / "configs" / "accelerate_config.yaml"
METRICS = ["grad_x_weight", "grad_squared", "grad_squared_token", "wanda"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, "neox", n_layers=3)
    return folder


def discover(checkpoint, output, n_processes, *more):
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(CONFIG)]
    command = [*launcher, "--num_processes", str(n_processes), "phase1_runner.py", "--model", str(checkpoint)]
    command += ["--max-length", "12", "--eval-limit", "7", "--dtype", "float64", "--topk", "50", "--metric", *METRICS]
    command += ["--output", str(output), "--experiment-id", "x", "--no-save-plots", *more]
    done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return output / "critical_analysis_x", done


@pytest.mark.slow
def test_two_processes_find_what_one_finds(checkpoint, tmp_path):
    one, _ = discover(checkpoint, tmp_path / "one", 1)
    two, done = discover(checkpoint, tmp_path / "two", 2, "--weights", "streamed", "--stability", "1")
    assert json.loads((two / "manifest.json").read_text())["world_size"] == 2
    assert done.stdout.count("written to") == 1
    assert (two / "fingerprint.json").read_bytes() == (one / "fingerprint.json").read_bytes()  # resident and streamed
    tables = sorted(path.name for path in one.glob("*.csv"))
    assert len(tables) == 18
    for table in tables:
        pd.testing.assert_frame_equal(pd.read_csv(two / table), pd.read_csv(one / table), rtol=1e-9)
    assert not list(two.glob("resume-*"))
    assert (two / "stability.csv").exists()
