"""A module imports only its own room and lower ones, and declared libraries; tables load nothing heavy."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import bridge
import pytest

SOURCE = Path(bridge.__file__).parent
ROOMS = {  # to the rooms that it may import beside itself
    "exchange": set(),
    "exchange.command_line": {"exchange"},
    "analysis": {"exchange"},
    "instrument": {"exchange", "exchange.command_line", "analysis"},
    "report": {"exchange", "analysis"},
    "commands": {"exchange", "exchange.command_line", "analysis", "instrument", "report"},
}


def room(module: str) -> str:
    """The room of ``bridge.exchange.tables`` is exchange; what lies in no folder is a command."""
    inside = module.removeprefix("bridge.")
    return next((name for name in sorted(ROOMS, reverse=True) if f"{inside}.".startswith(f"{name}.")), "commands")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, also within functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_module_imports_only_its_own_room_and_lower_ones(path):
    own = room(".".join(["bridge", *path.relative_to(SOURCE).with_suffix("").parts]))
    modules = {module for module in imports(path) if module.startswith("bridge.")}
    upward = {module for module in modules if room(module) not in ROOMS[own] | {own}}
    assert upward == set()


def test_libraries_are_those_that_are_declared():
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # count_gpus runs in the environment of llm_perturb, which has torch
    modules = set().union(*(imports(path) for path in FILES if path.name != "count_gpus.py"))
    libraries = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"bridge"}
    names_on_pypi = {"yaml": "pyyaml"}
    assert {names_on_pypi.get(library, library) for library in libraries} == set(project["dependencies"])


def test_the_rooms_are_those_of_the_folders():
    folders = {".".join(path.relative_to(SOURCE).parent.parts) for path in SOURCE.glob("*/**/__init__.py")}
    assert folders == ROOMS.keys() - {"commands"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("bridge.exchange.tables", {"fire", "scipy", "matplotlib", "torch", "jinja2"}),
        ("bridge.exchange.discovery_run", {"fire", "scipy", "matplotlib", "torch", "jinja2"}),
        ("bridge.cli", {"scipy", "matplotlib", "torch", "jinja2"}),
    ],
)
def test_a_fresh_interpreter_loads_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert module in loaded
    assert heavy.intersection(loaded) == set()
