"""The arrows between the rooms, read from the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import llm_perturb

ROOT = Path(llm_perturb.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def imported(file):
    """The modules that a file imports, names imported from packages included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_of_bridge_only_the_exchange_formats_are_imported():
    from_bridge = {(file.name, name) for file in FILES for name in imported(file) if name.split(".")[0] == "bridge"}
    assert len(from_bridge) > 10
    assert {(file, name) for file, name in from_bridge if not name.startswith("bridge.exchange.")} == set()


def test_discovery_is_not_imported():
    assert not any(name.startswith("critical_weight_analysis") for file in FILES for name in imported(file))


def test_evaluation_imports_nothing_of_the_rest():
    files = sorted((ROOT / "evaluation").glob("*.py"))
    own = {(file.name, name) for file in files for name in imported(file) if name.split(".")[0] == "llm_perturb"}
    assert len(own) > 5
    assert {(file, name) for file, name in own if not name.startswith("llm_perturb.evaluation.")} == set()


def test_importing_the_package_loads_no_torch():
    code = "import llm_perturb, sys; assert 'torch' not in sys.modules, 'torch'; print('done')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "done\n"
