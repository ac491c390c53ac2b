import json
import math

import pytest
from bridge.exchange.baseline_file import check_same
from bridge.exchange.discovery_run import open_discovery
from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import write_fingerprint
from discovery_folder import CORPUS, fingerprint, make_discovery, parameters


@pytest.fixture
def discovery(tmp_path):
    return open_discovery(make_discovery(tmp_path / "o"))


def write(tmp_path, **changes):
    """The file that run_baseline.py writes for the same setup, with changes."""
    same = {"model": "tiny", "revision": "abc", "dtype": "float32", "corpus_sha256": CORPUS["corpus_sha256"]}
    path = tmp_path / "baseline.json"
    content = (
        same | {"nll": 3.5, "ppl": math.exp(3.5), "n_tokens": 90, "n_sequences": 3} | fingerprint().totals | changes
    )
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(path)


@pytest.mark.parametrize("nll", [3.5, 3.5 * (1 + 5e-5), 3.5 * (1 - 5e-5)])
def test_same_setup_and_the_same_loss_up_to_rounding(tmp_path, discovery, nll):
    assert check_same(write(tmp_path, nll=nll), discovery) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "model is other there and tiny in the discovery"),
        ({"revision": "abd"}, "revision is abd there and abc in"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16 there and float32 in"),
        ({"corpus_sha256": "e" * 64}, "corpus_sha256 is eeee.* there and cccc"),
        ({"nll": 3.5 * (1 + 2e-4)}, "nll is 3.5007.* there and 3.5 in"),
        ({"nll": math.nan}, "nll is nan there"),
        ({"nll": "3.5"}, r"baseline\.json is damaged: Expected `float`, got `str` - at `\$\.nll`; expected a baseline"),
        ({"model": ["tiny"]}, r"Expected `str`, got `array` - at `\$\.model`"),
        ({"n_tokens": 1.5}, r"Expected `int`, got `float` - at `\$\.n_tokens`"),
        ({"parameters_xxh3": 7}, r"Expected `str`, got `int` - at `\$\.parameters_xxh3`"),
        (
            {"corpus_sha256": None},
            "missing required field `corpus_sha256`; expected a baseline.json of run_baseline.py",
        ),
    ],
)
def test_difference_is_named(tmp_path, discovery, changes, message):
    with pytest.raises(RequestError, match=message):
        check_same(write(tmp_path, **changes), discovery)


def test_all_differences_are_named(tmp_path, discovery):
    with pytest.raises(RequestError, match=r"dtype is .*, nll is"):
        check_same(write(tmp_path, dtype="float16", nll=1.0), discovery)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "Expected `object`, got `array`"),
        ("{", "is damaged"),
        ('{"nll": 1, "nll": 2}', "the key 'nll' twice"),
    ],
)
def test_file_that_is_no_baseline(tmp_path, discovery, text, message):
    (tmp_path / "baseline.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        check_same(str(tmp_path / "baseline.json"), discovery)


@pytest.mark.parametrize("beside", [True, False])
def test_other_values_are_refused_and_named_where_the_digests_are_beside(tmp_path, discovery, beside):
    changed = fingerprint(parameters()[3])
    if beside:
        write_fingerprint(tmp_path, changed)
    what = r"model\.layers\.3\.mlp\.weight" if beside else "the values of the parameters"
    with pytest.raises(RequestError, match=f"is not of the setup of .*: the models differ in {what}$"):
        check_same(write(tmp_path, **changed.totals), discovery)


def test_other_tokenizer_is_refused(tmp_path, discovery):
    with pytest.raises(RequestError, match="the models differ in the tokenizer"):
        check_same(write(tmp_path, tokenizer_xxh3="0f"), discovery)


def test_without_a_fingerprint_there_is_a_warning(tmp_path, discovery):
    old = dict.fromkeys(fingerprint().totals)
    (warning,) = check_same(write(tmp_path, **old), discovery)
    assert "--baseline" in warning and "so the values of the models could not be compared" in warning
    path = discovery.folder / "baseline.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in old}))
    (warning,) = check_same(write(tmp_path), open_discovery(discovery.folder))
    assert warning.startswith("the discovery has no fingerprint")
