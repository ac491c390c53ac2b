"""How far a long loop has come: a bar on a terminal, elsewhere a line every half minute; with ``--quiet``, neither."""

import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from bridge.exchange.command_line import exit_codes
from bridge.exchange.command_line.verbosity import TERMINAL, is_quiet
from bridge.exchange.printable import escaped, say
from tqdm import tqdm
from transformers.utils import logging

T = TypeVar("T")
SECONDS = 30.0  # between two lines


class Progress:
    """The progress of one loop, on stderr; to be closed, or used in a ``with``.

    Args:
        total: how many steps there are.
        what: what is counted.
        shown: False for a process that is not the first, or a loop that is too short.
    """

    def __init__(self, total: int, what: str, shown: bool = True) -> None:
        self.total, self.what, self.done = total, what, 0
        self._where = ""
        self._begin = self._last = time.monotonic()
        self._says_lines = shown and not is_quiet() and not on_terminal()
        self._bar: Any = None
        if shown and shows_bars():
            self._bar = tqdm(total=total, desc=what, leave=False)
            _open.append(self)

    def at(self, where: str) -> None:
        """Name what is worked on now."""
        self._where = where
        if self._bar is not None:
            self._bar.set_description_str(escaped(f"{self.what} {where}"))

    def update(self, n: int = 1) -> None:
        """Count steps that are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._says_lines and time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            say(self._line(), stream=sys.stderr)

    def _line(self) -> str:
        elapsed = time.monotonic() - self._begin
        left = elapsed / self.done * (self.total - self.done)
        times = f"{tqdm.format_interval(elapsed)} gone, about {tqdm.format_interval(left)} left"
        return f"{f'{self.what} {self._where}'.strip()}: {self.done} of {self.total} ({times})"

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            _open.remove(self)

    def __enter__(self) -> "Progress":
        """The progress itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it, however the loop ended."""
        self.close()


_open: list[Progress] = []  # those with a bar


def _close_all() -> None:
    for progress in list(_open):
        progress.close()


exit_codes.before_last_line.append(_close_all)


def over(items: Collection[T], what: str, shown: bool = True) -> Iterator[T]:
    """The items, counted as they are done."""
    with Progress(len(items), what, shown) as progress:
        for item in items:
            yield item
            progress.update()


def note(line: str) -> None:
    """Print a line on stderr, above a bar where there is one."""
    with tqdm.external_write_mode(sys.stderr):
        say(line, stream=sys.stderr)


def on_terminal() -> bool:
    """Whether stderr is a terminal, or copied to one by the command that started this process."""
    return sys.stderr.isatty() or os.environ.get(TERMINAL) == "1"


def shows_bars() -> bool:
    """Whether bars are shown at all."""
    return on_terminal() and not is_quiet()


@contextmanager
def library_bars() -> Iterator[None]:
    """While open, transformers, datasets and the hub's library show their bars only where this module shows its own.

    To be opened after datasets was imported, where it is: the import is slow, and few runs need it.
    """
    libraries: list[Any] = [logging]
    if "datasets" in sys.modules:
        libraries.append(sys.modules["datasets.utils"])
    silenced = [library for library in libraries if library.is_progress_bar_enabled() and not shows_bars()]
    for library in silenced:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in silenced:
            library.enable_progress_bar()
