"""How every command ends: however it ends, a person gets one line and a shell an exit code.

| what was raised                        | line on stderr                        | exit code |
|----------------------------------------|---------------------------------------|-----------|
| RequestError                           | its message                           | 2         |
| OSError: a name is too long for a file | the beginning of the name             | 2         |
| RunError                               | its message                           | 1         |
| no memory left                         | what to lower                         | 1         |
| anything else                          | the innermost reason                  | 1         |
| KeyboardInterrupt                      | none                                  | 130       |
| BrokenPipeError                        | none                                  | 1         |

An error that has a cause of somebody else's making has its traceback written to a file that the line names: in the run
folder if one was open, else in the folder for temporary files. ``--debug`` prints it instead.
"""

import errno
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TypeGuard

from bridge.exchange.command_line.verbosity import is_debug
from bridge.exchange.errors import RequestError, RunError, innermost
from bridge.exchange.layout import TRACEBACK_FILE
from bridge.exchange.parent_process import end_with_launcher
from bridge.exchange.printable import say

_SECONDS_FOR_THE_FIRST = 10.0  # in which the launcher ends the other processes when the first one has ended
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
before_last_line: list[Callable[[], None]] = []  # called before an error is printed: progress bars are closed here


def start(module: str) -> None:
    """Import ``module``, which may take seconds, and run its ``main``; Ctrl-C ends the process at any time.

    One of several processes ends with their launcher, however that ends. While libraries are imported, Ctrl-C is no
    exception: some of them turn it into an ImportError.
    """
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    end_with_launcher()
    with one_line_errors(Path(sys.argv[0]).name):
        main = import_module(module).main
        signal.signal(signal.SIGINT, before)
        main()


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """In the block a command runs; what it raises becomes a line on stderr and an exit code.

    Args:
        name: the command's, with which the line begins.

    Raises:
        SystemExit: the block raised.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        _close_bars()
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output, such as head, has gone; nothing more can be said there
        _close_bars()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:  # nothing may pass
        _close_bars()
        _say_last_line(name, error)
        raise SystemExit(2 if isinstance(error, RequestError) or _is_too_long(innermost(error)) else 1) from None


def _close_bars() -> None:
    for close in before_last_line:
        close()


def _say_last_line(name: str, error: Exception) -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_SECONDS_FOR_THE_FIRST)  # what all processes meet the first one says, and this one is ended
    message = " ".join(message_of(error).split())
    foreseen = isinstance(error, RequestError | RunError) or _is_too_long(innermost(error))
    if is_debug():
        say(*traceback.format_exc().rstrip().split("\n"), stream=sys.stderr)
    elif not _is_full(innermost(error)) and (not foreseen or error.__cause__ is not None):
        message += _written(error)
    say(f"{name}: error: {message}", stream=sys.stderr)


def message_of(error: BaseException) -> str:
    """What an error says to a person.

    A shortage of memory is known by its type (MemoryError, torch's OutOfMemoryError) or by what torch says on the CPU.
    """
    if isinstance(error, RequestError | RunError):
        return str(error)
    deepest = innermost(error)
    if _is_full(deepest):
        return f"no room on the disk ({deepest}); make room, and start the same command again: it goes on from there"
    if _is_too_long(deepest):
        return f"{deepest.strerror}: '{str(deepest.filename)[:80]}...'"
    reason = f"{type(deepest).__name__}: {str(deepest)[:300]}"
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        return f"out of memory ({reason}); lower --batch-size or --max-length, or choose a smaller --dtype"
    return f"unforeseen {reason}"


def _is_full(error: BaseException) -> bool:
    """Whether the disk is full, or a file has become larger than it may; safetensors says it in words only."""
    full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    return full or "No space left on device" in str(error)


def _is_too_long(error: BaseException) -> TypeGuard[OSError]:
    """Whether what was named can be no file, whatever it is."""
    return isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG


def _written(error: BaseException) -> str:
    """Write the traceback; the words that name its file, none if it cannot be written."""
    text = "".join(traceback.format_exception(error))
    try:
        folder = getattr(error, "run_folder", None)
        if folder is None:
            handle, name = tempfile.mkstemp(prefix="critical_weights_", suffix=".log")
            os.close(handle)
            path = Path(name)
        else:
            path = Path(folder) / TRACEBACK_FILE
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return ""
    return f"; traceback: {path}"
