import ast
import logging
import sys
from pathlib import Path

import pytest
from bridge.exchange.command_line import flags
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.printable import check_printable, escaped, is_printable, say

PACKAGES = Path(__file__).parents[2]
C0_AND_C1 = [*range(0x20), *range(0x7F, 0xA0)]
DIRECTION = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
OTHERS = [0x00AD, 0x200B, 0x2028, 0x2029, 0x2060, 0xFEFF, 0xD800, 0xDC9B, 0xE0041, 0xFFFF]


@pytest.mark.parametrize("code", [*C0_AND_C1, *DIRECTION, *OTHERS])
def test_what_a_terminal_obeys_or_hides_is_escaped(code):
    text = f"a{chr(code)}b"
    assert not is_printable(text)
    assert escaped(text).isprintable() and escaped(text)[0] + escaped(text)[-1] == "ab"
    assert escaped(text)[1:-1].encode().decode("unicode_escape") == chr(code)
    with pytest.raises(RequestError) as refused:
        check_printable(text, "layer")
    assert str(refused.value) == (
        f"layer '{escaped(text)}' has a character that is not printable, here written as an escape"
    )


@pytest.mark.parametrize(
    "text", ["", "gpt_neox.layers.5", "ünï 層 ا", r"\x1b \n", "a\u00a0b\u3000", "می\u200cخواهم", "👩\u200d💻"]
)
def test_all_else_stays_as_it_is(text):
    assert is_printable(text)
    assert escaped(text) == check_printable(text, "layer") == text


def test_each_thing_said_is_one_line(capsys):
    say("one\r\ntwo\x1b[A", Path("three"), 4)
    say("five\u202e", stream=sys.stderr)
    assert capsys.readouterr() == ("one\\r\\ntwo\\x1b[A\nthree\n4\n", "five\\u202e\n")


@pytest.mark.parametrize("error", [RequestError, RunError])
def test_error_messages_are_escaped(capsys, error):
    def thing() -> None:
        raise error("no layer 'a\x1b]0;owned\x07\u202eb'\n\x9b31mat all")

    with pytest.raises(SystemExit):
        flags.run(thing, "thing", [])
    assert capsys.readouterr().err == "thing: error: no layer 'a\\x1b]0;owned\\x07\\u202eb' \\x9b31mat all\n"


def test_what_a_library_logs_is_escaped_while_a_command_runs(caplog):
    def thing() -> None:
        logging.getLogger("some.library").warning("unexpected %s\nnext line", "key\x1b]0;owned\x07")

    flags.run(thing, "thing", [])
    assert caplog.messages == ["unexpected key\\x1b]0;owned\\x07\nnext line"]
    thing()
    assert "\x1b" in caplog.messages[1]


@pytest.mark.parametrize("words", [["--a\x1b[2J=3"], ["stray\x1b[2J"], ["--n", "\x1b[2J"], ["--config", "\x1b[2J"]])
def test_what_a_person_typed_is_escaped_too(capsys, words):
    def thing(*, n: int = 1) -> None:
        pass

    with pytest.raises(SystemExit):
        flags.run(thing, "thing", words)
    assert "\\x1b[2J" in capsys.readouterr().err


def test_nothing_else_prints():
    sources = [p for folder in PACKAGES.glob("*/") for p in (*folder.glob("src/**/*.py"), *folder.glob("scripts/*.py"))]
    sources += PACKAGES.glob("*/*.py")
    assert len(sources) > 70
    for path in sources:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "id")]
        assert path.name == "printable.py" or "print" not in calls, (
            f"{path} prints; let bridge.exchange.printable.say do it"
        )
