"""Validations in several processes: how many, and how they end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bridge import validate
from bridge.exchange.errors import RequestError, RunError
from bridge.instrument import process
from bridge.instrument.plan import plan
from discovery_folder import snapshot
from validations import NEW, TABLES, alive, command, options, starts, wait_for

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Say how many GPUs the instrument's torch finds, of a machine with three cores."""

    def has(n_gpus: int) -> None:
        body = f"def is_available(): return {n_gpus > 0}\ndef device_count(): return {n_gpus}"
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("print('a word of its own')\nfrom torch import cuda")
        (tmp_path / "torch" / "cuda.py").write_text(body)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5}, raising=False)
    return has


def test_several_processes_are_started_by_the_launcher_from_the_shipped_configuration(output, python, machine):
    machine(0)
    one, three = (plan(options(output, python, num_processes=n)) for n in (1, 3))
    start = three.command[: -len(one.command) + 2]
    assert one.command[:2] == [python, str(process.SCRIPT)]
    assert three.command[len(start) :] == one.command[2:]
    config = Path(process.__file__).parent / "accelerate_config.yaml"
    assert start[:5] == [python, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    assert start[5:7] == ["--log_dir", os.devnull]
    assert start[7:] == ["--num_processes", "3", "-m", "bridge.instrument.worker", str(process.SCRIPT)]
    assert one.identity == three.identity  # the table does not depend on it


@pytest.mark.parametrize(
    ("n_gpus", "device", "message"),
    [
        (0, "auto", "--num-processes 9 is more than this machine has cores; give at most 3"),
        (2, "auto", "--num-processes 9 is more than this machine has GPUs; give at most 2"),
        (8, "cuda", "--num-processes 9 is more than this machine has GPUs; give at most 8"),
        (9, "cpu", "--num-processes 9 is more than this machine has cores; give at most 3"),
        (9, "auto", None),
    ],
)
def test_more_processes_than_the_machine_has_room_for(tmp_path, output, python, machine, n_gpus, device, message):
    machine(n_gpus)
    chosen = options(output, python, num_processes=9, device=device)
    if message is None:
        assert plan(chosen).command[8] == "9"
        return
    before = snapshot(output)
    with pytest.raises(RequestError, match=f"^{message}$"):
        validate.validate(chosen)
    assert snapshot(output) == before and starts(tmp_path) == []


def test_environment_without_torch_cannot_say_how_many_processes_it_has_room_for(output, python):
    message = "cannot say how many GPUs there are for --num-processes: ModuleNotFoundError: No module named 'torch'"
    with pytest.raises(RequestError, match=message):
        plan(options(output, python, num_processes=2))


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("raise SystemExit(print('X: error: no such weight', file=sys.stderr) or 2)", RequestError, "refused: no such"),
        ("raise SystemExit(print('X: error: not finite', file=sys.stderr) or 1)", RunError, "exit code 1: not finite"),
    ],
)
def test_what_a_worker_said_is_found_behind_what_the_launcher_adds(tmp_path, monkeypatch, script, error, message):
    monkeypatch.setattr(process, "SCRIPT", tmp_path / "X")
    process.SCRIPT.write_text(f"import sys\n{script}")
    added = "import subprocess, sys\ncode = subprocess.call(sys.argv[1:])\n"
    added += "print('ChildFailedError:\\n  exitcode  :', code, '(pid: 7)', file=sys.stderr)\nsys.exit(1)"
    (tmp_path / "launcher.py").write_text(added)
    command = [sys.executable, str(tmp_path / "launcher.py")]
    command += [sys.executable, "-m", "bridge.instrument.worker", str(process.SCRIPT)]
    with pytest.raises(error, match=message):
        process.measure(command, cwd=tmp_path, log=tmp_path / "log", folder=tmp_path / "folder", watch=lambda: None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_worker_ends_with_its_launcher_and_finds_what_lies_beside_its_script(tmp_path):
    (tmp_path / "neighbour.py").write_text("import os\npid = os.getpid()")
    body = (
        "import neighbour, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(neighbour.pid))\ntime.sleep(60)"
    )
    (tmp_path / "script.py").write_text(body)
    start = (
        "import os, subprocess, sys\nfrom bridge.exchange import parent_process\n"
        "os.environ[parent_process.VARIABLE] = parent_process.name_of_this()\n"
        "subprocess.run([sys.executable, '-m', 'bridge.instrument.worker', *sys.argv[1:]])"
    )
    words = [str(tmp_path / "script.py"), str(tmp_path / "pid")]
    launcher = subprocess.Popen([sys.executable, "-c", start, *words])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())), 5)


def held(output, python, tmp_path) -> subprocess.Popen:
    """``bridge validate`` at work, five rows measured, until the file ``release`` exists."""
    process = command(output, python, FAKE="hold", FAKE_RELEASE=str(tmp_path / "release"))
    wait_for(lambda: any(file.read_text().count("\n") == 5 for file in output.glob(f"{NEW}/perturb_measure/progress*")))
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_killed_validation_takes_the_instrument_along_and_goes_on(tmp_path, output, python, no_plots, capsys):
    validate.validate(options(output, python, experiment_id="whole"))
    process = held(output, python, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not alive(starts(tmp_path)[-1]["pid"]), 5)
    capsys.readouterr()
    lines = validate.validate(options(output, python, experiment_id=None))
    (folder,) = output.glob(NEW)
    assert lines[0] == f"report: {folder / 'report.html'}"
    err = capsys.readouterr().err
    assert "measuring 6/40" in err
    assert "measuring 5/40" not in err
    for table in TABLES:
        assert (folder / table).read_bytes() == (output / "validation_whole" / table).read_bytes()


@pytest.mark.slow
def test_two_at_once(tmp_path, output, python):
    process = held(output, python, tmp_path)
    with pytest.raises(RequestError, match="another process is at work in"):
        validate.validate(options(output, python, experiment_id=None))
    (tmp_path / "release").touch()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith("report: ")
    assert len(list(output.glob(NEW))) == 1


@pytest.mark.slow
def test_interrupt_ends_both_and_can_be_continued(tmp_path, output, python, no_plots):
    process = held(output, python, tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not alive(starts(tmp_path)[-1]["pid"])
    validate.validate(options(output, python, experiment_id=None))
    assert len(list(output.glob(NEW))) == 1
