import itertools

import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.ablation_curves import ablation_curves, curves_of_layers, mean_height
from bridge.analysis.measured_sets import top_sets


def test_ablation_curve_is_the_mean_height_over_log_k():
    base = synthetic.measurements(n=1, metrics=("obd",), ks=(1, 10, 1000), with_all=False)
    effect = {1: 0.0, 10: 2.0, 1000: 4.0}
    base["delta_nll"] = [
        effect[k] if s == "top_obd" else 0.5 for k, s in zip(base["k"], base["selection"], strict=True)
    ]
    table = ablation_curves(base)
    assert list(table) == [
        "target_layer",
        "metric",
        "perturbation",
        "n_k",
        "k_low",
        "k_high",
        "area",
        "area_random",
        "area_excess",
    ]
    row = table.iloc[0]
    assert (row["n_k"], row["k_low"], row["k_high"]) == (3, 1, 1000)
    assert row["area"] == pytest.approx((1 * 1.0 + 2 * 3.0) / 3)
    assert row["area_excess"] == pytest.approx(row["area"] - 0.5)


def test_curves_come_in_the_order_of_the_measurements():
    table = synthetic.measurements(n=3, metrics=("obd", "magnitude"), ks=(1, 10), perturbations=("zero", "sign_flip"))
    curves = ablation_curves(table)[["perturbation", "target_layer", "metric"]]
    targets = [*synthetic.layer_names(3), "ALL"]
    expected = itertools.product(("zero", "sign_flip"), targets, ("obd", "magnitude"))
    assert list(curves.itertuples(index=False, name=None)) == list(expected)


def test_no_curve_from_a_single_k():
    assert ablation_curves(synthetic.measurements(n=2)).empty
    table = synthetic.measurements(n=2, ks=(1, 10))
    first, second = synthetic.layer_names(2)
    table = table[(table["k"] == 1) | (table["target_layer"] != first)]
    assert ablation_curves(table)["target_layer"].unique().tolist() == [second, "ALL"]


def test_curves_of_two_k_and_without_random_draws():
    table = synthetic.measurements(n=1, metrics=("obd",), ks=(2, 200), seeds=(), with_all=False)
    table = table[table["selection"] == "top_obd"].assign(delta_nll=[1.0, 4.0])
    row = ablation_curves(table).iloc[0]
    assert (row["n_k"], row["k_low"], row["k_high"], row["area"]) == (2, 2, 200, 2.5)
    assert np.isnan([row["area_random"], row["area_excess"]]).all()
    seeds = pd.concat([table, table.assign(delta_nll=[2.0, 9.0])])
    assert ablation_curves(seeds)["area"].tolist() == pytest.approx([(1.5 + 6.5) / 2])


def test_mean_height_of_each_curve():
    heights = mean_height(np.array([1.0, 10.0, 1000.0]), np.array([[0.0, 2.0, 4.0], [3.0, 3.0, 3.0]]))
    assert heights.tolist() == pytest.approx([7 / 3, 3.0])


def test_layers_have_curves_from_two_k_on_if_they_were_measured_at_each():
    table = synthetic.measurements(n=3, metrics=("obd",), ks=(2, 200), seeds=())
    points = top_sets(table)
    points["score_sum"], points["delta_nll"] = range(8), [1.0, 4, 0, 0, 7, 9, 0, 0]
    missing = points.index[3]  # the second layer at k = 200
    heights, ks = curves_of_layers(points.drop(missing))
    first, _, third = synthetic.layer_names(3)
    assert ks == [2, 200]
    assert heights["delta_nll"].to_dict() == {first: 2.5, third: 8.0}
    assert heights["score_sum"].to_dict() == {first: 0.5, third: 4.5}
    turned = points.drop(missing).iloc[::-1]
    again, _ = curves_of_layers(pd.concat([turned, turned.assign(score_sum=7, delta_nll=9)]))  # two seeds
    assert again.index.tolist() == sorted([first, third])
    assert again.loc[[first, third]].to_numpy().ravel().tolist() == pytest.approx([3.75, 5.75, 5.75, 8.5])
    for too_few in (points[points["k"] == 2], points[(points["k"] == 2) ^ (points["target_layer"] == first)]):
        heights, ks = curves_of_layers(too_few)
        assert len(heights) == 0 and ks == []
    three = pd.concat([points, points[points["k"] == 2].assign(k=20_000, score_sum=8, delta_nll=10)])
    heights, ks = curves_of_layers(three)
    assert ks == [2, 200, 20_000]
    assert heights.loc[first].tolist() == pytest.approx([(0.5 + 4.5) / 2, (2.5 + 7) / 2])
