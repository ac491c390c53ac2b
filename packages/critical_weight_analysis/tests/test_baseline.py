import json
from types import SimpleNamespace

import pytest
from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import Fingerprint, write_fingerprint
from critical_weight_analysis import baseline

FOUND = {
    "model": "gpt2",
    "revision": "abc",
    "dtype": "float32",
    "corpus_sha256": "1f",
    "nll": 3.0,
    "n_tokens": 7,
    "ppl": 20.1,
}


def test_reads_what_was_written(tmp_path):
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(FOUND))
    assert baseline.read(str(file)) == FOUND


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is damaged"),
        ("[]", "Expected `object`, got `array`; expected a baseline.json of run_baseline"),
        (
            json.dumps({k: v for k, v in FOUND.items() if k != "nll"}),
            "missing required field `nll`; expected a baseline.json",
        ),
        (json.dumps(FOUND | {"nll": "3.0"}), r"Expected `float`, got `str` - at `\$\.nll`"),
        (json.dumps(FOUND | {"nll": None}), r"Expected `float`, got `null` - at `\$\.nll`"),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path, text, message):
    file = tmp_path / "baseline.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RequestError, match=message):
        baseline.read(str(file))


@pytest.mark.parametrize("key", ["model", "revision", "dtype", "corpus_sha256"])
def test_difference_of_the_setup_is_named(key):
    with pytest.raises(RequestError, match=f"--baseline b.json has {key} {FOUND[key]}, this run has other"):
        baseline.check_same(FOUND, FOUND | {key: "other"}, "b.json")


def test_loss_may_differ_by_rounding_only():
    baseline.check_same(FOUND, FOUND | {"nll": 3.0 * (1 + 0.9e-4)}, "b.json")
    with pytest.raises(RequestError, match=r"has nll 3\.0, this run measured 3\.0006"):
        baseline.check_same(FOUND, FOUND | {"nll": 3.0006}, "b.json")


def test_setup_is_compared_before_there_is_a_loss():
    setup = {key: value for key, value in FOUND.items() if key not in {"nll", "n_tokens", "ppl"}}
    baseline.check_same(FOUND, setup, "b.json")
    with pytest.raises(RequestError, match="has dtype float32, this run has bfloat16"):
        baseline.check_same(FOUND, setup | {"dtype": "bfloat16"}, "b.json")


LOADED = SimpleNamespace(fingerprint=Fingerprint("1a", "2b", "float32", {"up.weight": "3c", "down.weight": "4d"}))
OTHER = Fingerprint("ff", "2b", "float32", {"up.weight": "3c", "down.weight": "5e"})


def test_same_model(tmp_path):
    file = str(tmp_path / "baseline.json")
    assert baseline.check_model(FOUND | LOADED.fingerprint.totals, LOADED, file) == []


@pytest.mark.parametrize(("beside", "what"), [(True, r"down\.weight"), (False, "the values of the parameters")])
def test_other_model_is_refused_and_the_parameter_named_where_the_digests_are_beside(tmp_path, beside, what):
    if beside:
        write_fingerprint(tmp_path, OTHER)
    with pytest.raises(RequestError, match=f"is of another model than this run: they differ in {what}$"):
        baseline.check_model(FOUND | OTHER.totals, LOADED, str(tmp_path / "baseline.json"))


def test_other_tokenizer_is_refused(tmp_path):
    with pytest.raises(RequestError, match="they differ in the tokenizer$"):
        baseline.check_model(
            FOUND | {"parameters_xxh3": "1a", "tokenizer_xxh3": "00"}, LOADED, str(tmp_path / "b.json")
        )


def test_baseline_of_an_earlier_version_gives_a_warning(tmp_path):
    (warning,) = baseline.check_model(FOUND, LOADED, str(tmp_path / "b.json"))
    assert warning.startswith(f"--baseline {tmp_path / 'b.json'} has no fingerprint (an earlier version made it)")
