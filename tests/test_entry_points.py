"""Every installed command starts within `one_line_errors`, before anything slow is imported."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECTS = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]
COMMANDS = {name: target for project in PROJECTS for name, target in project["project"]["scripts"].items()}
START = """
import importlib, os, signal, sys

class CtrlC:
    def find_spec(self, name, *more):
        if name == sys.argv[3]:
            print(*sys.modules)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
module, function = sys.argv[1:3]
getattr(importlib.import_module(module), function)()
"""


def test_the_commands_are_those_of_three_packages():
    assert sorted(COMMANDS) == ["bridge", "merge-shards", "phase1-runner", "run-baseline", "run-topk-perturb"]


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_during_imports_ends_a_command_without_a_word(name):
    module, function = COMMANDS[name].split(":")
    starts = "bridge.cli" if name == "bridge" else f"{module.rpartition('.')[0]}.{function}"
    sources = os.pathsep.join(str(path) for path in ROOT.glob("packages/*/src"))
    words = [sys.executable, "-u", "-c", START, module, function, starts]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": sources}, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == ""
    assert {"torch", "pandas", "fire", "transformers"}.isdisjoint(done.stdout.split())
    assert "bridge.exchange.command_line.exit_codes" in done.stdout.split()
