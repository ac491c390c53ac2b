import numpy as np
import pandas as pd
import pytest
import reference
import synthetic
from bridge.analysis.correlation import (
    ablation_curves,
    correlate,
    is_restricted,
    top_against_random,
)
from bridge.analysis.single_weights import weight_effects
from bridge.exchange.tables import CORRELATIONS, MEASUREMENTS, read_table, write_table


@pytest.fixture(scope="module")
def measurements():
    return synthetic.measurements()


@pytest.fixture(scope="module")
def correlations(measurements):
    return correlate(measurements, targets=synthetic.targets())


def layers_of(measurements, metric):
    rows = measurements[(measurements["selection"] == f"top_{metric}") & (measurements["target_layer"] != "ALL")]
    return rows["score_sum"].tolist(), rows["delta_nll"].tolist()


@pytest.mark.parametrize("metric", synthetic.METRICS)
def test_a_row_for_each_metric_without_the_target_all(measurements, correlations, metric):
    row = correlations.set_index("metric").loc[metric]
    assert (row["unit"], row["perturbation"], row["k"], row["n"]) == ("layers", "zero", 100, 30)
    assert row["spearman"] == pytest.approx(reference.spearman(*layers_of(measurements, metric)))
    assert row["kendall_tau_b"] == pytest.approx(reference.tau_b(*layers_of(measurements, metric)))
    assert row["note"] == ""


def test_p_values_are_adjusted_over_the_metrics(correlations):
    assert correlations["p_adjusted"].tolist() == pytest.approx(
        reference.benjamini_hochberg(correlations["p_value"].tolist())
    )


def test_the_same_seed_gives_the_same_numbers_in_any_order(measurements, correlations):
    turned = correlate(measurements.iloc[::-1], targets=synthetic.targets()).set_index("metric")
    exact = correlations.set_index("metric")
    assert turned.loc["obd", "spearman"] == pytest.approx(exact.loc["obd", "spearman"])
    alone = correlate(measurements[measurements["selection"] == "top_obd"]).set_index("metric").loc["obd"]
    assert (
        alone[["ci_low", "ci_high", "p_value"]].tolist() == exact.loc["obd", ["ci_low", "ci_high", "p_value"]].tolist()
    )
    assert correlate(measurements, seed=1)["ci_low"].tolist() != correlations["ci_low"].tolist()


def test_the_table_can_be_written_and_read(tmp_path, correlations):
    write_table(tmp_path / "correlations.csv", correlations, CORRELATIONS)
    back = read_table(tmp_path / "correlations.csv", CORRELATIONS)
    pd.testing.assert_frame_equal(back, correlations, check_dtype=False)


def test_three_layers_are_too_few(tmp_path):
    found = correlate(synthetic.measurements(n=3))
    assert found["spearman"].isna().all()
    assert found["note"].str.contains("3 layers are too few for a rank correlation").all()
    write_table(tmp_path / "correlations.csv", found, CORRELATIONS)
    assert "nan" not in (tmp_path / "correlations.csv").read_text().lower()


def test_only_the_whole_model_measured_is_no_correlation():
    measurements = synthetic.measurements(n=2)
    found = correlate(measurements[measurements["target_layer"] == "ALL"])
    assert found["n"].tolist() == [0, 0, 0]
    assert found["note"].str.contains("too few").all()


def test_without_controls_the_range_is_said_to_be_restricted(measurements):
    found = correlate(measurements, targets=synthetic.targets(n_control=0))
    assert found["note"].str.contains("range is restricted").all()


def test_an_infinite_loss_ranks_first(measurements):
    broken = measurements.copy()
    worst = broken[(broken["selection"] == "top_obd") & (broken["target_layer"] != "ALL")]["score_sum"].idxmax()
    broken.loc[worst, ["delta_nll", "ci_low", "ci_high"]] = np.nan
    row = correlate(broken).set_index("metric").loc["obd"]
    x, y = layers_of(measurements.assign(delta_nll=broken["delta_nll"].fillna(1e9)), "obd")
    assert row["spearman"] == pytest.approx(reference.spearman(x, y))
    assert row["n"] == 30
    assert "ranked as the largest: 1" in row["note"]


def test_seeds_of_a_random_perturbation_are_averaged():
    measurements = synthetic.measurements(n=6, metrics=("obd",))
    top = measurements[measurements["selection"] == "top_obd"]
    noisy = pd.concat(
        [top.assign(seed=0, delta_nll=top["delta_nll"] * 3), top.assign(seed=1, delta_nll=-top["delta_nll"])]
    )
    row = correlate(noisy).iloc[0]
    assert row["n"] == 6
    assert row["spearman"] == pytest.approx(reference.spearman(*layers_of(measurements, "obd")))


def test_layers_of_the_whole_summary_are_not_a_restricted_range(measurements):
    every = synthetic.targets(n_control=0).assign(n_layers=30)
    assert not correlate(measurements, targets=every)["note"].str.contains("restricted").any()
    assert is_restricted(every.assign(n_layers=32))


@pytest.fixture(scope="module")
def with_weights(measurements):
    """Thirty of forty sampled weights, measured in another order than they were sampled in."""
    return synthetic.with_single_weights(measurements, synthetic.sampled().sample(30, random_state=1))


def test_every_metric_is_compared_on_the_same_single_weights(with_weights):
    sampled = synthetic.sampled()
    found = correlate(with_weights, targets=synthetic.targets(n_control=0), sampled=sampled)
    rows = found[found["unit"] == "weights"].set_index("metric")
    assert list(rows.index) == list(synthetic.METRICS)
    scores = {(w.parameter, w.row): w._asdict() for w in sampled.itertuples()}
    weights = with_weights[with_weights["selection"] == "weight"]
    for metric in synthetic.METRICS:
        x = [scores[w.parameter, w.row][f"score_{metric}"] for w in weights.itertuples()]
        assert rows.loc[metric, "spearman"] == pytest.approx(reference.spearman(x, weights["delta_nll"].abs().tolist()))
    assert set(rows["n"]) == {30} and set(rows["k"]) == {1}
    assert rows["p_adjusted"].tolist() == pytest.approx(reference.benjamini_hochberg(rows["p_value"].tolist()))
    assert not rows["note"].str.contains("restricted").any()


def test_weights_are_left_out_without_scores_or_measurements(with_weights, measurements):
    assert set(correlate(with_weights)["unit"]) == {"layers"}
    assert set(correlate(measurements, sampled=synthetic.sampled())["unit"]) == {"layers"}


def test_single_weights_change_nothing_else(measurements, with_weights):
    layer = synthetic.layer_names()[0]
    here = with_weights["selection"] == "weight"
    mixed = with_weights.assign(target_layer=with_weights["target_layer"].mask(here, layer))
    pd.testing.assert_frame_equal(correlate(mixed), correlate(measurements))
    pd.testing.assert_frame_equal(top_against_random(mixed), top_against_random(measurements))
    pd.testing.assert_frame_equal(ablation_curves(mixed), ablation_curves(measurements))


def test_measurements_of_single_weights_come_back_from_their_file(tmp_path, with_weights):
    write_table(tmp_path / "measurements.csv", with_weights, MEASUREMENTS)
    back = read_table(tmp_path / "measurements.csv", MEASUREMENTS)
    sampled = synthetic.sampled()
    pd.testing.assert_frame_equal(weight_effects(back, sampled), weight_effects(with_weights, sampled))


def test_seeds_of_one_weight_are_one_effect_of_mean_size():
    sampled = synthetic.sampled(6, metrics=("obd",))
    once = synthetic.with_single_weights(synthetic.measurements(n=1, metrics=("obd",)), sampled)
    weights = once[once["selection"] == "weight"]
    twice = pd.concat([weights.assign(seed=0), weights.assign(seed=1, delta_nll=-3 * weights["delta_nll"])])
    effects = weight_effects(twice, sampled)
    assert effects["size"].tolist() == pytest.approx((2 * weights["delta_nll"].abs()).tolist())
    assert effects["delta_nll"].tolist() == pytest.approx((-weights["delta_nll"]).tolist())


def test_an_infinite_effect_of_a_weight_ranks_first(with_weights):
    broken = with_weights.copy()
    where = broken.index[broken["selection"] == "weight"][3]
    broken.loc[where, ["delta_nll", "ci_low", "ci_high"]] = np.nan
    found = correlate(broken, sampled=synthetic.sampled())
    notes = found.loc[found["unit"] == "weights", "note"]
    assert notes.str.contains("ranked as the largest: 1").all()


def test_a_metric_is_compared_with_magnitude_over_the_same_weights():
    both = ("grad_x_weight", "magnitude")
    sampled = synthetic.sampled(metrics=both)
    measurements = synthetic.with_single_weights(synthetic.measurements(), sampled)
    found = correlate(measurements, sampled=sampled)
    row, other = (
        found[(found["unit"] == "weights") & (found["metric"] == m)].iloc[0] for m in ("grad_x_weight", "magnitude")
    )
    effects = weight_effects(measurements, sampled)
    rhos = [
        reference.spearman(effects[f"score_{m}"].tolist(), effects["size"].tolist())
        for m in ("grad_x_weight", "magnitude")
    ]
    assert row["above_magnitude"] == pytest.approx(rhos[0] - rhos[1])
    assert row["above_low"] < row["above_magnitude"] < row["above_high"]
    assert pd.isna(other["above_magnitude"])


def test_several_k_give_a_correlation_of_the_areas():
    measurements = synthetic.measurements(n=12, metrics=("obd",), ks=(1, 10, 1000))
    found = correlate(measurements)
    assert found["unit"].tolist() == ["layers"] * 3 + ["ablation_curve"]
    tops = measurements[(measurements["selection"] == "top_obd") & (measurements["target_layer"] != "ALL")]
    areas = {}
    for column in ["score_sum", "delta_nll"]:
        table = tops.pivot_table(index="target_layer", columns="k", values=column, sort=False)
        areas[column] = ((table[1] + table[10]) / 2 * 1 + (table[10] + table[1000]) / 2 * 2).tolist()
    assert found.iloc[-1]["spearman"] == pytest.approx(reference.spearman(areas["score_sum"], areas["delta_nll"]))


def test_top_is_compared_with_each_random_draw_of_its_target(measurements):
    found = top_against_random(measurements).set_index(["target_layer", "metric"])
    assert len(found) == 31 * 3
    row = found.loc[("ALL", "grad_x_weight")]
    drawn = measurements[(measurements["target_layer"] == "ALL") & (measurements["selection"] == "random")]["delta_nll"]
    assert (row["n_random"], row["p_value"]) == (3, 0.25)
    assert [row["random_low"], row["random_mean"], row["random_high"]] == pytest.approx(
        [drawn.min(), drawn.mean(), drawn.max()]
    )


def test_top_without_random_draws_has_no_p_value(measurements):
    found = top_against_random(measurements[measurements["selection"] != "random"])
    assert (found["n_random"] == 0).all()
    assert found[["p_value", "random_mean"]].isna().all().all()


def test_ablation_curve_is_the_mean_height_over_log_k():
    base = synthetic.measurements(n=1, metrics=("obd",), ks=(1, 10, 1000), with_all=False)
    effect = {1: 0.0, 10: 2.0, 1000: 4.0}
    base["delta_nll"] = [
        effect[k] if s == "top_obd" else 0.5 for k, s in zip(base["k"], base["selection"], strict=True)
    ]
    row = ablation_curves(base).iloc[0]
    assert (row["n_k"], row["k_low"], row["k_high"]) == (3, 1, 1000)
    assert row["area"] == pytest.approx((1 * 1.0 + 2 * 3.0) / 3)
    assert row["area_excess"] == pytest.approx(row["area"] - 0.5)


def test_no_curve_from_a_single_k(measurements):
    assert ablation_curves(measurements).empty


def test_a_metric_is_compared_with_magnitude_over_the_same_layers(measurements):
    found = correlate(measurements).set_index("metric")
    row = found.loc["grad_x_weight"]
    rhos = [reference.spearman(*layers_of(measurements, metric)) for metric in ("grad_x_weight", "magnitude")]
    assert row["above_magnitude"] == pytest.approx(rhos[0] - rhos[1])
    assert row["above_low"] < row["above_magnitude"] < row["above_high"]
    assert pd.isna(found.loc["magnitude", "above_magnitude"])
    without = measurements[measurements["selection"] != "top_magnitude"]
    assert correlate(without)["above_magnitude"].isna().all()
