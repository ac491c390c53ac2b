"""The two ways a command may stop: the request was wrong, or the run failed."""


class RequestError(Exception):
    """The person asked for something that cannot be done: one line on stderr, exit code 2."""


class RunError(Exception):
    """The run itself failed, and its numbers must not be used: one line on stderr, exit code 1."""


def one_line(error: BaseException) -> str:
    """What an exception is and says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
