import sys

import pytest
from bridge.exchange.command_line import exit_codes, verbosity
from llm_perturb.evaluation import progress
from llm_perturb.evaluation.corpus import CorpusOptions, read_texts
from transformers.utils import logging


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv(verbosity.TERMINAL, "1")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def test_off_a_terminal_a_line_every_half_minute(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))
    now = [0]

    def step():
        now[0] = next(clock)

    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    assert progress.SECONDS == 30
    with progress.Progress(8, "layers") as steps:
        for number in range(8):
            step()
            steps.at(f"h.{number}")
            steps.update()
    assert capsys.readouterr().err.splitlines() == [
        "layers h.3: 4 of 8 (00:30 gone, about 00:30 left)",
        "layers h.6: 7 of 8 (01:00 gone, about 00:08 left)",
    ]


def test_a_short_loop_says_nothing_off_a_terminal(capsys):
    assert list(progress.over([1, 2], "baseline")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(terminal, capsys):
    with progress.Progress(4, "layers") as steps:
        steps.at("h.\x1b1")
        steps.update(4)
    err = capsys.readouterr().err
    assert "layers h.\\x1b1:" in err
    assert "\x1b1" not in err


@pytest.mark.parametrize("on_terminal", ["0", "1"])
def test_quiet_and_other_processes_say_nothing(on_terminal, monkeypatch, capsys):
    monkeypatch.setenv(verbosity.TERMINAL, on_terminal)
    monkeypatch.setattr(progress, "SECONDS", 0)
    list(progress.over([1, 2], "baseline", shown=False))
    monkeypatch.setenv(verbosity.VARIABLE, "quiet")
    list(progress.over([1, 2], "baseline"))
    assert capsys.readouterr().err == ""


def test_a_bar_is_closed_before_an_error_is_printed(terminal, capsys):
    def fail():
        for _ in progress.over([1, 2], "baseline"):
            raise ValueError("no")

    steps = progress.Progress(4, "layers")
    with pytest.raises(SystemExit, match="1"), exit_codes.one_line_errors("command"):
        fail()
    lines = capsys.readouterr().err.rsplit("\r", 1)[-1].splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("command: error: unforeseen ValueError: no")
    assert progress._open == []
    steps.close()


def test_a_note_stands_in_a_line_of_its_own(terminal, capsys):
    with progress.Progress(4, "layers"):
        progress.note("a\x1bnote")
    assert "a\\x1bnote\n" in capsys.readouterr().err


def test_bars_of_transformers_are_those_of_a_terminal(monkeypatch):
    monkeypatch.setenv(verbosity.TERMINAL, "0")
    assert not sys.stderr.isatty()
    before = logging.is_progress_bar_enabled()
    with progress.library_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() == before
    monkeypatch.setenv(verbosity.TERMINAL, "1")
    with progress.library_bars():
        assert logging.is_progress_bar_enabled() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_terminal", "says", "expected"), [("0", "", False), ("1", "", True), ("1", "quiet", False)]
)
def test_bars_of_datasets_are_those_of_a_terminal_and_not_of_a_quiet_command(
    tmp_path, monkeypatch, capsys, on_terminal, says, expected
):
    (tmp_path / "test.csv").write_text("text\na few words\n")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv(verbosity.TERMINAL, on_terminal)
    monkeypatch.setenv(verbosity.VARIABLE, says)
    assert read_texts(CorpusOptions(dataset=str(tmp_path))).texts == ["a few words"]
    err = capsys.readouterr().err
    assert ("Generating test split" in err) == expected
    assert expected or err == ""
