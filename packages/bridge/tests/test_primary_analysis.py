import pytest
from bridge.analysis.primary_analysis import Primary, primary_analysis

OPTIONS = {
    "metrics": ["magnitude", "obd", "wanda"],
    "k": [100, 10],
    "perturbations": ["scale", "zero"],
    "target_layers": ["h.0", "ALL"],
}


@pytest.mark.parametrize(
    ("changes", "primary"),
    [
        ({}, Primary("layers", "obd", "scale", 100)),
        ({"metrics": ["magnitude"]}, Primary("layers", "magnitude", "scale", 100)),
        ({"target_layers": ["ALL"]}, Primary("weights", "obd", "scale", 1)),
        (
            {"primary": {"unit": "layers", "metric": "wanda", "perturbation": "zero", "k": 10}},
            Primary("layers", "wanda", "zero", 10),
        ),
    ],
)
def test_the_first_of_everything_or_what_the_manifest_says(changes, primary):
    assert primary_analysis(OPTIONS | changes, "magnitude") == primary


def test_a_metric_that_was_named_takes_the_first_of_all_else():
    assert primary_analysis(OPTIONS, "magnitude", "wanda") == Primary("layers", "wanda", "scale", 100)
    assert primary_analysis(OPTIONS, "magnitude", "magnitude").metric == "magnitude"


def test_a_row_is_the_primary_one_whatever_the_number_of_its_perturbation():
    primary = Primary("layers", "obd", "scale", 100)
    assert primary.is_row("layers", "obd", "scale(0.5)", 100)
    for other in (("weights", "obd", "scale", 100), ("layers", "x", "scale", 100), ("layers", "obd", "zero", 100)):
        assert not primary.is_row(*other)
    assert not primary.is_row("layers", "obd", "scale", 10)
