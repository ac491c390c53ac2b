"""Run a script or a module in a process that ends when one of its ancestors does, if these are named to it.

python -m bridge.instrument.worker SCRIPT FLAGS
python -m bridge.instrument.worker -m MODULE FLAGS

Where the module is a launcher of other processes, and one of them fails, this process ends with that one's exit code
and says nothing: the process itself has said why. ``--verbose`` shows its log, ``--debug`` its traceback too.
"""

import logging
import os
import runpy
import subprocess
import sys

from bridge.exchange.command_line.verbosity import is_debug, is_verbose
from bridge.exchange.parent_process import VARIABLE, end_with_ancestors


def exit_code(error: Exception) -> int | None:
    """The exit code of the failed process that a launcher's exception reports; None for any other exception.

    A process that a signal ended counts as 128 and the signal's number, as in a shell.
    """
    code: int | None = None
    if isinstance(error, subprocess.CalledProcessError):
        code = error.returncode
    elif hasattr(error, "get_first_failure"):  # torch's ChildFailedError; there may be no torch here
        code = error.get_first_failure()[1].exitcode
    return 128 - code if code is not None and code < 0 else code


def _run_module(name: str) -> None:
    if not is_verbose() and not is_debug():
        logging.disable(logging.ERROR)  # torch logs each process that it ends, in its own format
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except Exception as error:
        code = exit_code(error)
        if code is None or is_debug():
            raise
        sys.exit(code)


if __name__ == "__main__":
    if VARIABLE in os.environ:  # else a person started it
        end_with_ancestors()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        _run_module(sys.argv[0])
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # noqa: PTH100, PTH120 - what Python itself puts there
        runpy.run_path(sys.argv[0], run_name="__main__")
