import doctest
import re

import pytest
from bridge.exchange import layout
from bridge.exchange.errors import RequestError


def test_the_examples_of_the_docstrings_are_true():
    results = doctest.testmod(layout)
    assert results.attempted and not results.failed


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (layout.WeightsFile("top", 100, "weights", "obd"), "top_100_weights_obd.csv"),
        (layout.WeightsFile("top", 5, "per_layer", "grad_x_weight"), "top_5_per_layer_grad_x_weight.csv"),
        (layout.WeightsFile("bottom", 40, "weights", "magnitude"), "bottom_40_weights_magnitude.csv"),
        (layout.WeightsFile("random", 40, "weights", None), "random_40_weights.csv"),
    ],
)
def test_a_weights_file_is_read_from_its_name_as_it_was_written(file, name):
    assert layout.weights_file(*file) == name
    assert layout.parse_weights_file(name) == file


@pytest.mark.parametrize(
    "name",
    ["top_weights_obd.csv", "top_5_weights.csv", "random_5_weights_obd.csv", "x_top_5_weights_obd.csv", "report.md"],
)
def test_other_names_are_not_weights_files(name):
    assert layout.parse_weights_file(name) is None


def test_columns_and_labels_give_their_metric_back():
    columns = ["value", layout.score_column("obd"), layout.share_column("obd"), layout.score_column("score_x")]
    assert layout.metrics_of_columns(columns) == ["obd", "score_x"]
    labels = [layout.top_label("obd"), layout.bottom_label("obd"), layout.matched_label("obd")]
    assert labels == ["top_obd", "bottom_obd", "matched_obd"]
    assert [layout.metric_of_label(label) for label in labels] == ["obd"] * 3
    assert [layout.is_top(label) for label in labels] == [True, False, False]
    assert [layout.is_bottom(label) for label in labels] == [False, True, False]
    assert [layout.is_matched(label) for label in labels] == [False, False, True]
    others = [layout.RANDOM, layout.SINGLE_WEIGHT, layout.ROW, layout.RANDOM_COL]
    assert [layout.metric_of_label(label) for label in others] == [None] * 4


def test_progress_files_match_their_pattern():
    assert layout.progress_file(3) == "progress-3.jsonl"
    assert re.fullmatch(layout.PROGRESS_FILES.replace("*", ".*"), layout.progress_file(12))


@pytest.mark.parametrize("text", ["1/1", "2/4", "400000/400001"])
def test_a_shard_is_read_as_it_is_written(text):
    shard = layout.parse_shard(text)
    assert str(shard) == text
    assert shard.experiment_id("x") == f"x_{text.replace('/', '_of_')}"


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/2/3", "a/b", " 1/2", "1/0", "1234567/1234568"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(RequestError, match=r"--shard '.*' must be i/n, such as 2/4, with i from 1 to n"):
        layout.parse_shard(text)
