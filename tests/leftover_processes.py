"""Which processes are left of a command that was killed: found by a mark in their environment, parent or not."""

import time
from pathlib import Path

MARK = "TEST_MARK"


def marked(mark: str) -> dict[int, str]:
    """The processes started with ``TEST_MARK=<mark>`` in their environment, each with its command line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}\0".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or is another user's
            continue
    return found


def survivors(mark: str, seconds: float = 10.0) -> dict[int, str]:
    """Those that are still there after ``seconds``; twice none is none, for a look may miss one that just starts."""
    deadline = time.monotonic() + seconds
    while marked(mark) or marked(mark):
        if time.monotonic() > deadline:
            return marked(mark)
        time.sleep(0.1)
    return {}
