"""Every package declares what it imports, and imports what it declares."""

import ast
import sys
import tomllib

import pytest
from conftest import PACKAGES

DISTRIBUTIONS = {
    "bridge": "critical-weights-bridge",
    "critical_weight_analysis": "critical-weights-discovery",
    "llm_perturb": "critical-weights-perturb",
    "yaml": "pyyaml",
}  # where the name differs from the import's
NEVER_IMPORTED = {
    "gguf": "transformers reads GGUF files with it",
}
IMPORTED_ELSEWHERE = {"bridge": {"torch"}}  # count_gpus is run by the Python of the instrument
NAMES = ["bridge", "critical_weight_analysis", "llm_perturb"]


def imports_of(source: str) -> set[str]:
    """The distributions whose modules a source file imports, at its top or inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module)
    roots = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    return {DISTRIBUTIONS.get(root, root) for root in roots}


def imports_of_package(name: str) -> set[str]:
    folder = PACKAGES / name
    files = [*(folder / "src").rglob("*.py"), *folder.glob("scripts/*.py"), *folder.glob("*.py")]
    imported = set().union(*(imports_of(file.read_text()) for file in files))
    return imported - {DISTRIBUTIONS[name]} - IMPORTED_ELSEWHERE.get(name, set())


def project_of(name: str) -> dict:
    return tomllib.loads((PACKAGES / name / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", NAMES)
def test_a_package_declares_what_it_imports_and_nothing_else(name):
    project = project_of(name)
    assert project["name"] == DISTRIBUTIONS[name]
    declared = set(project["dependencies"])
    imported = imports_of_package(name)
    assert imported - declared == set(), "imported, but not declared in pyproject.toml"
    unused = declared - imported - NEVER_IMPORTED.keys()
    assert unused == set(), "declared in pyproject.toml, but not imported"


def test_what_is_never_imported_is_not_imported():
    imported = set().union(*(imports_of_package(name) for name in NAMES))
    assert imported & NEVER_IMPORTED.keys() == set(), "this entry is no longer needed here"


def test_imports_are_read_from_the_source():
    lines = [
        "import os, yaml.loader",
        "from torch.nn import Linear",
        "from . import x",
        "def f(): from bridge import y",
    ]
    assert imports_of("\n".join(lines)) == {"critical-weights-bridge", "pyyaml", "torch"}


def test_the_packages_share_one_version():
    for name in NAMES:
        assert (PACKAGES / name / "VERSION").readlink().as_posix() == "../../VERSION"
        assert project_of(name)["dynamic"] == ["version"]
