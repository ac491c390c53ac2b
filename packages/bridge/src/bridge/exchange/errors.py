"""The two ways a command may stop: the request was wrong, or the run failed."""

import difflib
from collections.abc import Iterable


class RequestError(Exception):
    """The person asked for something that cannot be done: one line on stderr, exit code 2."""


class RunError(Exception):
    """The run itself failed, and its numbers must not be used: one line on stderr, exit code 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known word closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def innermost(error: BaseException) -> BaseException:
    """The exception at the bottom of the chain that led to this one."""
    seen = {id(error)}
    while deeper := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        if id(deeper) in seen:
            break
        seen.add(id(deeper))
        error = deeper
    return error


def one_line(error: BaseException) -> str:
    """What an exception is and says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
