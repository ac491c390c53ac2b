"""Validations on other texts than those that gave the scores."""

from pathlib import Path

import pandas as pd
import pytest
from bridge import validate
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.existing_runs import read_manifest
from bridge.instrument.plan import plan
from discovery_folder import make_discovery
from validations import options

pytestmark = pytest.mark.usefixtures("blank_figures")


def judging_texts(folder, content="a text that judges\n") -> Path:
    path = folder / "judging.txt"
    path.write_text(content)
    return path


@pytest.mark.slow
def test_the_damage_is_measured_on_other_texts(tmp_path, output, python):
    path = judging_texts(tmp_path)
    chosen = options(output, python, eval_data_file=str(path), eval_limit=7)
    assert plan(chosen).cost == f"40 measurements (8 targets x 5 sets of weights) on {path}"
    lines = validate.validate(chosen)
    assert f"on {path} (" in lines[1]
    folder = output / "validation_v"
    manifest = read_manifest(folder)
    assert manifest["identity"]["corpus"]["corpus_sha256"] == "c" * 64
    assert manifest["measured_corpus"]["corpus_sha256"] == "e" * 64
    assert manifest["identity"]["evaluation"]["data_file"] == str(path)
    words = manifest["instrument"]
    assert f"--data-file={path}" in words and "--eval-limit=7" in words and "--max-length=64" in words
    assert set(pd.read_csv(folder / "measurements.csv")["baseline_nll"]) == {3.9}  # the instrument's own baseline
    report = (folder / "report.md").read_text()
    assert "Texts of the scores" in report and "shipped passages" in report
    assert "measured on other texts than gave the scores" in report
    assert "MEASURED ON THE TEXTS THAT GAVE THE SCORES" not in report


@pytest.mark.slow
def test_without_other_texts_the_report_says_so_loudly(output, python):
    validate.validate(options(output, python))
    report = (output / "validation_v" / "report.md").read_text()
    assert "MEASURED ON THE TEXTS THAT GAVE THE SCORES" in report
    captions = [line for line in report.splitlines() if line.startswith(("Each point is", "Change of loss by layer"))]
    assert captions and all(line.endswith("Measured on the texts that gave the scores.") for line in captions)


@pytest.mark.slow
def test_another_model_is_refused_on_other_texts_too(tmp_path, output, python, monkeypatch, no_plots):
    monkeypatch.setenv("FAKE", "other")
    with pytest.raises(RunError, match="the model that was measured is not the discovery's"):
        validate.validate(options(output, python, eval_data_file=str(judging_texts(tmp_path))))


def test_other_content_of_the_judging_texts_is_another_validation(tmp_path, output, python):
    path = judging_texts(tmp_path)
    chosen = options(output, python, eval_data_file=str(path))
    first = plan(chosen).identity
    assert plan(chosen).identity == first
    judging_texts(tmp_path, "other\n")
    assert plan(chosen).identity != first
    assert "evaluation" not in plan(options(output, python)).identity


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({"eval_split": "test"}, "name them with --eval-data-file or --eval-dataset"),
        ({"eval_limit": 3}, "name them with --eval-data-file or --eval-dataset"),
        ({"eval_dataset": "a", "eval_data_file": "b"}, "exclude each other"),
        ({"eval_dataset": "a", "eval_limit": 0}, "--eval-limit must be at least 1, not 0"),
        ({"eval_data_file": "gone.txt"}, "--eval-data-file gone.txt: no such file"),
    ],
)
def test_judging_texts_that_cannot_be(output, python, chosen, complaint):
    with pytest.raises(RequestError, match=complaint):
        plan(options(output, python, **chosen))


def test_a_discovery_of_an_older_version_is_measured_on_its_own_token_sequences(tmp_path, python):
    """It parsed special tokens inside texts, put no BOS token in windows and recorded a split that it did not use."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}')
    make_discovery(tmp_path / "o", dataset=str(data), split="test", packing="windows")
    words = plan(options(tmp_path / "o", python)).command
    assert "--parse-special-tokens" in words and "--window-bos=never" in words
    assert not any(word.startswith("--split") for word in words)
    new = {"parse_special_tokens": False, "window_bos": "auto", "max_length": None}
    make_discovery(tmp_path / "n", dataset="wikitext", split="test", packing="windows", **new)
    words = plan(options(tmp_path / "n", python)).command
    assert "--parse-special-tokens" not in words and "--window-bos=auto" in words and "--split=test" in words
