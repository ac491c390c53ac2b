"""Run a script or a module as a process that ends with those that started it.

python -m bridge.instrument.worker SCRIPT FLAGS
python -m bridge.instrument.worker -m MODULE FLAGS
"""

import os
import runpy
import sys

from bridge.instrument.ancestors import end_with_ancestors

if __name__ == "__main__":
    end_with_ancestors()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # noqa: PTH100, PTH120 - what Python itself puts there
        runpy.run_path(sys.argv[0], run_name="__main__")
