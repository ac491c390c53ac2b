import re
from pathlib import Path

import pytest
from bridge.exchange.errors import RequestError
from bridge.exchange.yaml_file import parse_yaml, read_yaml


def test_every_value_stays_the_text_that_is_written():
    flat = b"revision: 2024_01_01\nnumber: 1e5\nswitch: no\nnothing:\nquoted: 'a: b'\n"
    assert parse_yaml(flat + b"list: [null, 0x1F, 1:30]\ndeep: {a: {b: ~}}") == {
        "revision": "2024_01_01",
        "number": "1e5",
        "switch": "no",
        "nothing": "",
        "list": ["null", "0x1F", "1:30"],
        "quoted": "a: b",
        "deep": {"a": {"b": "~"}},
    }


@pytest.mark.parametrize("text", [b"", b"# nothing\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_empty_text(text):
    assert parse_yaml(text) == ""


BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: 1\nb: 2\na: 3", "line 3: it has the key 'a' twice"),
        (b"a: 1\nb: {c: 1, d: 2, c: 3}", "line 2: it has the key 'c' twice"),
        (b"a: &x 1\nb: *x", "line 1: expected no reference to another part of the file"),
        (f"a0: x\n{BOMB}".encode(), "line 2: expected no reference"),
        (b"a: &a [*a]", "line 1: expected no reference"),
        (b"a: !!python/object/apply:os.system [id]", "expected no tag, not tag:yaml.org,2002:python/object/apply"),
        (b"[" * 10_000, "line 1: expected at most 16 levels"),
        (b"- " * 10_000, "line 1: expected at most 16 levels"),
        (b"{a: " * 10_000, "line 1: expected at most 16 levels"),
        (b"? [a]\n: b", "line 1: expected a text as key"),
        (b"a: [", "line 1: while parsing a flow node, expected the node content"),
        (b"a: \x00", "unacceptable character #x0000"),
        (b"a: \x1b[31m", "unacceptable character #x001b"),
        (rb'a: "\e[31m"', r"line 1: expected printable characters, not '\x1b[31m'"),
        (rb'"\u202e": a', r"line 1: expected printable characters, not '\u202e'"),
        (rb'a: "\ud800"', r"line 1: expected printable characters, not '\ud800'"),
        (rb'a: "\UFFFFFFFF"', "is of no character"),
        (b"a: \xff", "can't decode byte 0xff in position 3"),
        (b"--- a\n--- b", "line 2: expected a single document"),
        (b"%YAML 9.9\n--- a", "line 1: found incompatible YAML document"),
    ],
)
def test_what_is_refused_is_said_in_one_line(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value)


def test_the_file_is_named_with_what_to_do(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(RequestError, match=r"a\.yaml is damaged: line 1: .*; write it anew$"):
        read_yaml(tmp_path / "a.yaml", "write it anew")


def test_what_is_no_file_is_not_read(tmp_path):
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RequestError, match="loop cannot be read: Too many levels of symbolic links"):
        read_yaml(tmp_path / "loop")
    with pytest.raises(RequestError, match="/dev/zero cannot be read: it is no regular file"):
        read_yaml(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none")
