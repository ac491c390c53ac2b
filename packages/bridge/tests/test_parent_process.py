"""Killed at any moment, the process that starts the instrument leaves none behind; stubs stand in for slow programs."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bridge.exchange import parent_process
from bridge.exchange.errors import RunError
from bridge.instrument import process
from leftover_processes import MARK, marked, survivors

SCRIPT = """
import contextlib, os, time
with contextlib.suppress(BrokenPipeError):
    os.write(2, b"at work\\n")
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
n, *words = sys.argv[sys.argv.index("--num_processes") + 1 :]
workers = [subprocess.Popen([sys.executable, "-u", *words], start_new_session=True) for _ in range(int(n))]
sys.exit(max(abs(worker.wait()) for worker in workers))
"""
MEASURE = """
import sys
from pathlib import Path
from bridge.instrument import process
print("about to start", flush=True)
here = Path.cwd()
process.measure(sys.argv[1:], cwd=here, log=here / "log", folder=here / "folder", watch=lambda: None)
"""
proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")


@pytest.fixture
def place(tmp_path, monkeypatch, request) -> Path:
    """A folder with a script that sleeps and a launcher under accelerate's name; what is started carries a mark."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "accelerate" / "commands").mkdir(parents=True)
    (tmp_path / "accelerate" / "commands" / "launch.py").write_text(LAUNCHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(MARK, f"{request.node.name}-{os.getpid()}")
    return tmp_path


def command(place, n_processes) -> list[str]:
    script = str(place / "script.py")
    if n_processes == 1:
        return [sys.executable, script]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(n_processes)]
    return [*launch, "-m", "bridge.instrument.worker", script]


def start(place, n_processes) -> subprocess.Popen:
    """A process that is just about to call ``process.measure``."""
    process = subprocess.Popen(
        [sys.executable, "-c", MEASURE, *command(place, n_processes)],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in a background job
    )
    assert process.stdout.readline() == b"about to start\n"
    return process


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def n_at_work(place) -> int:
    return (place / "log").read_text().count("at work") if (place / "log").exists() else 0


@pytest.mark.slow
@proc
@pytest.mark.parametrize(("n_processes", "seed"), [(1, 1), (2, 2)])
def test_killed_at_random_moments_it_leaves_no_process(place, n_processes, seed):
    draw = random.Random(seed)
    for at in range(6):
        process = start(place, n_processes)
        if at % 2:  # from the moment on at which the last one was started, else from the first one's
            wait_for(lambda: len(marked(os.environ[MARK])) == 1 + n_processes + (n_processes > 1))
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert survivors(os.environ[MARK]) == {}


@pytest.mark.slow
@proc
@pytest.mark.parametrize("to_all", [False, True], ids=["to it alone", "to its group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_other_signals_end_all_processes_too(place, number, to_all):
    process = start(place, 2)
    wait_for(lambda: n_at_work(place) == 2)
    (os.killpg if to_all else os.kill)(process.pid, number)
    process.communicate(timeout=10)
    assert survivors(os.environ[MARK]) == {}


@proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_launcher_takes_its_workers_along_and_is_a_failed_run(place, number):
    def kill_launcher():
        for pid, words in marked(os.environ[MARK]).items():
            if "accelerate" in words and n_at_work(place) == 2:
                os.kill(pid, number)

    with pytest.raises(RunError, match=f"was ended by signal {number.value} .*The same command started again goes on"):
        process.measure(command(place, 2), cwd=place, log=place / "log", folder=place / "folder", watch=kill_launcher)
    assert survivors(os.environ[MARK]) == {}


@pytest.mark.slow
@proc
def test_without_the_bridge_too_the_processes_end_with_their_launcher(place, monkeypatch):
    code = "from bridge.exchange.command_line.exit_codes import start\nstart('sleeping')"
    (place / "sleeping.py").write_text(
        "import sys, time\ndef main():\n    print('at work', flush=True)\n    time.sleep(60)"
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    words = [sys.executable, str(place / "accelerate" / "commands" / "launch.py"), "--num_processes", "2", "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as launcher:
        assert [launcher.stdout.readline() for _ in range(2)] == [b"at work\n"] * 2
        launcher.kill()
    assert survivors(os.environ[MARK]) == {}


@proc
def test_a_command_that_no_launcher_started_outlives_the_shell(place):
    """With nohup it goes on after a logout; also a launcher that a person starts through the worker."""
    (place / "script.py").write_text("from bridge.exchange.command_line.exit_codes import start\nstart('waiting')")
    (place / "waiting.py").write_text("import sys\ndef main():\n    print('at work', flush=True)\n    sys.stdin.read()")
    words = [sys.executable, "-m", "bridge.instrument.worker", str(place / "script.py")]
    shell = ["/bin/sh", "-c", 'exec 3<&0; "$@" <&3 & exec 3<&-; wait', "sh", *words]
    reader, writer = os.pipe()
    with subprocess.Popen(shell, stdin=reader, stdout=subprocess.PIPE) as process:
        os.close(reader)
        assert process.stdout.readline() == b"at work\n"
        process.kill()
        process.wait()
        time.sleep(0.2)
        assert len(marked(os.environ[MARK])) == 1
        os.close(writer)
    assert survivors(os.environ[MARK]) == {}


@pytest.fixture
def ended() -> subprocess.Popen:
    """A process that has ended, and that nobody has asked how yet."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    if hasattr(os, "waitid"):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process
    process.wait()


def worker(place, names) -> subprocess.CompletedProcess:
    (place / "script.py").write_text("import os\nprint(os.environ['BRIDGE_ANCESTORS'])")
    words = [sys.executable, "-m", "bridge.instrument.worker", str(place / "script.py")]
    return subprocess.run(words, env=os.environ | {parent_process.VARIABLE: names}, capture_output=True, text=True)


def test_worker_whose_ancestors_live_works_and_is_named_to_its_children(place):
    done = worker(place, parent_process.name_of_this())
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.strip().split(";")
    assert first == parent_process.name_of_this()
    assert second.partition(":")[0] not in {"", str(os.getpid())}


@pytest.mark.parametrize("which", ["ended", "gone", "another"])
def test_worker_that_comes_too_late_does_nothing(place, ended, which):
    if which == "gone":
        ended.wait()
    pid, start = parent_process.name_of_this().split(":", 1)
    name = f"{pid}:0{start}" if which == "another" else f"{ended.pid}:{start}"  # the id was given to another process
    done = worker(place, f"{parent_process.name_of_this()};{name}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "the process that started this one has ended\n"


@proc
@pytest.mark.parametrize("change", ["parent_process._LIBC = None", ""], ids=["no prctl", "a shell between the two"])
def test_what_the_kernel_does_not_end_ends_within_seconds(place, change):
    """Without prctl, and where a program stands between that outlives the one that is killed."""
    body = f"import sys, time\nfrom bridge.exchange import parent_process\n{change}\n"
    body += "parent_process.end_with_ancestors()\n"
    (place / "child.py").write_text(body + "print('at work', file=sys.stderr, flush=True)\ntime.sleep(60)\n")
    shell = [] if change else ["/bin/sh", "-c", '"$@"; sleep 0.1', "sh"]
    code = "import os, subprocess, sys\nfrom bridge.exchange import parent_process\n"
    code += "os.environ[parent_process.VARIABLE] = parent_process.name_of_this()\nsubprocess.run(sys.argv[1:])"
    words = [sys.executable, "-c", code, *shell, sys.executable, str(place / "child.py")]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        assert process.stderr.readline() == b"at work\n"
        process.kill()
    assert survivors(os.environ[MARK]) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="compares what is asked elsewhere with /proc")
def test_state_and_start_where_there_is_no_proc(ended):
    assert parent_process._from_ps(os.getpid())[0] in "RS"
    assert parent_process._from_ps(os.getpid())[1].endswith(time.strftime("%Y", time.gmtime()))
    assert parent_process._from_ps(ended.pid)[0] == parent_process._from_proc(ended.pid)[0] == "Z"
    assert parent_process.started(ended.pid) is None
    ended.wait()
    assert parent_process._from_ps(ended.pid) == parent_process._from_proc(ended.pid) == ("", "")
