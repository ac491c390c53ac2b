"""What every command promises, whatever it is given: exit code 0, 1 or 2, one line, nothing else touched."""

import hashlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

import psutil

# warnings, also of the library that reads a model's configuration, and notes
_BESIDES = re.compile(
    r"WARNING: |\[transformers\] |.*holds \d+ (validations|discovery runs); the newest is|\d+ measurements? \("
)


def hashes(folder: Path) -> dict[str, str]:
    """The content of every file in a folder, by its path; of links and folders what they are."""
    content = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            content[str(path.relative_to(folder))] = "link" if path.is_symlink() else "no file"
        else:
            content[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return content


def kept(
    call: Callable[[], int], folder: Path, written: str, marker: Path, codes: Collection[int] = (0, 1, 2)
) -> tuple[int, str]:
    """Call a command and see that it keeps the promise.

    Args:
        call: runs the command in this process; its exit code.
        folder: with every file that the command could reach.
        written: a pattern of the paths that the command may write.
        marker: what a planted pickle would make.
        codes: the exit codes that are as promised.

    Returns:
        The exit code, and what was written to stderr.
    """
    before, children = hashes(folder), _children()
    with captured() as (out, err):
        code = call()
        said, error = _read(out), _read(err)
    report = f"exit code {code}\n{error}"
    assert code in codes, report
    lines = [line for line in error.splitlines() if line.strip() and not _BESIDES.match(line)]
    assert len(lines) == (code in {1, 2}), report
    assert "Traceback" not in said + error, report
    assert "unforeseen" not in error, report
    assert not marker.exists(), f"a planted pickle was loaded\n{report}"
    assert _children() <= children, report
    after = hashes(folder)
    touched = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path for path in touched if not re.match(written, path)} == set(), report
    assert not [path for path in after if path.endswith(".tmp")], report
    return code, error


def _children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def _read(stream: TextIO) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


@contextmanager
def captured() -> Iterator[tuple[TextIO, TextIO]]:
    """While open, stdout and stderr are files: also for libraries in C, and for logs that hold on to a stream."""
    handlers = _stream_handlers()
    sys.stdout.flush()
    sys.stderr.flush()
    saved, streams = [os.dup(1), os.dup(2)], [handler.stream for handler in handlers]
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as out, warnings.catch_warnings():
        with TemporaryFile("w+", encoding="utf-8", errors="replace") as err:
            warnings.simplefilter("ignore")
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            for handler in handlers:
                handler.setStream(err)
            try:
                with redirect_stdout(out), redirect_stderr(err):
                    yield out, err
            finally:
                for number, handle in enumerate(saved, start=1):
                    os.dup2(handle, number)
                    os.close(handle)
                for handler, stream in zip(handlers, streams, strict=True):
                    handler.setStream(stream)
                for handler in _stream_handlers():  # those that the command made
                    if handler.stream in (out, err):
                        handler.setStream(sys.stderr)


def _stream_handlers() -> list[logging.StreamHandler[TextIO]]:
    """The handlers of all loggers that write to a stream which is no file of their own."""
    return [
        handler
        for logger in [logging.getLogger(), *logging.root.manager.loggerDict.values()]
        for handler in getattr(logger, "handlers", [])
        if type(handler) is logging.StreamHandler
    ]
