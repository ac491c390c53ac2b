import math

import pytest
import torch
from critical_weight_analysis.metrics import METRICS, Sensitivity
from engines import LAYERWISE, WHOLE_MODEL
from reference import naive_score, naive_sensitivities

EVERYTHING = frozenset().union(*(metric.needs for metric in METRICS.values()))


@pytest.mark.parametrize("metric", [metric for metric in METRICS if METRICS[metric].needs <= LAYERWISE.gives])
def test_every_score_of_every_weight_is_the_definition(model, sequences, metric):
    naive = naive_sensitivities(model, sequences)
    everywhere = METRICS[metric].needs <= WHOLE_MODEL.gives
    names = [name for name, weight in naive.weight.items() if everywhere or weight.ndim == 2]
    _, stream = (WHOLE_MODEL if everywhere else LAYERWISE).sensitivities(model, sequences, names, METRICS[metric].needs)
    found = {sensitivity.name: METRICS[metric].score(sensitivity) for sensitivity in stream}
    assert sorted(found) == sorted(names)
    for name, scores in found.items():
        assert scores.shape == naive.weight[name].shape
        torch.testing.assert_close(scores, naive_score(metric, naive, name), rtol=1e-9, atol=1e-16)


def test_scores_by_hand():
    sensitivity = Sensitivity(
        "w",
        torch.tensor([2.0, -3.0]),
        grad=torch.tensor([0.5, 0.25]),
        fisher=torch.tensor([4.0, 9.0]),
        curvature=torch.tensor([1.0, 2.0]),
        tokens=torch.tensor([7.0, 8.0]),
        inputs=torch.tensor([25.0, 4.0]),
        hessian=torch.tensor([-1.0, 5.0]),
    )
    expected = {
        "grad_x_weight": [1.0, 0.75],
        "grad_squared": [4.0, 9.0],
        "grad_squared_batch": [0.25, 0.0625],
        "grad_squared_token": [7.0, 8.0],
        "obd": [2.0, 9.0],
        "taylor2": [1.0, 9.75],
        "magnitude": [2.0, 3.0],
        "wanda": [10.0, 6.0],
        "hutchinson_diag": [1.0, 5.0],
    }
    assert {metric: METRICS[metric].score(sensitivity).tolist() for metric in METRICS} == expected


def test_each_metric_says_what_it_is():
    assert [name for name, metric in METRICS.items() if metric.baseline] == ["magnitude"]
    for name, metric in METRICS.items():
        assert metric.name == name
        assert set(metric.definition()) == {"formula", "unit", "source", "baseline"}
        assert metric.formula


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_narrow_weights_are_computed_wide(metric):
    weight = torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)
    wide = {need: torch.tensor([1.0 + 2**-20]) for need in METRICS[metric].needs}
    score = METRICS[metric].score(Sensitivity("w", weight, **wide))
    assert score.dtype == torch.float32
    g = h = 1 + 2**-20
    theta = 1 + 2**-7
    expected = {
        "grad_x_weight": theta * g,
        "grad_squared": g,
        "grad_squared_batch": g * g,
        "grad_squared_token": g,
        "obd": theta**2 * h / 2,
        "taylor2": abs(theta**2 * h / 2 - theta * g),
        "magnitude": theta,
        "wanda": theta * math.sqrt(g),
        "hutchinson_diag": g,
    }
    assert math.isclose(score.item(), expected[metric], rel_tol=1e-6)
