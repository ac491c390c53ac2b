import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.robustness import ablation_ratios, ratios_at_equal_fraction, zeroed_top_sets

METRIC = "grad_x_weight"


def test_the_ratios_are_those_of_the_largest_set_of_the_whole_model():
    table = synthetic.measurements(n=2, ks=(10, 100))
    ratios = ablation_ratios(table, METRIC)
    whole = table[(table["target_layer"] == "ALL") & (table["k"] == 100)]
    row = whole[whole["selection"] == f"top_{METRIC}"].iloc[0]
    assert ratios.ablation_k == 100
    assert ratios.ppl_ratio == pytest.approx(row["perturbed_ppl"] / row["baseline_ppl"])
    assert ratios.ppl_ratio_low == pytest.approx(np.exp(row["ci_low"]))
    assert ratios.ppl_ratio_high == pytest.approx(np.exp(row["ci_high"]))
    draws = whole[whole["selection"] == "random"]["delta_nll"]
    assert ratios.random_ppl_ratio == pytest.approx(np.exp(max(draws)))


def test_no_ratios_where_the_whole_model_was_not_zeroed():
    table = synthetic.measurements(n=2)
    assert ablation_ratios(table[table["target_layer"] != "ALL"], METRIC) is None
    assert ablation_ratios(table.assign(perturbation="sign_flip"), METRIC) is None
    without_draws = ablation_ratios(table[table["selection"] != "random"], METRIC)
    assert np.isnan([without_draws.random_ppl_ratio, without_draws.random_unbounded_share]).all()


def test_random_sets_without_a_finite_loss_have_the_largest_ratio():
    table = synthetic.measurements(n=2, seeds=(0, 1, 2, 3))
    assert ablation_ratios(table, METRIC).random_unbounded_share == 0
    drawn = table.index[(table["target_layer"] == "ALL") & (table["selection"] == "random")]
    table.loc[drawn[1], "delta_nll"] = np.nan
    ratios = ablation_ratios(table, METRIC)
    assert (ratios.random_ppl_ratio, ratios.random_unbounded_share) == (np.inf, 0.25)
    top = (table["target_layer"] == "ALL") & (table["selection"] == f"top_{METRIC}")
    table.loc[top, ["delta_nll", "ci_low", "ci_high"]] = [np.nan, 1.0, np.inf]
    ratios = ablation_ratios(table, METRIC)
    assert (ratios.ppl_ratio, ratios.ppl_ratio_low, ratios.ppl_ratio_high) == (np.inf, np.exp(1.0), np.inf)


def test_equal_fraction_is_interpolated_in_log_k():
    curves = {
        "coarse": pd.DataFrame({"k": [100], "delta_nll": [9.0]}),
        "small": pd.DataFrame({"k": [100, 1, 10], "delta_nll": [3.0, 1.0, 2.0]}),
        "large": pd.DataFrame({"k": [100], "delta_nll": [0.5]}),
    }
    curves["near"] = curves["coarse"]
    n_weights = {"small": 10_000, "large": 10_000 * 10**1.5, "coarse": 10_000, "near": 8000 * 10**1.5}
    fraction, ratios = ratios_at_equal_fraction(curves, n_weights)
    assert fraction == pytest.approx(100 / (10_000 * 10**1.5))
    assert ratios["small"] == pytest.approx(np.exp(1.5))  # half way from 1 to 10
    assert ratios["large"] == pytest.approx(np.exp(0.5))
    assert np.isnan([ratios["coarse"], ratios["near"]]).all()  # 3 and 80 of 100


def test_infinite_effect_is_an_infinite_ratio():
    curves = {name: pd.DataFrame({"k": [5], "delta_nll": [effect]}) for name, effect in [("a", np.inf), ("b", 800.0)]}
    assert ratios_at_equal_fraction(curves, {"a": 10, "b": 10})[1] == {"a": np.inf, "b": np.inf}


def test_zeroed_top_sets_are_of_the_whole_model_and_one_metric():
    rows = [
        ("ALL", "zero", "top_obd", 10, 2.0),
        ("ALL", "zero", "top_obd", 1, 1.0),
        ("ALL", "zero", "top_x", 1, 7.0),
        ("ALL", "sign_flip", "top_obd", 5, 7.0),
        ("h.0", "zero", "top_obd", 5, 7.0),
        ("ALL", "zero", "random", 5, 0.0),
    ]
    table = pd.DataFrame(rows, columns=["target_layer", "perturbation", "selection", "k", "delta_nll"])
    assert zeroed_top_sets(table, "obd")[["k", "delta_nll"]].to_numpy().tolist() == [[1, 1.0], [10, 2.0]]


def test_what_another_perturbation_did_does_not_enter():
    table = synthetic.measurements(n=2, ks=(10, 100), perturbations=("sign_flip", "zero"))
    zeroed = table["perturbation"] == "zero"
    loudest = table[~zeroed].assign(delta_nll=50.0)
    ratios = ablation_ratios(pd.concat([loudest, table[zeroed]]), METRIC)
    assert ratios == ablation_ratios(table[zeroed], METRIC)
    assert ratios.ppl_ratio_low < ratios.ppl_ratio < ratios.ppl_ratio_high < np.exp(50)
    assert 0.99 < ratios.random_ppl_ratio < 1.01
