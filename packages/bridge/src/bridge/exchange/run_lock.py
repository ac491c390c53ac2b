"""The lock of a run folder: one process at a time works there."""

from pathlib import Path

from filelock import FileLock, Timeout

from bridge.exchange.errors import RequestError
from bridge.exchange.layout import LOCK_FILE


def lock_folder(folder: Path) -> FileLock:
    """The lock of a run folder, held by this process until it is released or the process ends.

    Raises:
        RequestError: another process holds it.
    """
    lock = FileLock(folder / LOCK_FILE, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RequestError(
            f"another process is at work in {folder}; wait for it, or choose another --experiment-id"
        ) from None
    return lock


def is_locked(folder: Path) -> bool:
    """Whether a process is at work in a run folder, or just about to end there."""
    if not (folder / LOCK_FILE).exists():
        return False
    try:
        lock_folder(folder).release()
    except RequestError:
        return True
    return False
