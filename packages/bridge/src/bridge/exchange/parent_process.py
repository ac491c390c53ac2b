"""End with the processes that started this one, however those end.

The environment variable ``BRIDGE_ANCESTORS`` tells a process which processes it descends from: the id and the start
time of each, because the system reuses the ids of processes that have ended.

On Linux the kernel kills a process when its parent ends, if the process asks for it. The parent may have ended before
that, another program may stand between the two, and other systems offer nothing of the kind. So each process also
checks that all its ancestors still live: once after the request to the kernel, then every two seconds.
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
    """The entry of this process in ``BRIDGE_ANCESTORS``: its id and its start time."""
    return f"{os.getpid()}:{started(os.getpid())}"


def end_with_ancestors() -> None:
    """Have this process killed when one of those in ``BRIDGE_ANCESTORS`` ends, and add it there for its children.

    Call it before anything else, in the main thread. Linux takes the end of the thread that started a process for the
    end of its parent, so a parent must start processes in a thread that lives as long as itself.
    """
    ancestors = os.environ.get(VARIABLE, "").split(";")
    ancestors = [name for name in ancestors if name]
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if not all(map(lives, ancestors)):  # it ended before the kernel was asked
        raise SystemExit("the process that started this one has ended")
    os.environ[VARIABLE] = ";".join([*ancestors, name_of_this()])
    threading.Thread(target=_watch, args=(ancestors,), daemon=True).start()


def end_with_launcher() -> None:
    """Have this process end with the launcher of several processes that started it, if one did; in the main thread."""
    if "TORCHELASTIC_RUN_ID" in os.environ and VARIABLE not in os.environ:
        launcher = os.getppid()
        os.environ[VARIABLE] = f"{launcher}:{started(launcher)}"
        end_with_ancestors()


def started(pid: int) -> str | None:
    """The start time of a process as the system writes it; None if it has ended, even if nobody has waited for it."""
    state, start = _from_proc(pid) if sys.platform == "linux" else _from_ps(pid)
    return start if state not in {"", "Z", "X"} else None


def _from_proc(pid: int) -> tuple[str, str]:
    """State and start (clock ticks since the system's start) of a process: fields 3 and 22 of proc_pid_stat(5)."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    return after_name[0], after_name[19]


def _from_ps(pid: int) -> tuple[str, str]:
    """State and start (to the second) of a process where there is no /proc."""
    command = ["ps", "-o", "state=", "-o", "lstart=", "-p", str(pid)]
    done = subprocess.run(command, env=os.environ | {"LC_ALL": "C", "TZ": "UTC"}, capture_output=True, text=True)
    state, _, start = done.stdout.strip().partition(" ")
    return state[:1], start.strip()


def lives(name: str) -> bool:
    """Whether a process of this machine still runs, named as by ``name_of_this``."""
    pid, _, start = name.partition(":")
    return started(int(pid)) == start


def _watch(ancestors: list[str]) -> None:
    while all(map(lives, ancestors)):
        time.sleep(_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
