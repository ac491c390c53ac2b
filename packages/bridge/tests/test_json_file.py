import re
from pathlib import Path

import pytest
from bridge.exchange.errors import RequestError
from bridge.exchange.json_file import parse_json, read_json


def test_values_of_every_kind():
    text = '{"text": "ü", "numbers": [1, -9223372036854775808, 0.5, 1e400], "nothing": null, "yes": true}'
    numbers = [1, -(2**63), 0.5, float("inf")]
    assert parse_json(text.encode()) == {"text": "ü", "numbers": numbers, "nothing": None, "yes": True}


def test_numbers_as_their_reader_wants_them():
    assert parse_json("[10000000000000000000000000000000, 1.50]", integer=int, fraction=str) == [10**31, "1.50"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value: line 1 column 1"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "it has the key 'c' twice"),
        (b"[9223372036854775808]", "expected an integer of 64 bits, not 9223372036854775808"),
        (b"[-" + b"9" * 5000 + b"]", "expected an integer of 64 bits, not -99999"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": ' * 100_000, "it is nested too deeply"),
        (b'"\xff"', "can't decode byte 0xff"),
        (b"{}\x00", "Extra data"),
        (b'"\x01"', "Invalid control character"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_json(text)


def test_the_file_is_named_with_what_to_do(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RequestError, match=r"a\.json is damaged: Expecting .*; write it anew$"):
        read_json(tmp_path / "a.json", "write it anew")
    (tmp_path / "half.json").write_text('{"id": "\\ud800"}')
    with pytest.raises(RequestError, match=r"half\.json is damaged: it has half of a surrogate pair"):
        read_json(tmp_path / "half.json")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RequestError, match="loop cannot be read: Too many levels of symbolic links"):
        read_json(tmp_path / "loop")
    for path, reason in ((tmp_path, "Is a directory"), (Path("/dev/zero"), "it is no regular file")):
        with pytest.raises(RequestError, match=f"{path} cannot be read: {reason}"):
            read_json(path)
    with pytest.raises(RequestError, match="cannot be read: embedded null byte"):
        read_json(tmp_path / "a\0b")
