import signal
import subprocess
import sys

import pytest
from bridge.exchange.scratch import make_scratch, remove_temporary, scratch_folder


@pytest.fixture
def killed(tmp_path):
    """A folder with the scratch folder of a process that was killed, a file in it."""
    code = """
import os, signal, sys
from pathlib import Path
from bridge.exchange.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "file").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.rglob("file")] == ["file"]
    return tmp_path


def test_the_next_one_removes_what_a_killed_process_left_and_nothing_else(killed):
    (left,) = killed.iterdir()
    names = [left.name.replace("@", "@another-"), ".critical_weights-of-somebody.tmp", ".another.tmp"]
    others = {killed / name for name in names}
    for path in others:
        path.mkdir()
    own = make_scratch(killed)
    assert set(killed.iterdir()) == {own, *others}
    with scratch_folder(killed) as folder:
        assert set(killed.iterdir()) == {own, folder, *others}
    assert set(killed.iterdir()) == {own, *others}


def test_in_the_systems_folder_of_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyError), scratch_folder() as folder:
        assert folder.parent == tmp_path
        assert list(folder.iterdir()) == []
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_are_removed_but_not_what_a_link_leads_to(killed, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "file").touch()
    (killed / ".link.tmp").symlink_to(outside)
    (killed / "plots").mkdir()
    for name in (".a.csv.1.tmp", "b.tmp", "plots/.c.png.1.tmp"):
        (killed / name).touch()
    remove_temporary(killed)
    assert {path.name for path in killed.rglob("*")} == {"plots", "b.tmp"}
    assert (outside / "file").exists()
