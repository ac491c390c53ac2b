"""How much a command says: ``--quiet``, ``--verbose`` and ``--debug``.

The choice is kept in the environment, so that the processes that a command starts say as much as the command itself.
"""

import logging
import os
from dataclasses import dataclass

from bridge.exchange.errors import RequestError

VARIABLE = "BRIDGE_SAYS"
TERMINAL = "BRIDGE_TERMINAL"  # 1 while a command copies the output of another process to a terminal


@dataclass(frozen=True, kw_only=True)
class Verbosity:
    """Every command.

    Attributes:
        quiet: say nothing but results, warnings and errors.
        verbose: say also what the libraries log.
        debug: show the traceback of an error instead of writing it to a file.
    """

    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    def apply(self) -> None:
        """Have this process, and those that it starts, say as much.

        Raises:
            RequestError: both less and more was asked for.
        """
        if self.quiet and (self.verbose or self.debug):
            raise RequestError("--quiet says less, and --verbose and --debug say more: give one of them")
        words = [name for name in ("quiet", "verbose", "debug") if getattr(self, name)]
        if words:
            os.environ[VARIABLE] = ",".join(words)
        if is_quiet():
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
            os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        if is_verbose():
            os.environ["TRANSFORMERS_VERBOSITY"] = "info"
            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def is_quiet() -> bool:
    """Whether only results, warnings and errors are said."""
    return "quiet" in _words()


def is_verbose() -> bool:
    """Whether what the libraries log is said too."""
    return "verbose" in _words()


def is_debug() -> bool:
    """Whether the traceback of an error is shown."""
    return "debug" in _words()


def _words() -> list[str]:
    return os.environ.get(VARIABLE, "").split(",")
