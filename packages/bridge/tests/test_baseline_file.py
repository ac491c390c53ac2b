import json
import math

import pytest
from bridge.exchange.baseline_file import check_same
from bridge.exchange.discovery_run import open_discovery
from bridge.exchange.errors import RequestError
from discovery_folder import CORPUS, make_discovery


@pytest.fixture
def discovery(tmp_path):
    return open_discovery(make_discovery(tmp_path / "o"))


def write(tmp_path, **changes):
    """The file that run_baseline.py writes for the same setup, with changes."""
    same = {"model": "tiny", "revision": "abc", "dtype": "float32", "corpus_sha256": CORPUS["corpus_sha256"]}
    path = tmp_path / "baseline.json"
    content = same | {"nll": 3.5, "ppl": math.exp(3.5), "n_tokens": 90, "n_sequences": 3} | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(path)


@pytest.mark.parametrize("nll", [3.5, 3.5 * (1 + 5e-5), 3.5 * (1 - 5e-5)])
def test_same_setup_and_the_same_loss_up_to_rounding(tmp_path, discovery, nll):
    check_same(write(tmp_path, nll=nll), discovery)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "model is other there and tiny in the discovery"),
        ({"revision": "abd"}, "revision is abd there and abc in"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16 there and float32 in"),
        ({"corpus_sha256": "e" * 64}, "corpus_sha256 is eeee.* there and cccc"),
        ({"nll": 3.5 * (1 + 2e-4)}, "nll is 3.5007.* there and 3.5 in"),
        ({"nll": math.nan}, "nll is nan there"),
        ({"nll": "3.5"}, "has nll '3.5', which is not a number"),
        ({"corpus_sha256": None, "nll": None}, "lacks corpus_sha256, nll; expected a baseline.json of run_baseline.py"),
    ],
)
def test_difference_is_named(tmp_path, discovery, changes, message):
    with pytest.raises(RequestError, match=message):
        check_same(write(tmp_path, **changes), discovery)


def test_all_differences_are_named(tmp_path, discovery):
    with pytest.raises(RequestError, match=r"dtype is .*, nll is"):
        check_same(write(tmp_path, dtype="float16", nll=1.0), discovery)


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "lacks model"), ("{", "is not JSON")])
def test_file_that_is_no_baseline(tmp_path, discovery, text, message):
    (tmp_path / "baseline.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        check_same(str(tmp_path / "baseline.json"), discovery)
