"""Do the tests notice a wrong change of the modules that make numbers? ``run.py PACKAGE MUTANTS`` (``draw.py``'s file).

Each mutant is written to a copy of the package's sources, and the test files of its module run on it. The repository is
not touched. A mutant that no test notices is a test that is missing, or does the same as the original; the latter stand
in ``equivalent.csv``, each with the reason; without ``after``, every mutant of the line does the same. Exit code 1 if a
mutant survives.
"""

import csv
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.csv")
SETTINGS = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text())
CPU_SECONDS, SECONDS = 60, 600
# Loaded once, before the processes that run the tests are forked from this one.
LIBRARIES = ["hypothesis", "pandas", "scipy.stats", "matplotlib.pyplot", "pyarrow.parquet", "torch", "transformers"]
LIBRARIES += [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "gpt_neox", "llama")]


def tests_pass(package: str, module: str, sources: Path, log: Path) -> bool:
    """Run the tests of a module on the package in ``sources``, in a process of its own; False also if they hang."""
    folder = ROOT / "packages" / package / "tests"
    files = [str(folder / f"test_{name}.py") for name in SETTINGS[package][module]]
    process = os.fork()
    if process == 0:
        _run_tests(files, sources, log)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def _run_tests(files: list[str], sources: Path, log: Path) -> None:
    """Run pytest with ``sources`` before all else that can be imported, and end this process."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # pytest warns, and a warning is an error, of a plugin that is imported already (anyio, by transformers).
    os.environ |= {"PYTHONPATH": str(sources), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.path.insert(0, str(sources))
    code = 1
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(int(code))


def main(package: str, mutants: Path) -> int:
    """Try the mutants, print those that survive, and count."""
    with EQUIVALENT.open(encoding="utf-8", newline="") as stream:
        equivalent = {(row["module"], row["before"], row["after"]) for row in csv.DictReader(stream)}
    for library in LIBRARIES:
        if importlib.util.find_spec(library.partition(".")[0]):
            importlib.import_module(library)
    gc.freeze()  # pytest collects garbage: not that of the libraries, in every process anew
    outcomes: Counter[str] = Counter()
    checked: set[str] = set()
    with tempfile.TemporaryDirectory() as temporary:
        sources, log = Path(temporary) / "src", Path(temporary) / "log"
        shutil.copytree(ROOT / "packages" / package / "src", sources, ignore=shutil.ignore_patterns("__pycache__"))
        for i, line in enumerate(mutants.read_text().splitlines(), start=1):
            row = json.loads(line)
            module = row["module"]
            if {(module, row["before"], after) for after in (row["after"], "")} & equivalent:
                outcomes["equivalent"] += 1
                continue
            if module not in checked and not tests_pass(package, module, sources, log):
                raise SystemExit(f"the tests of {module} fail without a mutant:\n{log.read_text()}")
            checked.add(module)
            path = sources / package / f"{module}.py"
            original = path.read_text()
            path.write_text(row["source"])
            os.utime(path, (i, i))  # the cached bytecode is told apart by the time
            outcome = "survived" if tests_pass(package, module, sources, log) else "noticed"
            path.write_text(original)
            outcomes[outcome] += 1
            print(f"{outcome}: {module}.py:{row['line']}  {row['before']}  ->  {row['after']}", flush=True)
    tried = outcomes["noticed"] + outcomes["survived"]
    print(f"{package}: {outcomes['noticed']} of {tried} noticed; {outcomes['equivalent']} equivalent left aside")
    return int(outcomes["survived"] > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
