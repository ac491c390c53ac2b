"""The notebook runs from top to bottom."""

import json
import subprocess

import pytest
from conftest import PACKAGES, ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PYTHON = PACKAGES / "critical_weight_analysis" / ".venv" / "bin" / "python"


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path):
    (tmp_path / "cells.py").write_text("\n".join("".join(cell["source"]) for cell in code_cells(path)))
    done = subprocess.run([PYTHON, "cells.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\nperplexity " in done.stdout
    assert done.stdout.endswith("as before: True\n")


def test_notebooks_are_kept_without_output():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code_cells(path)), path.name
