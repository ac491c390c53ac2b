"""What is said of a model that cannot be loaded: the innermost reason, the file and the field."""

import json
from itertools import pairwise

import pytest
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation.load_errors import reason_of, refuse_damaged

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:5e\nsize 538090408\n"


def raised(*errors):
    """The first of the errors, each raised from the one after it."""
    for outer, inner in pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


def test_the_innermost_reason_is_said_beside_the_outermost(tmp_path):
    error = raised(RuntimeError("it went wrong"), ValueError("somehow"), TypeError("'width' is\n no number"))
    assert reason_of(error, str(tmp_path)) == "RuntimeError: it went wrong; TypeError: 'width' is no number"


def test_what_the_outermost_says_already_is_not_said_again(tmp_path):
    error = raised(RuntimeError("wrong: 'width' is no number"), TypeError("'width' is no number"))
    assert reason_of(error, str(tmp_path)) == "RuntimeError: wrong: 'width' is no number"


def test_an_error_met_while_another_was_handled_counts_unless_it_was_hidden(tmp_path):
    outer = RuntimeError("outer")
    outer.__context__ = TypeError("inner")
    assert reason_of(outer, str(tmp_path)) == "RuntimeError: outer; TypeError: inner"
    outer.__suppress_context__ = True
    assert reason_of(outer, str(tmp_path)) == "RuntimeError: outer"


def test_an_unknown_key_is_looked_up_among_the_values_of_the_configuration(tmp_path):
    content = {"rope": {"kind": "spiral", "factor": 2.0}, "layers": ["full", "spiral"], "act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    expected = "unknown value 'spiral' of rope.kind in config.json and layers.1 in config.json"
    assert reason_of(KeyError("spiral"), str(tmp_path)) == expected
    assert reason_of(KeyError("absent"), str(tmp_path)) == "KeyError: 'absent'"
    assert reason_of(KeyError(2), str(tmp_path)) == "KeyError: 2"


@pytest.mark.parametrize(
    ("content", "damage"),
    [("", "is empty"), (POINTER, "is a git-lfs pointer"), ('{"a": ', "is no valid JSON: Expecting value")],
)
def test_a_damaged_file_is_named_before_what_it_led_to(tmp_path, content, damage):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(content)
    reason = reason_of(ValueError("at line 1"), str(tmp_path))
    assert reason.startswith(f"tokenizer.json {damage}") and reason.endswith("; ValueError: at line 1")


def test_weight_files_are_looked_at_before_they_are_read(tmp_path):
    for name, content in {"whole.bin": "PK", "empty.bin": "", "pointer.safetensors": POINTER}.items():
        (tmp_path / name).write_text(content)
    refuse_damaged([tmp_path / "whole.bin"])
    with pytest.raises(RequestError, match=r"empty\.bin is empty"):
        refuse_damaged([tmp_path / "whole.bin", tmp_path / "empty.bin"])
    with pytest.raises(RequestError, match=r"pointer\.safetensors is a git-lfs pointer, .* git lfs pull"):
        refuse_damaged([tmp_path / "pointer.safetensors"])
