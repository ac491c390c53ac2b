"""Whatever is said to a flag, the command keeps its promise; the flag and the words are drawn by hypothesis, by type.

Each example is a request that works, with one or two of the command's flags given otherwise. A request for more work
than the test waits for is interrupted, as with Ctrl-C. ``nox -s fuzz`` tries a hundred times as many.
"""

import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from bridge.exchange.command_line.flag_table import EVERY_COMMAND, FilePath, Flag, flags_of
from bridge.exchange.command_line.verbosity import VARIABLE
from command_contract import captured, hashes, kept
from conftest import examples
from finished_runs import CONDITIONS, DISCOVERY, VALIDATE, VALIDATION, command_of, run, setup, surroundings
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_files import copy_as_another_model, save_nothing

pytestmark = pytest.mark.slow
SECONDS, BYTES = 20, 8 * 2**30  # for one request, beside what the process holds already

TEXTS = ["x", "a,b", ",", "a\nb", "a\tb", "\x1b[2J", "\u202e", "\udc80", "é" * 300, "x" * 5000, "..", "~", "-"]
WORDS = {
    int: ["0", "1", "2", "-1", "-0", "+3", "007", "1000000", "9" * 18, "-" + "9" * 18, "9" * 19],
    float: ["0", "-0.0", "1", "0.5", "-1", "1e-320", "1e308", "-1e308", "1e999", "nan", "inf", "-inf", "1_0", "1,5"],
    bool: ["true", "false", "1", "no", "TRUE"],
    str: TEXTS,
    FilePath: TEXTS,
}
ODD = ["", " ", "x", "null", "None", "1.0", "1e3", "٣", "0x1", "[]", "{}", "'", '"', "$(touch marker)"]
# Of the folder that the commands run in: what a flag that takes a path could find.
PATHS = ["model", "texts.txt", "out", f"out/{DISCOVERY}", f"out/{VALIDATION}", "out/baseline_x/baseline.json", "none"]
PATHS += ["model/config.json", f"out/{DISCOVERY}/manifest.json", "none/none", ".", "loop", "empty", "texts.txt/x"]
PATHS += ["model/model.safetensors", "out/perturb_x", "a,b", "é", "x" * 255, "x" * 256]


@pytest.fixture(scope="module", autouse=True)
def surrounded(tmp_path_factory):
    """No network, figures of one byte, and an end to the memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch)
        patch.setattr("matplotlib.figure.Figure.savefig", save_nothing)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + BYTES, limits[1]))
        yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def fresh(finished, tmp_path_factory):
    """Makes a fresh copy of every run, with a few odd paths beside them, and goes into it."""
    folder = tmp_path_factory.mktemp("fuzz") / "folder"

    def copy() -> Path:
        os.chdir(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder, symlinks=True)
        (folder / "loop").symlink_to("loop")
        (folder / "empty").mkdir()
        copy_as_another_model(folder / "out" / DISCOVERY, folder / "other" / DISCOVERY)
        os.chdir(folder)
        return folder

    here = Path.cwd()
    yield copy
    os.chdir(here)


def words_for(flag: Flag) -> st.SearchStrategy[list[str]]:
    """What follows a flag: nothing, one word or several; more often than not of its type."""
    of_its_type = [*flag.choices, *(word.upper() for word in flag.choices)] or WORDS[flag.item]
    likely = of_its_type + (PATHS if flag.item in {str, FilePath} else [])
    word = st.sampled_from(likely) | st.sampled_from(likely) | st.sampled_from(ODD)
    return st.lists(word, max_size=3 if flag.is_list else 1)


def spellings(flag: Flag) -> st.SearchStrategy[list[str]]:
    """A flag and its words, as someone may type it: apart, joined by ``=``, twice, or switched off."""

    def spelled(words: list[str], how: str) -> list[str]:
        if how == "joined" and words:
            return [f"{flag.name}={word}" for word in words]
        if how == "twice":
            return [flag.name, *words, flag.name, *words]
        return [f"--no-{flag.name[2:]}"] if how == "off" else [flag.name, *words]

    return st.builds(spelled, words_for(flag), st.sampled_from(["apart", "apart", "joined", "joined", "twice", "off"]))


def changes(command: str) -> st.SearchStrategy[dict[str, list[str]]]:
    """One or two flags of a command, each with what is typed for it."""
    table = flags_of(command_of(command)) | EVERY_COMMAND
    del table["debug"], table["verbose"]  # which ask for a traceback, and for what the libraries log
    keys = st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=2, unique=True)
    chosen = keys.map(lambda names: [table[name] for name in names])
    return chosen.flatmap(lambda flags: st.fixed_dictionaries({flag.name: spellings(flag) for flag in flags}))


def typed(request: list[object], changed: dict[str, list[str]]) -> list[str]:
    """The words of a request, in which the changed flags are given otherwise."""
    words: list[str] = []
    keep = True
    for word in map(str, request):
        if word.startswith("--"):
            keep = word not in changed and f"--{word.removeprefix('--no-')}" not in changed
        words += [word] * keep
    return [*words, *(word for given_words in changed.values() for word in given_words)]


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C when the time is over."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


SETUP = setup(Path())
REQUESTS: dict[str, list[object]] = {  # each of them works; the folders are relative to the one that is current
    "phase1": [*SETUP, "--topk", 3, "--no-save-plots", "--output", "new"],
    "baseline": [*SETUP, "--output", "new"],
    "perturb": [*SETUP, *CONDITIONS, "--output", "new"],
    "merge": ["--from", "out", "--output", "new"],
    "targets": ["--from", "out"],
    "correlate": ["--from", f"out/{VALIDATION}"],
    "report": ["--from", f"out/{VALIDATION}"],
    "compare": ["--from", "out", "other", "--output", "new"],
    "validate": ["--from", "out", *VALIDATE],  # complete already: what asks for nothing else measures nothing
}
REWRITTEN = {"correlate": f"out/{VALIDATION}/correlations.csv", "report": f"out/{VALIDATION}/(report|plots/)"}


def check(fresh: Callable[[], Path], command: str, changed: dict[str, list[str]]) -> None:
    """Run a request that is changed, and see that the command keeps its promise: no file that was there is touched."""
    folder = fresh()
    there = "|".join(map(re.escape, hashes(folder)))
    written = rf"{REWRITTEN.get(command, 'nothing')}|(?!({there})$)"

    def call() -> int:
        os.environ.pop(VARIABLE, None)  # what the command before was told about how much to say
        with interrupted_after(SECONDS):
            return run(command, *typed(REQUESTS[command], changed))

    kept(call, folder, written, folder / "marker", codes={0, 1, 2, 130})


@pytest.mark.parametrize("command", REQUESTS)
def test_the_request_works_as_it_is(fresh, command):
    """Or else every change of it would be refused for a reason that has nothing to do with the change."""
    fresh()
    with captured() as (_, err):
        code = run(command, *REQUESTS[command])
        err.seek(0)
        complete = "validation_x is already complete" in err.read()
    assert (code, complete) == ((2, True) if command == "validate" else (0, False))


@pytest.mark.parametrize("command", REQUESTS)
@examples(40)
@given(data=st.data())
def test_whatever_is_said_to_a_flag(fresh, command, data):
    check(fresh, command, data.draw(changes(command)))
