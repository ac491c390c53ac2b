"""Temporary folders that no killed process leaves behind for good.

A folder carries the name of the process that made it and of its machine. Whoever makes one in the same parent folder
first removes those of this machine whose process has ended.
"""

import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.exchange import parent_process

_SUFFIX = ".tmp"  # as of the files that are written before they are renamed
_FOLDER = re.compile(r"\.critical_weights-(?P<process>\d+:[^@]+)@(?P<machine>.*)-\w+\.tmp")


def make_scratch(parent: Path | None = None) -> Path:
    """A new temporary folder, which whoever makes it removes.

    Args:
        parent: the folder that it is made in; None for the system's folder of temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    machine = platform.node()
    for folder in parent.glob(f".critical_weights-*{_SUFFIX}"):
        match = _FOLDER.fullmatch(folder.name)
        if match and match["machine"] == machine and not parent_process.lives(match["process"]):
            shutil.rmtree(folder, ignore_errors=True)
    prefix = f".critical_weights-{parent_process.name_of_this()}@{machine}-"
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=parent))


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder for the block; see ``make_scratch``."""
    folder = make_scratch(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes were writing in a folder, and below it, in which nobody is at work."""
    for path in folder.rglob(f".*{_SUFFIX}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
