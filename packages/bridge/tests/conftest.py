import sys
from pathlib import Path

import pytest
from bridge.instrument import process
from bridge.report import html
from discovery_folder import make_discovery
from matplotlib.figure import Figure
from validations import plain_report, stand_in


@pytest.fixture
def blank_figures(monkeypatch):
    """Files that hold only their name instead of pictures, which take seconds to draw; for tests of the text."""

    def write_name(figure, path, **options):
        Path(path).write_bytes(Path(path).name.encode())

    monkeypatch.setattr(Figure, "savefig", write_name)


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(html, "write_report", plain_report)


@pytest.fixture
def python(tmp_path, monkeypatch) -> str:
    """A Python that takes the place of llm_perturb's, beside a script that takes the place of the instrument's."""
    monkeypatch.setattr(process, "SCRIPT", stand_in(tmp_path / "run_topk_perturb.py"))
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("FAKE_STARTS", str(tmp_path / "starts.jsonl"))
    return str(wrapper)


@pytest.fixture
def output(tmp_path) -> Path:
    """A folder with one discovery run in it."""
    folder = tmp_path / "out puts"
    make_discovery(folder)
    return folder
