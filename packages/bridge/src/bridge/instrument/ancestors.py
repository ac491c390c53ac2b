"""End with the processes that started this one, however those end.

A process hands down, in the environment variable ``BRIDGE_ANCESTORS``, which processes its children descend from:
for each the process id and when it started, because the system gives an id that is free again to another process.

Where the system can (Linux), the kernel kills a process when its parent ends. A parent may have ended before that
was asked for, there may be another program between the two, and not every system can. So each process also looks
whether all that were handed down still live: once after the kernel was asked, then every two seconds.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

VARIABLE = "BRIDGE_ANCESTORS"
_SECONDS = 2.0
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def name_of_this() -> str:
    """How this process is named in ``BRIDGE_ANCESTORS``: its id and when it started."""
    return f"{os.getpid()}:{started(os.getpid())}"


def end_with_ancestors() -> None:
    """Have this process killed when one of those in ``BRIDGE_ANCESTORS`` ends, and add it there for its children.

    To be called first of all, in the main thread. Linux counts the end of the thread that started a process as the
    end of its parent, so that the parent must start processes in a thread that stays.
    """
    ancestors = os.environ.get(VARIABLE, "").split(";")
    ancestors = [name for name in ancestors if name]
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if not all(map(_lives, ancestors)):  # it ended before the kernel was asked
        raise SystemExit("the process that started this one has ended")
    os.environ[VARIABLE] = ";".join([*ancestors, name_of_this()])
    threading.Thread(target=_watch, args=(ancestors,), daemon=True).start()


def started(pid: int) -> str | None:
    """When a process started, as the system says it; None if it has ended, even if nobody has asked how yet."""
    state, start = _from_proc(pid) if sys.platform == "linux" else _from_ps(pid)
    return start if state not in {"", "Z", "X"} else None


def _from_proc(pid: int) -> tuple[str, str]:
    """State and start (clock ticks since the system's) of a process: fields 3 and 22 of proc_pid_stat(5)."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    return after_name[0], after_name[19]


def _from_ps(pid: int) -> tuple[str, str]:
    """The same (the start to the second) where there is no /proc."""
    command = ["ps", "-o", "state=", "-o", "lstart=", "-p", str(pid)]
    said = subprocess.run(command, env=os.environ | {"LC_ALL": "C", "TZ": "UTC"}, capture_output=True, text=True)
    state, _, start = said.stdout.strip().partition(" ")
    return state[:1], start.strip()


def _lives(name: str) -> bool:
    pid, _, start = name.partition(":")
    return started(int(pid)) == start


def _watch(ancestors: list[str]) -> None:
    while all(map(_lives, ancestors)):
        time.sleep(_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
