import math

import pytest
import torch
from critical_weight_analysis import whole_model
from critical_weight_analysis.layerwise import engine
from critical_weight_analysis.metrics import FORMULAS, NEEDS, Sensitivity
from reference import naive_score, naive_sensitivities

EVERYTHING = frozenset().union(*NEEDS.values())


@pytest.mark.parametrize("metric", [metric for metric in FORMULAS if NEEDS[metric] <= engine.GIVES])
def test_every_score_of_every_weight_is_the_definition(model, sequences, metric):
    naive = naive_sensitivities(model, sequences)
    everywhere = NEEDS[metric] <= whole_model.GIVES
    names = [name for name, weight in naive.weight.items() if everywhere or weight.ndim == 2]
    _, stream = (whole_model if everywhere else engine).sensitivities(model, sequences, names, NEEDS[metric])
    found = {sensitivity.name: FORMULAS[metric](sensitivity) for sensitivity in stream}
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
    assert {metric: FORMULAS[metric](sensitivity).tolist() for metric in FORMULAS} == expected


def test_each_metric_has_a_formula_and_its_needs():
    assert FORMULAS.keys() == NEEDS.keys()


@pytest.mark.parametrize("metric", FORMULAS)
def test_scores_of_narrow_weights_are_computed_wide(metric):
    weight = torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)
    wide = {need: torch.tensor([1.0 + 2**-20]) for need in NEEDS[metric]}
    score = FORMULAS[metric](Sensitivity("w", weight, **wide))
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
