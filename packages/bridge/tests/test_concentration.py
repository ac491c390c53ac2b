import numpy as np
import pandas as pd
import pytest
from bridge.analysis.concentration import at_equal_fraction, global_curve, top_score_share

N = 2_000_000


@pytest.fixture(scope="module", params=[0.5, 2.0, 4.0])
def scores(request):
    """Scores of all weights of a model, highest first, from hardly to extremely concentrated."""
    return np.sort(np.exp(np.random.default_rng(0).normal(0, request.param, N)))[::-1]


def sampled_at(scores, ranks):
    return pd.DataFrame({"share_obd": np.array(ranks) / N, "score_obd": scores[np.array(ranks) - 1]})


@pytest.mark.parametrize("k", [200, 500])
def test_within_the_top_k_the_share_is_exact(scores, k):
    top = pd.DataFrame({"score": scores[:k]})
    assert top_score_share(top, None, "obd", scores.sum(), N) == pytest.approx(scores[:200].sum() / scores.sum())


@pytest.mark.parametrize("k", [10, 50])
def test_beyond_it_is_interpolated_between_sampled_ranks(scores, k):
    top, ranks = pd.DataFrame({"score": scores[:k]}), np.unique(np.geomspace(5, N, 80).astype(int))
    found = top_score_share(top, sampled_at(scores, ranks), "obd", scores.sum(), N)
    assert found == pytest.approx(scores[:200].sum() / scores.sum(), rel=0.02)


def test_unknown_where_nothing_is_known_so_far_down(scores):
    top = pd.DataFrame({"score": scores[:50]})
    assert np.isnan(top_score_share(top, None, "obd", scores.sum(), N))
    assert np.isnan(top_score_share(top, sampled_at(scores, [1, 60, 199]), "obd", scores.sum(), N))
    assert np.isnan(top_score_share(top, sampled_at(scores, [1, 60, 400]), "grad_squared", scores.sum(), N))
    assert np.isnan(top_score_share(top.assign(score=0.0), None, "obd", 0.0, 50))


def test_equal_fraction_is_interpolated_in_log_k():
    curves = {
        "small": pd.DataFrame({"k": [100, 1, 10], "delta_nll": [3.0, 1.0, 2.0]}),
        "large": pd.DataFrame({"k": [100], "delta_nll": [0.5]}),
        "coarse": pd.DataFrame({"k": [100], "delta_nll": [9.0]}),
    }
    fraction, ratios = at_equal_fraction(curves, {"small": 10_000, "large": 10_000 * 10**1.5, "coarse": 10_000})
    assert fraction == pytest.approx(100 / (10_000 * 10**1.5))
    assert ratios["small"] == pytest.approx(np.exp(1.5))  # half way from 1 to 10
    assert ratios["large"] == pytest.approx(np.exp(0.5))
    assert np.isnan(ratios["coarse"])


def test_infinite_effect_is_an_infinite_ratio():
    curves = {name: pd.DataFrame({"k": [5], "delta_nll": [effect]}) for name, effect in [("a", np.inf), ("b", 800.0)]}
    assert at_equal_fraction(curves, {"a": 10, "b": 10})[1] == {"a": np.inf, "b": np.inf}


def test_curve_is_of_the_whole_model_and_one_metric():
    rows = [("ALL", "zero", "top_obd", 10, 2.0), ("ALL", "zero", "top_obd", 1, 1.0), ("ALL", "zero", "top_x", 1, 7.0)]
    rows += [
        ("ALL", "sign_flip", "top_obd", 5, 7.0),
        ("h.0", "zero", "top_obd", 5, 7.0),
        ("ALL", "zero", "random", 5, 0.0),
    ]
    frame = pd.DataFrame(rows, columns=["target_layer", "perturbation", "selection", "k", "delta_nll"])
    assert global_curve(frame, "obd").to_numpy().tolist() == [[1, 1.0], [10, 2.0]]
