"""Run a script as one of several processes that end with their launcher: ``python -m bridge.instrument.worker SCRIPT FLAGS``."""

import os
import runpy
import sys

from bridge.instrument.process import end_with

if __name__ == "__main__":
    end_with(os.getppid())
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # noqa: PTH100, PTH120 - what Python itself puts there
    runpy.run_path(sys.argv[0], run_name="__main__")
