"""Start llm_perturb's measuring script in its own environment, show what it says, and end with it."""

import codecs
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.run_folder import is_locked
from bridge.instrument import ancestors

_LLM_PERTURB = Path(__file__).resolve().parents[4] / "llm_perturb"
SCRIPT = _LLM_PERTURB / "scripts" / "run_topk_perturb.py"
MERGE = _LLM_PERTURB / "scripts" / "merge_shards.py"
PYTHON = _LLM_PERTURB / ".venv" / "bin" / "python"  # never resolved: through the link, Python finds its environment
_SECONDS_TO_END = 30.0
_TAIL = 16_000  # characters: room for what the launcher adds after the instrument's own last line
_REFUSED = re.compile(r"exitcode\s*: 2\b")


def find_python(perturb_python: str | None) -> Path:
    """The Python that runs the instrument: the given one, or that of llm_perturb's environment.

    Raises:
        RequestError: there is none, or the instrument's script is not where this package was installed from.
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
        command: the Python and its arguments: a script, or ``-m`` and a module, and what they are given.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TARGET_LAYER"}
    environment[ancestors.VARIABLE] = ancestors.name_of_this()
    return [command[0], "-m", "bridge.instrument.worker", *command[1:]], environment


def measure(
    command: Sequence[str], cwd: Path, log: Path, folder: Path, watch: Callable[[], None], script: Path | None = None
) -> None:
    """Run the instrument to its end; its stderr goes to stderr and, with its stdout, to ``log``.

    It never outlives this process (see ``tied``), and an exception here, Ctrl-C included, ends it too. A run that
    was killed just before this one may still be ending, so its folder is waited for.

    Args:
        command: as for ``tied``.
        cwd: where it runs.
        log: appended to.
        folder: the run folder that it will work in.
        watch: called again and again while it speaks; may raise to stop it.
        script: the one that the command runs, if it is not ``SCRIPT``.

    Raises:
        RequestError: it refused the request; the message is its own.
        RunError: it failed or was killed.
    """
    deadline = time.monotonic() + _SECONDS_TO_END
    while is_locked(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    words, environment = tied(command)
    with log.open("ab") as kept:
        child = subprocess.Popen(
            words,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=kept,
            stderr=subprocess.PIPE,
        )
        try:
            said = _relay(child.stderr, kept, watch)
            code = child.wait()
        finally:
            _stop(child)
    if code != 0:
        raise _failure(code, said, log, (script or SCRIPT).name)


def _failure(code: int, said: list[str], log: Path, name: str) -> RequestError | RunError:
    """What became of the instrument; of several processes the launcher reports that one ended with code 2."""
    complaint = next((line for line in reversed(said) if f"{name}: error: " in line), said[-1])
    complaint = complaint.partition(f"{name}: error: ")[2] or complaint
    if code == 2 or any(_REFUSED.match(line) for line in said):
        return RequestError(f"{name} refused: {complaint}")
    how = f"was ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"failed with exit code {code}"
    return RunError(f"{name} {how}: {complaint}; see {log}. The same command started again goes on from there")


def _relay(stream: IO[bytes], kept: IO[bytes], watch: Callable[[], None]) -> list[str]:
    """Copy bytes as they come, progress bars included; the last lines that say something are returned."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tail = ""
    while chunk := os.read(stream.fileno(), 1 << 16):
        text = decoder.decode(chunk)
        sys.stderr.write(text)
        sys.stderr.flush()
        kept.write(chunk.replace(b"\r", b"\n"))
        kept.flush()
        tail = (tail + text)[-_TAIL:]
        watch()
    lines = [line.strip() for line in tail.replace("\r", "\n").split("\n") if line.strip()]
    return lines or ["it said nothing"]


def _stop(child: subprocess.Popen) -> None:
    """End the child if it still runs, and let its pipe go."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    child.stderr.close()
