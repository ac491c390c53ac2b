from pathlib import Path

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def blank_figures(monkeypatch):
    """Files that hold only their name instead of pictures, which take seconds to draw; for tests of the text."""

    def write_name(figure, path, **options):
        Path(path).write_bytes(Path(path).name.encode())

    monkeypatch.setattr(Figure, "savefig", write_name)
