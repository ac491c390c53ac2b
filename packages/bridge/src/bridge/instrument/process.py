"""Run the measuring script of llm_perturb in its own environment: show its output, and let it never outlive this."""

import codecs
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from bridge.exchange import parent_process
from bridge.exchange.command_line.verbosity import TERMINAL
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.run_lock import is_locked

_LLM_PERTURB = Path(__file__).resolve().parents[4] / "llm_perturb"
_INSTALLED = importlib.util.find_spec("llm_perturb")  # beside this package, where both were installed from wheels


def _script(name: str) -> Path:
    """A script of the instrument: that of the repository, or the command of an installed llm_perturb."""
    script = _LLM_PERTURB / "scripts" / name
    if not script.is_file() and _INSTALLED and _INSTALLED.origin:
        return Path(_INSTALLED.origin).parent / "commands" / name
    return script


def _python() -> Path:
    """The Python of llm_perturb's environment in the repository; without one, this Python if it has llm_perturb."""
    python = _LLM_PERTURB / ".venv" / "bin" / "python"  # never resolved: through the link, Python finds its environment
    return Path(sys.executable) if not python.is_file() and _INSTALLED else python


SCRIPT = _script("run_topk_perturb.py")
MERGE = _script("merge_shards.py")
PYTHON = _python()
_SECONDS_TO_END = 30.0
_TAIL = 16_000  # characters of output; a launcher may add many after the instrument's own last line
_REFUSED = re.compile(r"exitcode\s*: 2\b")


def find_python(perturb_python: str | None) -> Path:
    """The Python that runs the instrument: that of ``--perturb-python``, or of llm_perturb's environment.

    Raises:
        RequestError: no such program, or the instrument's script is missing.
    """
    python = Path(perturb_python).absolute() if perturb_python else PYTHON
    if not python.is_file() or not os.access(python, os.X_OK):
        if perturb_python:
            raise RequestError(f"--perturb-python {perturb_python} is not a program")
        raise RequestError(
            f'llm_perturb has no environment ({python} is missing); make it with: nox -s "env(llm_perturb)"'
        )
    if not SCRIPT.is_file():
        raise RequestError(f"{SCRIPT} is missing; install bridge from its folder in the repository (pip install -e)")
    return python


def tied(command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command and environment that start a Python which ends with this process.

    Args:
        command: the Python and its arguments: a script, or ``-m`` and a module, with their own arguments.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TARGET_LAYER"}
    environment[parent_process.VARIABLE] = parent_process.name_of_this()
    return [command[0], "-m", "bridge.instrument.worker", *command[1:]], environment


def measure(
    command: Sequence[str], *, cwd: Path, log: Path, folder: Path, watch: Callable[[], None], script: Path | None = None
) -> None:
    """Run the instrument to its end; its stderr goes to stderr and, with its stdout, to ``log``.

    It never outlives this process (see ``tied``), and an exception here, Ctrl-C included, ends it too. A run that
    was killed just before this one may still be ending, so this waits until its folder is free.

    Args:
        command: as for ``tied``.
        cwd: where it runs.
        log: the output is appended to it.
        folder: the run folder that the instrument will work in.
        watch: called after each piece of output; may raise to stop the instrument.
        script: the one that the command runs, if it is not ``SCRIPT``.

    Raises:
        RequestError: the instrument refused the request; the message is its own.
        RunError: it failed or was killed.
    """
    deadline = time.monotonic() + _SECONDS_TO_END
    while is_locked(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    tied_command, environment = tied(command)
    environment[TERMINAL] = str(int(sys.stderr.isatty()))
    with log.open("ab") as log_stream:
        child = subprocess.Popen(
            tied_command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log_stream,
            stderr=subprocess.PIPE,
        )
        try:
            assert child.stderr is not None
            last_lines = _relay(child.stderr, log_stream, watch)
            code = child.wait()
        finally:
            _stop(child)
    if code != 0:
        raise _failure(code, last_lines, log, (script or SCRIPT).name)


def _failure(code: int, last_lines: list[str], log: Path, name: str) -> RequestError | RunError:
    """The instrument's failure as an exception, from its exit code and the last lines of its output."""
    prefix = f"{name}: error: "
    complaints = [line.partition(prefix)[2] for line in last_lines if prefix in line]
    complaint = complaints[-1] if complaints else last_lines[-1]
    # of several processes, the launcher reports that one ended with code 2, and ends with another code itself
    if code == 2 or any(_REFUSED.match(line) for line in last_lines):
        return RequestError(f"{name} refused: {complaint}")
    how = f"failed with exit code {code}"
    number = -code if code < 0 else code - 128  # the launcher of several processes reports a signal as a shell does
    if number in signal.valid_signals():
        how = f"was ended by signal {number} ({signal.Signals(number).name})"
    return RunError(f"{name} {how}: {complaint}; see {log}. The same command started again goes on from there")


def _relay(stream: IO[bytes], log_stream: IO[bytes], watch: Callable[[], None]) -> list[str]:
    """Copy output as it comes, progress bars included, to stderr and to the log; returns the last lines with text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tail = ""
    while chunk := os.read(stream.fileno(), 1 << 16):
        text = decoder.decode(chunk)
        sys.stderr.write(text)
        sys.stderr.flush()
        log_stream.write(chunk.replace(b"\r", b"\n"))
        log_stream.flush()
        tail = (tail + text)[-_TAIL:]
        watch()
    lines = [line.strip() for line in tail.replace("\r", "\n").split("\n")]
    return [line for line in lines if line] or ["it said nothing"]


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child if it still runs, and close its pipe."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stderr is not None:
        child.stderr.close()
