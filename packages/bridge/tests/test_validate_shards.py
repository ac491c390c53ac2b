"""Validations in several parts."""

import json
from pathlib import Path

import pytest
from bridge import validate
from bridge.exchange.errors import RequestError
from bridge.exchange.validation_run import choose_validation
from bridge.instrument import process
from validations import TABLES, options, stand_in, starts

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture
def merge(tmp_path, monkeypatch):
    """The script that puts shards together, and its stand-in behind the same Python."""
    monkeypatch.setattr(process, "MERGE", stand_in(tmp_path / "merge_shards.py"))


@pytest.mark.slow
def test_shards_and_their_merge_make_the_tables_of_one_run(tmp_path, output, python, merge, no_plots):
    more = {"single_weights": 6, "experiment_id": None}
    validate.validate(options(output, python, **more | {"experiment_id": "whole"}))
    for number in (1, 2, 3):
        part, following = validate.validate(options(output, python, shard=f"{number}/3", **more))
        assert part.startswith(f"shard {number}/3: {output}/partial_validation_")
        assert "--merge THAT_FOLDER" in following
        assert not list(Path(part.partition(": ")[2]).glob("report*"))
    lines = validate.validate(options(output, python, merge=[str(output)], **more | {"experiment_id": "merged"}))
    assert choose_validation([str(output)]).folder.name == "validation_merged"  # a part is none
    for table in TABLES:
        whole = (output / "validation_whole" / table).read_bytes()
        assert (output / "validation_merged" / table).read_bytes() == whole
    assert lines == [f"report: {output / 'validation_merged' / 'report.html'}", "a finding"]
    assert len({json.dumps(start["argv"][2:-3]) for start in starts(tmp_path)[1:]}) == 1  # as the merge demands


@pytest.mark.slow
def test_parts_of_another_request_are_not_merged(output, python, merge, no_plots):
    validate.validate(options(output, python, shard="1/1"))
    with pytest.raises(RequestError, match="the 1 parts there are of another request"):
        validate.validate(options(output, python, seeds=[5], merge=[str(output)]))
    with pytest.raises(RequestError, match="holds no complete partial_validation"):
        validate.validate(options(output, python, merge=[str(output / "critical_analysis_1")]))
    assert not (output / "validation_v").exists()


@pytest.mark.slow
def test_missing_shard_is_named(output, python, merge, no_plots):
    validate.validate(options(output, python, shard="1/2"))
    with pytest.raises(RequestError, match=r"merge_shards\.py refused: shard 2/2 is missing"):
        validate.validate(options(output, python, merge=[str(output)]))
