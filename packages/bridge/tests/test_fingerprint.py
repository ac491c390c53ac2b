import json

import pytest
from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import (
    FILE,
    Fingerprint,
    difference,
    read_fingerprint,
    recorded_fingerprint,
    write_fingerprint,
)

ONE = Fingerprint("1a", "2b", "float32", {"embed.weight": "3c", "up.weight": "4d", "down.weight": "5e"})


def other(parameters="ff", tokenizer="2b", **digests):
    """Another model; ``up=None`` leaves up.weight out."""
    named = ONE.digests | {f"{name}.weight": digest for name, digest in digests.items()}
    return Fingerprint(parameters, tokenizer, "float32", {name: digest for name, digest in named.items() if digest})


def test_file_comes_back_as_it_was_written(tmp_path):
    write_fingerprint(tmp_path, ONE)
    assert read_fingerprint(tmp_path) == ONE
    assert list(read_fingerprint(tmp_path).digests) == list(ONE.digests)


def test_folder_of_an_earlier_version_has_none(tmp_path):
    assert read_fingerprint(tmp_path) is None
    assert recorded_fingerprint({"nll": 3.5}, tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '"word"',
        '{"parameters_xxh3": "1a"}',
        '{"parameters_xxh3": "1a", "tokenizer_xxh3": "2b", "dtype": "float32", "digests": ["a"]}',
        '{"parameters_xxh3": "1a", "tokenizer_xxh3": 2, "dtype": "float32", "digests": {}}',
        '{"parameters_xxh3": "1a", "tokenizer_xxh3": "2b", "dtype": "float32", "digests": {"a": null}}',
    ],
)
def test_damaged_file_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RequestError, match=r"fingerprint\.json is damaged: .*; restore it, or make the run again"):
        read_fingerprint(tmp_path)


def test_totals_find_their_digests_beside_them(tmp_path):
    baseline = json.loads(json.dumps(ONE.totals | {"dtype": "float32", "nll": 3.5}))
    assert recorded_fingerprint(baseline, tmp_path) == Fingerprint("1a", "2b", "float32")
    write_fingerprint(tmp_path, ONE)
    assert recorded_fingerprint(baseline, tmp_path) == ONE


def test_file_of_another_model_beside_a_baseline_is_not_its_own(tmp_path):
    write_fingerprint(tmp_path, other(up="99"))
    assert recorded_fingerprint(ONE.totals, tmp_path) == Fingerprint("1a", "2b", None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (ONE, ""),
        (other(up="99"), "up.weight"),
        (other(embed="98", down="99"), "embed.weight and down.weight"),
        (other(down=None), "down.weight"),
        (other(head="99"), "head.weight"),
        (other("1a", "00"), "the tokenizer"),
        (other(tokenizer="00", up="99"), "the tokenizer and up.weight"),
        (other(embed="7", up="8", down="9", head="1"), "embed.weight, up.weight, down.weight and 1 more parameter"),
        (
            other(embed="7", up="8", down="9", a="1", b="2"),
            "embed.weight, up.weight, down.weight and 2 more parameters",
        ),
        (Fingerprint("ff", "2b", "float32"), "the values of the parameters"),
        (Fingerprint("ff", "00", None), "the tokenizer and the values of the parameters"),
    ],
)
def test_difference_is_named(changed, words):
    assert difference(ONE, changed) == words
