import doctest

from bridge.exchange import recorded_metrics
from bridge.exchange.recorded_metrics import UNKNOWN_METRIC, read_metric_definitions


def test_the_example_of_the_docstring_is_true():
    results = doctest.testmod(recorded_metrics)
    assert results.attempted and not results.failed


def test_a_definition_is_one_line_with_source_and_unit():
    entry = {"formula": "|θ g|", "unit": "nats per token", "source": "A 2001", "baseline": False}
    definition = read_metric_definitions({"metrics": {"m": entry}})["m"]
    assert definition.text == "|θ g| (A 2001); unit: nats per token"
    assert read_metric_definitions({"metrics": {"m": {"formula": "|θ|"}}})["m"].text == "|θ|"


def test_the_baseline_is_the_metric_that_says_so():
    entries = {"magnitude": {"formula": "|θ|"}, "noise": {"formula": "u", "baseline": True}}
    assert read_metric_definitions({"metrics": entries}).baseline == "noise"
    assert read_metric_definitions({"metrics": {"obd": {"formula": "h"}}}).baseline == "magnitude"


def test_a_manifest_without_definitions():
    for manifest in ({}, {"metrics": None}, {"metrics": {"obd": {}}}):
        definitions = read_metric_definitions(manifest)
        assert definitions["obd"] == UNKNOWN_METRIC
        assert definitions.baseline == "magnitude"
