import errno
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from bridge.exchange.command_line import flags
from bridge.exchange.errors import RequestError, RunError

CALLS = []


def command(
    *,
    model: str | None = None,
    metric: list[str] = ["grad_x_weight"],  # noqa: B006
    topk: list[int] = [100],  # noqa: B006
    output: str = "outputs/",
    eval_limit: int | None = None,
    scale: float = 1.0,
    mode: Literal["global", "per_layer"] = "global",
    save_plots: bool = True,
    from_: list[str] | None = None,
    revision: str | None = None,
) -> None:
    """Do a thing.

    Args:
        model: which model.
        metric: which metrics.
        topk: how many.
        output: where to.
        eval_limit: how many texts.
        scale: a factor.
        mode: global or per_layer.
        save_plots: whether to draw.
        from_: where from.
        revision: which version.
    """
    CALLS.append(dict(locals()))


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    return CALLS


def run(*words):
    flags.run(command, name="thing", argv=list(words))


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    assert CALLS == []
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("thing: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "words",
    [["--metric", "a", "b"], ["--metric=a,b"], ["--metric", "a,", "b"], ["--metric", "a", "--metric", "b"]],
)
def test_list_takes_all_of_its_words_and_nothing_else(words):
    run(*words, "--output", "there")
    assert CALLS[0]["metric"] == ["a", "b"]
    assert CALLS[0]["output"] == "there"
    assert CALLS[0]["model"] is None


def test_defaults_and_types():
    run("--topk", "100", "500", "--eval-limit", "7", "--scale", "1e-3")
    assert CALLS[0]["topk"] == [100, 500]
    assert CALLS[0]["eval_limit"] == 7
    assert CALLS[0]["scale"] == 1e-3
    assert CALLS[0]["mode"] == "global"
    assert CALLS[0]["save_plots"] is True


@pytest.mark.parametrize(
    "text",
    [
        "12e4567",
        "2024_01_01",
        "a#b",
        "0x1F",
        "False",
        "None",
        "[1, 2]",
        "it's",
        'say "hi"',
        "two\nlines",
        "back\\slash",
        "ünï",
        "a b",
        "--",
        "-",
    ],
)
def test_string_stays_what_was_written(text):
    run(f"--revision={text}")
    assert CALLS[0]["revision"] == text
    if not text.startswith("-"):
        run("--revision", text)
        assert CALLS[1]["revision"] == text


def test_the_home_folder_is_what_a_shell_takes_it_for(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for text, value in [("~/runs", "/home/somebody/runs"), ("~", "/home/somebody"), ("runs~", "runs~"), ("a/~", "a/~")]:
        run(f"--revision={text}")
        assert CALLS.pop()["revision"] == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--save-plots"], True),
        (["--save_plots"], True),
        (["--save-plots", "false"], False),
        (["--save-plots=False"], False),
        (["--no-save-plots"], False),
        (["--save-plots", "0"], False),
    ],
)
def test_switch(words, value):
    run(*words)
    assert CALLS[0]["save_plots"] is value


def test_unknown_flag_is_found_before_anything_runs(capsys):
    assert "unknown flag '--metrc' (did you mean '--metric'?)" in refused(capsys, "--model", "gpt2", "--metrc", "x")
    assert "unknown flag '-m'" in refused(capsys, "-m", "gpt2")
    assert "unknown flag '--no-model'" in refused(capsys, "--no-model")
    assert "unknown flag '--no-save-plots'" in refused(capsys, "--no-save-plots=1")
    assert "unknown flag '--'" in refused(capsys, "--", "--trace")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt2"], "stray word 'gpt2'"),
        (["--model", "gpt2", "large"], "stray word 'large' after --model gpt2, which takes one value"),
        (["--no-save-plots", "x"], "stray word 'x'"),
        (["--model"], "--model needs a value"),
        (["--model="], "--model needs a value"),
        (["--model", "--topk", "5"], "--model needs a value"),
        (["--metric"], "--metric needs at least one value"),
        (["--topk", ","], "--topk needs at least one value"),
        (["--model", "a", "--model", "b"], "--model is given twice"),
        (["--topk", "1.5"], "--topk takes a whole number, not '1.5'"),
        (["--topk", "1e3"], "--topk takes a whole number, not '1e3'"),
        (["--topk", "9" * 5000], "--topk takes a whole number"),
        (["--eval-limit", "many"], "--eval-limit takes a whole number, not 'many'"),
        (["--model", "caf\udce9"], "--model takes text in UTF-8, not 'caf\\udce9'"),
        (["--scale", "big"], "--scale takes a number, not 'big'"),
        (["--scale", "nan"], "--scale takes a finite number"),
        (["--scale", "-inf"], "--scale takes a finite number"),
        (["--save-plots", "maybe"], "--save-plots takes no value or true/false, not 'maybe'"),
        (["--mode", "globl"], "--mode 'globl' is unknown (did you mean 'global'?); choose from: global, per_layer"),
        (["--config"], "--config needs a value"),
    ],
)
def test_wrong_request(capsys, words, message):
    assert message in refused(capsys, *words)


@pytest.mark.parametrize("word", ["-3", "-.5", "-1e-2"])
def test_negative_number_is_a_value(word):
    run("--scale", word)
    assert CALLS[0]["scale"] == float(word)


def test_from_reaches_from_():
    run("--from", "a", "b")
    assert CALLS[0]["from_"] == ["a", "b"]


def test_required_flag():
    def needs(*, from_: list[str], k: int) -> None:
        """Need both."""

    with pytest.raises(RequestError, match="missing --from; --help"):
        flags.parse(needs, ["--k", "3"])
    with pytest.raises(RequestError, match="missing --from, --k; --help"):
        flags.parse(needs, [])


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--model", "x", "--help"], ["--nonsense", "--help"]])
def test_help_runs_nothing_and_shows_what_is_understood(capsys, words):
    run(*words)
    out, err = capsys.readouterr()
    assert CALLS == []
    assert err == ""
    assert "--from TEXT ..." in out
    assert "--eval-limit N" in out
    assert "how many texts." in out
    assert "--mode {global,per_layer}\n        global or per_layer. Default: global.\n" in out
    assert "--topk N ...\n        how many. Default: 100.\n" in out
    assert "Default: on; --no-save-plots switches it off." in out
    assert "from_" not in out


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Flags of several commands.

    More about them.

    Attributes:
        size: how large, told
            in two lines.
        files: which files.
    """

    size: int = 3
    files: list[flags.FilePath] = field(default_factory=list)


def test_a_class_of_flags_is_filled_and_has_a_heading_of_its_own(capsys):
    seen = []

    def grouped(*, name: str, shared: Shared) -> None:
        """Do it.

        Args:
            name: which one.
        """
        seen.append((name, shared))

    flags.run(grouped, name="thing", argv=["--name", "x", "--files", "a,b/c.csv", "d.csv", "--files=e,f"])
    flags.run(grouped, name="thing", argv=["--name", "y", "--size", "5"])
    assert seen == [("x", Shared(files=["a,b/c.csv", "d.csv", "e,f"])), ("y", Shared(size=5))]
    flags.run(grouped, name="thing", argv=["--help"])
    out = capsys.readouterr().out
    assert "usage: thing --name TEXT [flags]" in out
    assert "Flags of several commands:\n  --size N\n        how large, told in two lines. Default: 3.\n" in out
    assert "which one. Required." in out


def test_config_gives_flags_and_the_command_line_wins(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: gpt2\nmetric: [a, b]\ntopk: 7\nsave-plots: false\nrevision: 2024_01_01\neval_limit: null\n"
        "scale: -2.5\noutput: -odd\n"
    )
    run("--metric", "c", "--config", str(file))
    call = CALLS[0]
    assert call["metric"] == ["c"]
    assert call["topk"] == [7]
    assert call["save_plots"] is False
    assert call["revision"] == "2024_01_01"
    assert call["eval_limit"] is None
    assert call["scale"] == -2.5
    assert (call["model"], call["output"]) == ("gpt2", "-odd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outptu: x", "unknown flag '--outptu' (did you mean '--output'?)"),
        ("model:", "--model needs a value"),
        ("topk: []", "--topk needs at least one value"),
        ("model: {a: b}", "expected one value or a flat list for 'model'"),
        ("- a\n- b", "expected lines of the form 'flag: value'"),
        ("model: [", "cannot be read as flags: line 1: while parsing a flow node, expected the node content"),
        ("model: a\nk: 1\nmodel: b", "line 3: it has the key 'model' twice"),
        ("model: &a x\nk: *a", "line 1: expected no reference to another part of the file"),
        ("model: !!str x", "line 1: expected no tag, not tag:yaml.org,2002:str"),
        ('model: "\\e[31m"', "line 1: expected printable characters, not '\\x1b[31m'"),
        ("config: other.yaml", "a file of flags cannot name another"),
        ("model: [a, b]", "--model is given twice"),
    ],
)
def test_wrong_config(capsys, tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert message in refused(capsys, "--config", str(file))


def test_missing_config(capsys, tmp_path):
    assert "no such file" in refused(capsys, "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RequestError("wrong\nrequest"), 2, "thing: error: wrong request\n"),
        (RunError("went wrong"), 1, "thing: error: went wrong\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
            2,
            f"thing: error: File name too long: '{'x' * 80}...'\n",
        ),
    ],
)
def test_exit_codes(capsys, error, code, line):
    def fails() -> None:
        """Fail."""
        raise error

    with pytest.raises(SystemExit) as caught:
        flags.run(fails, name="thing", argv=[])
    assert caught.value.code == code
    assert capsys.readouterr() == ("", line)


def test_a_defect_gets_one_line_and_its_traceback_a_file(capsys):
    def broken() -> None:
        """Break."""
        raise KeyError("defect")

    with pytest.raises(SystemExit) as caught:
        flags.run(broken, "thing", [])
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("thing: error: unforeseen KeyError: 'defect'; traceback: ") and err.count("\n") == 1
    path = Path(err.strip().rpartition(" ")[2])
    assert 'raise KeyError("defect")' in path.read_text()
    path.unlink()


def test_several_commands(capsys):
    commands = {"first": command, "second": lambda: None}
    flags.run(commands, name="bridge", argv=["first", "--model", "x"])
    assert CALLS[0]["model"] == "x"
    for words, message in [
        (["frist"], "bridge: error: no command 'frist' (did you mean 'first'?); there are: first, second"),
        (["first", "--modle", "x"], "bridge first: error: unknown flag '--modle'"),
    ]:
        with pytest.raises(SystemExit) as caught:
            flags.run(commands, name="bridge", argv=words)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    for words in [], ["--help"]:
        flags.run(commands, name="bridge", argv=words)
        assert "second" in capsys.readouterr().out
    flags.run(commands, name="bridge", argv=["first", "--help"])
    assert "bridge first - Do a thing." in capsys.readouterr().out


def test_as_a_program(tmp_path):
    script = tmp_path / "thing.py"
    script.write_text(
        "from bridge.exchange.command_line import flags\n"
        "def thing(*, n: int = 1) -> None:\n    'Count.'\n    print(n + 1)\n"
        "flags.run(thing)\n"
    )

    def start(*words: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, cwd=Path.cwd())
        return done.returncode, done.stdout, done.stderr

    assert start("--n", "4") == (0, "5\n", "")
    assert start("--m", "4") == (2, "", "thing.py: error: unknown flag '--m' (did you mean '--n'?)\n")
    assert start("--help")[0] == 0
