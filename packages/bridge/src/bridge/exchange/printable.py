"""Which characters a name may have, and how text of unknown origin is printed.

A file can hold characters that a terminal obeys instead of showing them: escape sequences, line breaks, marks that
reverse the direction of writing. A name with one of them is refused where it is read; everything that is printed
goes through ``say`` or, where a library logs it, ``escaped_logs``, which show such a character as an escape.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO
from unicodedata import category

from bridge.exchange.errors import RequestError

_JOINERS = "\u200c\u200d"  # unprintable by Unicode, yet part of words in Persian and Indic scripts, and of emoji


def is_printable(text: str) -> bool:
    """Whether a terminal shows every character of ``text`` and obeys none; spaces of any kind are printable."""
    return text.isprintable() or all(map(_is_shown, text))


def _is_shown(character: str) -> bool:
    return character.isprintable() or category(character) == "Zs" or character in _JOINERS


def escaped(text: object) -> str:
    r"""The text in one line, with an escape for each unprintable character.

    >>> escaped("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    text = str(text)
    if is_printable(text):
        return text
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def check_printable(text: str, what: str) -> str:
    """``text`` itself.

    Args:
        text: a name or another short text.
        what: what it is, for the message.

    Raises:
        RequestError: a character is unprintable; the message shows it as an escape.
    """
    if not is_printable(text):
        raise RequestError(f"{what} '{escaped(text)}' has a character that is not printable, here written as an escape")
    return text


def say(*lines: object, stream: TextIO | None = None) -> None:
    """Print lines, each escaped, at once. The only place of the packages that prints.

    Args:
        lines: each becomes one line, whatever it holds.
        stream: stdout by default.
    """
    print(*map(escaped, lines), sep="\n", file=stream or sys.stdout, flush=True)


class _EscapedRecord(logging.LogRecord):
    """A record of a log whose message, which may have several lines, is escaped."""

    def getMessage(self) -> str:  # noqa: N802 - the name is logging's
        return "\n".join(map(escaped, super().getMessage().split("\n")))


@contextmanager
def escaped_logs() -> Iterator[None]:
    """While open, the messages of all loggers are escaped, also those of libraries that quote a file's content."""
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_EscapedRecord)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)
