import errno
import json
import os
import subprocess
import sys
from typing import TypedDict

import pytest
from bridge.exchange import run_folder
from bridge.exchange.atomic_file import write_json
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.existing_runs import find_runs, read_manifest
from bridge.exchange.fingerprint import read_fingerprint
from bridge.exchange.run_folder import check_output
from bridge.exchange.run_lock import is_locked
from discovery_folder import fingerprint

IDENTITY = {"options": {"k": [100], "seeds": (0, 1)}, "model": {"id": "tiny"}}


OPENED = []


@pytest.fixture(autouse=True)
def release_all():
    yield
    while OPENED:
        release(OPENED.pop())


def open_run(*args, **more):
    OPENED.append(run_folder.open_run(*args, **more))
    return OPENED[-1]


def release(run):
    """Let go of a run as a kill would: nothing written, the lock free."""
    run.release()


def complete(output, kind="perturb", name=None, ended=None, identity=IDENTITY):
    run = open_run(output, kind, identity, name)
    run.finish("complete")
    if ended:
        write_json(run.folder / "manifest.json", read_manifest(run.folder) | {"ended": ended})
    return run.folder


def test_new_run_says_that_it_runs(tmp_path):
    run = open_run(tmp_path, "perturb", IDENTITY, "a", {"device": "cpu"})
    manifest = read_manifest(tmp_path / "perturb_a")
    assert not run.resumed
    assert manifest["status"] == "running"
    assert manifest["identity"]["options"] == {"k": [100], "seeds": [0, 1]}
    assert manifest["device"] == "cpu"
    assert manifest["ended"] is None
    assert manifest["host"]["versions"]["bridge"]


def test_killed_run_is_resumed_with_its_records_and_warnings(tmp_path, capsys):
    first = open_run(tmp_path, "perturb", IDENTITY)
    first.append({"row": 1})
    first.append({"row": 3}, writer=1)
    first.warn("odd")
    release(first)
    second = open_run(tmp_path, "perturb", IDENTITY)
    assert second.resumed
    assert second.folder == first.folder
    assert second.records(dict) == [{"row": 1}, {"row": 3}]
    assert second.manifest["warnings"] == ["odd"]
    assert second.manifest["started"] == first.manifest["started"]
    assert capsys.readouterr().err == "WARNING: odd\n"


def test_further_processes_append_records_without_the_lock(tmp_path):
    first = open_run(tmp_path, "perturb", IDENTITY, "a")
    second = run_folder.Run(first.folder, {"warnings": []}, resumed=False)
    second.append({"row": 2}, writer=1)
    second.release()
    assert first.records(dict) == [{"row": 2}]
    assert is_locked(first.folder)


def test_line_cut_short_by_a_kill_is_dropped_and_the_log_goes_on(tmp_path):
    first = open_run(tmp_path, "perturb", IDENTITY, "a")
    first.append({"row": 1, "name": "ü"})
    with (first.folder / "progress-0.jsonl").open("ab") as stream:
        stream.write(b'{"row": 2, "na')
    release(first)
    second = open_run(tmp_path, "perturb", IDENTITY, "a")
    assert second.records(dict) == [{"row": 1, "name": "ü"}]
    second.append({"row": 2})
    assert second.records(dict) == [{"row": 1, "name": "ü"}, {"row": 2}]


@pytest.mark.parametrize(
    "line", [b"cos\nsystem\n(S'x'\ntR.", b"\x80\x04\x95", b"[1]", b"{", b"[" * 10**5, b"", b'00000000 {"row": 1}']
)
def test_damaged_line_of_the_log_is_set_aside_and_the_others_stay(tmp_path, line, capsys):
    run = open_run(tmp_path, "perturb", IDENTITY, "a")
    run.append({"row": 1})
    with (run.folder / "progress-0.jsonl").open("ab") as stream:
        stream.write(line + b"\n")
    run.append({"row": 3})
    assert run.records(dict) == [{"row": 1}, {"row": 3}]
    assert (
        "progress-0.jsonl are damaged; they are now in progress-0.jsonl.damaged, and what they held"
        in capsys.readouterr().err
    )
    assert (run.folder / "progress-0.jsonl.damaged").read_bytes() == line + b"\n"
    assert run.records(dict) == [{"row": 1}, {"row": 3}]
    assert capsys.readouterr().err == ""


def test_a_log_that_is_no_file_is_set_aside(tmp_path, capsys):
    run = open_run(tmp_path, "perturb", {"a": 1}, "x")
    (run.folder / "progress-0.jsonl").mkdir()
    (run.folder / "progress-1.jsonl").symlink_to(run.folder / "progress-1.jsonl")
    assert run.records(dict) == []
    assert "progress-0.jsonl is no file; it is now progress-0.jsonl.damaged, and" in capsys.readouterr().err
    assert (run.folder / "progress-1.jsonl.damaged").is_symlink()
    run.release()


def test_a_record_of_another_form_is_set_aside(tmp_path):
    run = open_run(tmp_path, "perturb", IDENTITY, "a")
    for record in ({"row": 1}, {"row": "1"}, {}, {"row": 2, "more": None}):
        run.append(record)
    assert run.records(TypedDict("Form", {"row": int})) == [{"row": 1}, {"row": 2, "more": None}]
    assert len(run.records(dict)) == 2


def test_what_is_damaged_later_does_not_replace_what_was_damaged_before(tmp_path, capsys):
    run = open_run(tmp_path, "perturb", IDENTITY, "a")
    log = run.folder / "progress-0.jsonl"
    for line in (b"first\n", b"second\n", b"third\n"):
        with log.open("ab") as stream:
            stream.write(line)
        assert run.records(dict) == []
    aside = [log.with_name(f"{log.name}.damaged{number}") for number in ("", ".2", ".3")]
    assert [path.read_bytes() for path in aside] == [b"first\n", b"second\n", b"third\n"]
    assert "they are now in progress-0.jsonl.damaged.3, and" in capsys.readouterr().err


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_record_that_the_full_disk_takes_half_of_is_taken_back(tmp_path, monkeypatch):
    run = open_run(tmp_path, "perturb", IDENTITY, "a")
    run.append({"row": 1})
    before = (run.folder / "progress-0.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run.append({"row": 2})
    assert (run.folder / "progress-0.jsonl").read_bytes() == before


def test_the_first_error_counts_where_the_manifest_cannot_be_written(tmp_path, monkeypatch):
    run = open_run(tmp_path, "perturb", IDENTITY, "a")
    with pytest.raises(RunError, match="the first"), run.recorded():
        monkeypatch.setattr(os, "fsync", full_disk)
        run.warn("cannot be recorded either")
        raise RunError("the first")
    assert not is_locked(run.folder)


def test_a_damaged_manifest_of_another_run_is_passed_over(tmp_path, capsys):
    (tmp_path / "perturb_0").mkdir()
    (tmp_path / "perturb_0" / "manifest.json").write_text("{")
    (tmp_path / "perturb_1" / "manifest.json").mkdir(parents=True)
    run = open_run(tmp_path, "perturb", IDENTITY)
    run.finish("complete")
    assert find_runs(tmp_path, "perturb") == [run.folder]
    said = capsys.readouterr().err
    assert "perturb_0 is passed over" in said and "perturb_1 is passed over" in said


def test_warning_cannot_speak_to_the_terminal(tmp_path, capsys):
    run = open_run(tmp_path, "perturb", IDENTITY, "a")
    run.warn("odd\x1b[2J\nerror: \u202efine")
    run.warn("odd\x1b[2J\nerror: \u202efine")
    assert capsys.readouterr().err == 2 * "WARNING: odd\\x1b[2J\\nerror: \\u202efine\n"
    assert read_manifest(run.folder)["warnings"] == ["odd\\x1b[2J\\nerror: \\u202efine"]


def test_failed_run_is_resumed_and_complete_run_is_not(tmp_path):
    first = open_run(tmp_path, "perturb", IDENTITY)
    first.finish("failed")
    second = open_run(tmp_path, "perturb", IDENTITY)
    assert second.folder == first.folder
    second.append({"row": 1})
    second.finish("complete", n=1)
    assert read_manifest(second.folder)["n"] == 1
    assert list(second.folder.glob("progress*")) == []
    assert open_run(tmp_path, "perturb", IDENTITY).folder != first.folder


def test_complete_folder_is_never_written_to(tmp_path):
    folder = complete(tmp_path, name="a")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(RequestError, match=r"perturb_a is already complete; choose another --experiment-id"):
        open_run(tmp_path, "perturb", IDENTITY, "a")
    assert (folder / "manifest.json").read_bytes() == before


def test_other_identity_is_refused_by_name_or_gets_its_own_folder(tmp_path):
    release(open_run(tmp_path, "perturb", IDENTITY, "a"))
    other = {"options": {"k": [500], "seeds": [0, 1]}, "model": {"id": "big"}}
    with pytest.raises(RequestError, match="begun with another model, k; choose"):
        open_run(tmp_path, "perturb", other, "a")
    assert open_run(tmp_path, "perturb", other).folder.name != "perturb_a"


def test_fingerprint_is_kept_and_another_one_is_not_resumed(tmp_path):
    run = open_run(tmp_path, "perturb", IDENTITY, "a", fingerprint=fingerprint())
    assert run.manifest["identity"]["fingerprint"] == fingerprint().totals
    assert read_fingerprint(run.folder) == fingerprint()
    release(run)
    same = open_run(tmp_path, "perturb", IDENTITY, fingerprint=fingerprint())
    assert same.resumed and same.folder == run.folder
    release(same)
    changed = fingerprint("model.layers.7.mlp.weight")
    message = r"begun with another fingerprint \(the models differ in model\.layers\.7\.mlp\.weight\); choose"
    with pytest.raises(RequestError, match=message):
        open_run(tmp_path, "perturb", IDENTITY, "a", fingerprint=changed)
    assert read_fingerprint(run.folder) == fingerprint()
    assert open_run(tmp_path, "perturb", IDENTITY, fingerprint=changed).folder != run.folder


def test_run_begun_without_a_fingerprint_is_not_resumed_with_one(tmp_path):
    release(open_run(tmp_path, "perturb", IDENTITY, "a"))
    with pytest.raises(RequestError, match="begun with another fingerprint; choose"):
        open_run(tmp_path, "perturb", IDENTITY, "a", fingerprint=fingerprint())


def test_two_processes_never_share_a_folder(tmp_path):
    run = open_run(tmp_path, "perturb", IDENTITY, "a")
    code = (
        "import sys; from pathlib import Path; from bridge.exchange.run_folder import open_run\n"
        f"open_run(Path(sys.argv[1]), 'perturb', {IDENTITY!r}, 'a')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "another process is at work in" in done.stderr
    assert is_locked(run.folder)
    run.finish("failed")
    assert not is_locked(run.folder)
    assert not is_locked(tmp_path / "none")


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "perturb_a").mkdir()
    (tmp_path / "perturb_a" / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="holds files of something else"):
        open_run(tmp_path, "perturb", IDENTITY, "a")
    (tmp_path / "perturb_b").write_text("a file")
    with pytest.raises(RequestError, match="perturb_b is a file"):
        open_run(tmp_path, "perturb", IDENTITY, "b")


def test_kill_before_the_first_manifest_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        open_run(tmp_path, "perturb", IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_was_writing_is_removed_when_its_run_goes_on(tmp_path):
    first = open_run(tmp_path, "perturb", IDENTITY)
    (first.folder / "plots" / ".hidden.tmp").mkdir(parents=True)
    (first.folder / "plots" / ".hidden.tmp" / "0-0").touch()
    (first.folder / ".table.csv.123.tmp").touch()
    (first.folder / "table.tmp").touch()
    release(first)
    second = open_run(tmp_path, "perturb", IDENTITY)
    assert second.folder == first.folder
    names = {path.name for path in second.folder.rglob("*")}
    assert names == {".lock", ".reserve", "manifest.json", "plots", "table.tmp"}


def test_what_a_process_killed_at_its_very_end_left_is_removed_by_the_same_command(tmp_path):
    folder = complete(tmp_path, name="a")
    (folder / "progress-0.jsonl").touch()
    (folder / ".table.csv.123.tmp").touch()
    with pytest.raises(RequestError, match="is already complete"):
        open_run(tmp_path, "perturb", IDENTITY, "a")
    assert {path.name for path in folder.iterdir()} == {".lock", "manifest.json"}


def test_kill_before_the_first_manifest_leaves_a_usable_folder(tmp_path):
    folder = tmp_path / "perturb_a"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".manifest.json.123.tmp").write_text("{")
    assert not open_run(tmp_path, "perturb", IDENTITY, "a").resumed


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/x"])
def test_experiment_id_is_a_plain_name(tmp_path, name):
    with pytest.raises(RequestError, match="must be a plain name"):
        open_run(tmp_path, "perturb", IDENTITY, name)


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    folders = {complete(tmp_path) for _ in range(3)}
    assert len(folders) == 3


def test_output_is_made_or_refused(tmp_path):
    assert check_output(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be created"):
        check_output(str(tmp_path / "file"))
    with pytest.raises(RequestError, match="cannot be created"):
        check_output(str(tmp_path / "file" / "below"))


def test_output_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(RequestError, match="is not writable"):
        check_output(str(tmp_path))


def test_find_runs(tmp_path):
    new = complete(tmp_path, name="a", ended="2026-02-01T00:00:00+0000")
    old = complete(tmp_path, name="b", ended="2026-01-01T00:00:00+0000")
    release(open_run(tmp_path, "perturb", IDENTITY, "c"))
    complete(tmp_path, "baseline", "d")
    assert find_runs(tmp_path, "perturb") == [old, new]
    assert find_runs(old, "perturb") == [old]
    renamed = old.rename(tmp_path / "the good one")
    assert find_runs(renamed, "perturb") == [renamed]


def test_find_runs_says_what_is_there(tmp_path):
    release(open_run(tmp_path, "perturb", IDENTITY, "c"))
    with pytest.raises(RequestError, match=r"holds no complete perturb_\* run \(1 unfinished\)"):
        find_runs(tmp_path, "perturb")
    with pytest.raises(RequestError, match=r"holds no complete critical_analysis_\* run$"):
        find_runs(tmp_path, "critical_analysis")
    with pytest.raises(RequestError, match="no such folder"):
        find_runs(tmp_path / "none", "perturb")


def test_manifest_of_another_version_or_damaged(tmp_path):
    folder = complete(tmp_path, name="a")
    write_json(folder / "manifest.json", json.loads((folder / "manifest.json").read_text()) | {"schema": 99})
    with pytest.raises(RequestError, match="has schema 99, this version reads 1"):
        read_manifest(folder)
    (folder / "manifest.json").write_text('{"schema": 1')
    with pytest.raises(RequestError, match="is damaged"):
        read_manifest(folder)
    with pytest.raises(RequestError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
