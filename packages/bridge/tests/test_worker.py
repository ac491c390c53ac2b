import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from bridge.exchange import parent_process
from bridge.instrument import process
from bridge.instrument.worker import exit_code

LAUNCHER = """
import subprocess, sys
raise subprocess.CalledProcessError(int(sys.argv[1]), "a worker") if sys.argv[1] != "none" else ValueError("other")
"""


class ChildFailedError(Exception):
    """As torch has it."""

    def get_first_failure(self):
        return 1, SimpleNamespace(exitcode=self.args[0])


@pytest.mark.parametrize("error", [ChildFailedError, lambda code: subprocess.CalledProcessError(code, "worker")])
def test_the_exit_code_is_that_of_the_process_that_failed(error):
    assert [exit_code(error(code)) for code in (1, 2, -9)] == [1, 2, 137]
    assert exit_code(ValueError("no process")) is None


@pytest.mark.parametrize(("argument", "code", "traceback"), [("2", 2, False), ("none", 1, True)])
def test_only_another_exception_of_a_launcher_has_a_traceback(tmp_path, argument, code, traceback):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), parent_process.VARIABLE: parent_process.name_of_this()}
    words = [sys.executable, "-m", "bridge.instrument.worker", "-m", "launcher", argument]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == traceback


@pytest.mark.parametrize("code", [-9, 137])
def test_a_signal_is_named_whoever_reports_it(code, tmp_path):
    failure = process._failure(code, ["the last line"], tmp_path / "log", "script.py")
    assert str(failure).startswith("script.py was ended by signal 9 (SIGKILL): the last line; see ")
