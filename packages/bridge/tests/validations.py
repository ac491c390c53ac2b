"""Validations with a stand-in for the instrument."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bridge.instrument.validation_options import ValidationOptions

TABLES = ("measurements.csv", "targets.csv", "correlations.csv")
NEW = "validation_2*"  # named by the time
HERE = Path(__file__).parent


def plain_report(validation) -> list[str]:
    """A report without its plots, which take seconds to draw."""
    (validation.folder / "report.html").write_text("report")
    return ["a finding"]


def stand_in(script: Path) -> Path:
    """A script that hands its flags to fake_instrument.py, with its own path before them."""
    begin = f"import runpy, sys\nsys.path.insert(0, {str(HERE)!r})\nsys.argv.insert(0, '')\n"
    script.write_text(f"{begin}runpy.run_path({str(HERE / 'fake_instrument.py')!r}, run_name='__main__')\n")
    return script


def starts(tmp_path) -> list[dict]:
    file = tmp_path / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def options(place, python, **more) -> ValidationOptions:
    more = {"layers": 3, "control_layers": 4, "experiment_id": "v", "perturb_python": python, **more}
    return ValidationOptions(from_=[str(place)], **more)


def command(output, python, **environment) -> subprocess.Popen:
    """``bridge validate`` as a process of its own."""
    code = (
        "import sys; from pathlib import Path; import validations; from bridge import cli; "
        "from bridge.instrument import process; from bridge.report import html\n"
        "process.SCRIPT = Path(sys.argv.pop()); html.write_report = validations.plain_report; cli.main()"
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
