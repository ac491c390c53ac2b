from itertools import product

import numpy as np
import pandas as pd
import pytest
import reference
import synthetic
from bridge.analysis.ablation_curves import ablation_curves
from bridge.analysis.components import decoder_part
from bridge.analysis.correlation import correlate, write_correlations
from bridge.analysis.metric_comparison import compare_metrics
from bridge.analysis.primary_analysis import Primary
from bridge.analysis.rho_over_texts import rho_over_texts
from bridge.analysis.single_weights import weight_effects
from bridge.analysis.targets import is_restricted
from bridge.analysis.top_against_random import top_against_random
from bridge.analysis.weighted_rho import effective_number, rho_interval, weighted_rho
from bridge.analysis.within_kinds import kind_and_depth, within_kinds
from bridge.exchange.discovery_run import open_discovery
from bridge.exchange.errors import RequestError
from bridge.exchange.tables import CORRELATIONS, MEASUREMENTS, TARGETS, read_table, write_table
from bridge.exchange.validation_run import Validation
from discovery_folder import make_discovery


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
    assert row["ci_low"] < row["spearman"] < row["ci_high"]
    assert row["within_low"] < row["within_rho"] < row["within_high"]
    assert row["note"] == ""


def test_all_p_values_of_a_table_are_one_family_but_the_primary_one(measurements):
    sampled = synthetic.sampled()
    both = synthetic.with_single_weights(synthetic.measurements(ks=(10, 100)), sampled)
    table = correlate(both, sampled=sampled, primary=Primary("layers", "obd", "zero", 10))
    p_values = table["within_p"].where(table["unit"] != "weights", table["p_value"])
    is_primary = table["primary"] == 1
    assert table[is_primary][["unit", "metric", "k"]].to_numpy().tolist() == [["layers", "obd", 10]]
    assert table["unit"].nunique() == 3 and len(table) == 12
    assert table["p_adjusted"][is_primary].tolist() == p_values[is_primary].tolist()
    assert table["p_adjusted"][~is_primary].tolist() == pytest.approx(
        reference.benjamini_hochberg(p_values[~is_primary].tolist())
    )
    assert table["n_tests"].tolist() == [1 if primary else 11 for primary in is_primary]


def test_the_same_seed_gives_the_same_numbers_in_any_order(measurements, correlations):
    turned = correlate(measurements.sample(frac=1, random_state=1), targets=synthetic.targets()).set_index("metric")
    exact = correlations.set_index("metric")
    pd.testing.assert_frame_equal(turned.loc[exact.index], exact, check_exact=True)
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
    table = correlate(synthetic.measurements(n=3))
    assert table["spearman"].isna().all()
    assert table["note"].str.contains("3 layers are too few for a rank correlation").all()
    write_table(tmp_path / "correlations.csv", table, CORRELATIONS)
    assert "nan" not in (tmp_path / "correlations.csv").read_text().lower()


def test_only_the_whole_model_measured_is_no_correlation():
    measurements = synthetic.measurements(n=2)
    table = correlate(measurements[measurements["target_layer"] == "ALL"])
    assert table["n"].tolist() == [0, 0, 0]
    assert table["note"].str.contains("too few").all()


def test_without_controls_the_range_is_said_to_be_restricted(measurements):
    table = correlate(measurements, targets=synthetic.targets(n_control=0))
    assert table["note"].str.contains("range is restricted").all()


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
    table = correlate(with_weights, targets=synthetic.targets(n_control=0), sampled=sampled)
    rows = table[table["unit"] == "weights"].set_index("metric")
    assert list(rows.index) == list(synthetic.METRICS)
    scores = {(w.parameter, w.row): w._asdict() for w in sampled.itertuples()}
    weights = with_weights[with_weights["selection"] == "weight"]
    for metric in synthetic.METRICS:
        x = [scores[w.parameter, w.row][f"score_{metric}"] for w in weights.itertuples()]
        assert rows.loc[metric, "spearman"] == pytest.approx(reference.spearman(x, weights["delta_nll"].abs().tolist()))
    assert set(rows["n"]) == {30} and set(rows["k"]) == {1}
    assert set(rows["n_kinds"]) == {1} and set(rows["n_fitted"]) == {1} and rows["within_rho"].isna().all()
    assert not rows["note"].str.contains("restricted").any()


def test_weights_are_left_out_without_scores_or_measurements(with_weights, measurements):
    assert set(correlate(with_weights)["unit"]) == {"layers"}
    assert set(correlate(measurements, sampled=synthetic.sampled())["unit"]) == {"layers"}


def test_single_weights_change_nothing_else(measurements, with_weights):
    layer = synthetic.layer_names()[0]
    here = with_weights["selection"] == "weight"
    mixed = with_weights.assign(target_layer=with_weights["target_layer"].mask(here, layer))
    pd.testing.assert_frame_equal(correlate(mixed), correlate(measurements))
    compared = synthetic.comparisons(measurements)
    pd.testing.assert_frame_equal(top_against_random(mixed, compared), top_against_random(measurements, compared))
    pd.testing.assert_frame_equal(ablation_curves(mixed), ablation_curves(measurements))


def test_an_infinite_effect_of_a_weight_ranks_first(with_weights):
    broken = with_weights.copy()
    where = broken.index[broken["selection"] == "weight"][3]
    broken.loc[where, ["delta_nll", "ci_low", "ci_high"]] = np.nan
    table = correlate(broken, sampled=synthetic.sampled())
    notes = table.loc[table["unit"] == "weights", "note"]
    assert notes.str.contains("ranked as the largest: 1").all()


def test_a_metric_is_compared_with_magnitude_over_the_same_weights():
    both = ("grad_x_weight", "magnitude")
    sampled = synthetic.sampled(metrics=both)
    measurements = synthetic.with_single_weights(synthetic.measurements(), sampled)
    table = correlate(measurements, sampled=sampled)
    row, other = (
        table[(table["unit"] == "weights") & (table["metric"] == m)].iloc[0] for m in ("grad_x_weight", "magnitude")
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
    table = correlate(measurements)
    assert table["unit"].tolist() == ["layers"] * 3 + ["ablation_curve"]
    curve = "mean height of the curve over log k, k = 1, 10, 1000"
    assert table["note"].tolist() == ["", "", "", curve]
    few = correlate(measurements[measurements["target_layer"].isin(synthetic.layer_names(6))], n_resamples=9)
    assert few["note"].iloc[-1] == f"only 6 layers: the interval is rough; {curve}"
    tops = measurements[(measurements["selection"] == "top_obd") & (measurements["target_layer"] != "ALL")]
    areas = {}
    for column in ["score_sum", "delta_nll"]:
        curve = tops.pivot_table(index="target_layer", columns="k", values=column, sort=False)
        areas[column] = ((curve[1] + curve[10]) / 2 * 1 + (curve[10] + curve[1000]) / 2 * 2).tolist()
    assert table.iloc[-1]["spearman"] == pytest.approx(reference.spearman(areas["score_sum"], areas["delta_nll"]))


def test_a_metric_is_compared_with_magnitude_over_the_same_layers(measurements):
    table = correlate(measurements).set_index("metric")
    row = table.loc["grad_x_weight"]
    assert row["above_magnitude"] == pytest.approx(row["within_rho"] - table.loc["magnitude", "within_rho"])
    assert row["above_low"] < row["above_magnitude"] < row["above_high"]
    assert pd.isna(table.loc["magnitude", "above_magnitude"])
    without = measurements[measurements["selection"] != "top_magnitude"]
    assert correlate(without)["above_magnitude"].isna().all()


def test_metrics_are_compared_over_the_layers_that_all_of_them_have(measurements):
    """The second of three metrics lacks four layers, which the first and the third were measured on."""
    missing = synthetic.layer_names()[3:7]
    lacks = (measurements["selection"] == "top_magnitude") & measurements["target_layer"].isin(missing)
    table = correlate(measurements[~lacks], n_resamples=9).set_index("metric")
    assert table.index.tolist() == ["grad_x_weight", "magnitude", "obd"] and table["n"].tolist() == [30, 26, 30]
    shared = sorted(set(synthetic.layer_names()) - set(missing))
    parts = [decoder_part(layer) for layer in shared]
    covariates = kind_and_depth([part.component for part in parts], [part.depth for part in parts])
    rhos = {}
    for metric in table.index:
        tops = measurements[measurements["selection"] == f"top_{metric}"].set_index("target_layer").loc[shared]
        rhos[metric] = weighted_rho(tops["score_sum"].to_numpy(), tops["delta_nll"].to_numpy(), covariates=covariates)
    for pair in compare_metrics(rhos)[::2]:
        metric, sign = (pair.first, 1) if pair.second == "magnitude" else (pair.second, -1)
        assert table.loc[metric, "above_magnitude"] == pytest.approx(sign * pair.difference)
        ends = table.loc[metric, ["above_low", "above_high"]].tolist()
        assert ends == pytest.approx(sorted([sign * pair.low, sign * pair.high]))


def test_another_metric_may_be_the_baseline(measurements):
    table = correlate(measurements, baseline="obd").set_index("metric")
    rhos = table.loc[["magnitude", "obd"], "within_rho"].tolist()
    assert table.loc["magnitude", "above_magnitude"] == pytest.approx(rhos[0] - rhos[1])
    assert pd.isna(table.loc["obd", "above_magnitude"])


def test_rows_come_in_the_order_of_the_measurements_each_of_its_own_perturbation():
    metrics, ks, perturbations = ("obd", "magnitude"), (100, 1), ("zero", "sign_flip")
    measurements = synthetic.measurements(n=6, metrics=metrics, ks=ks, seeds=(), perturbations=perturbations)
    table = correlate(measurements, n_resamples=9)
    layers = [("layers", metric, p, k) for p, k, metric in product(perturbations, ks, metrics)]
    curves = [("ablation_curve", metric, p, 100) for p, metric in product(perturbations, metrics)]
    keys = table[["unit", "metric", "perturbation", "k"]]
    assert list(keys.itertuples(index=False, name=None)) == layers + curves
    for row in table[table["unit"] == "layers"].itertuples():
        own = (measurements["perturbation"] == row.perturbation) & (measurements["k"] == row.k)
        assert row.spearman == pytest.approx(reference.spearman(*layers_of(measurements[own], row.metric)))


def test_the_table_of_a_validation_is_written_to_its_folder(tmp_path):
    metrics = ("grad_x_weight", "magnitude")
    discovery = open_discovery(make_discovery(tmp_path, metrics=metrics))
    folder = tmp_path / "validation_1"
    folder.mkdir()
    measurements, targets = synthetic.measurements(n=8, metrics=metrics), synthetic.targets(8, 3)
    write_table(folder / "measurements.csv", measurements, MEASUREMENTS)
    write_table(folder / "targets.csv", targets, TARGETS)
    options = {"metrics": list(metrics), "k": [100], "perturbations": ["zero"], "target_layers": ["any", "ALL"]}
    validation = Validation(folder, {"identity": {"options": options}}, discovery)
    table = write_correlations(validation, seed=3)
    primary = Primary("layers", "grad_x_weight", "zero", 100)
    expected = correlate(validation.measurements(), 3, validation.targets(), primary=primary)
    pd.testing.assert_frame_equal(table, expected, check_exact=True)
    pd.testing.assert_frame_equal(read_table(folder / "correlations.csv", CORRELATIONS), table, check_dtype=False)


def losses_of(measurements, n_texts=7):
    """Measurements of each layer's top set, the same with losses on each text, the effects (L, T) and tokens (T,)."""
    tops = measurements[measurements["selection"].str.startswith("top_") & (measurements["target_layer"] != "ALL")]
    n_tokens = np.arange(10, 10 + n_texts)
    spread = np.random.default_rng(0).exponential(size=(len(tops), n_texts))
    effects = tops["delta_nll"].to_numpy()[:, None] * spread * n_tokens
    keys = tops[["target_layer", "selection", "perturbation", "k", "seed"]]
    losses = keys.loc[keys.index.repeat(n_texts)].reset_index(drop=True)
    losses["sequence"] = list(range(n_texts)) * len(tops)
    losses["n_tokens"] = n_tokens.tolist() * len(tops)
    return tops, losses.assign(baseline_nats=2.0, perturbed_nats=2.0 + effects.ravel()), effects, n_tokens


def test_units_of_different_probabilities_count_by_them():
    """Against the same functions with weights written out: p by shuffles within kinds, and the differences."""
    measurements, targets = synthetic.measurements(n=30, with_all=False), synthetic.targets(30, 25)
    table = correlate(measurements, targets=targets, n_resamples=99).set_index("metric")
    inclusion = targets.set_index("target_layer")["inclusion"]
    rhos = {}
    for metric in synthetic.METRICS:
        tops = measurements[measurements["selection"] == f"top_{metric}"].sort_values("target_layer")
        layers = tops["target_layer"]
        parts = [decoder_part(layer) for layer in layers]
        weights = 1 / inclusion[layers].to_numpy()
        kinds, depths = [part.component for part in parts], [part.depth for part in parts]
        covariates = kind_and_depth(kinds, depths)
        x, y = tops["score_sum"].to_numpy(), tops["delta_nll"].to_numpy()
        rhos[metric] = weighted_rho(x, y, weights, covariates)
        interval = rho_interval(rhos[metric], weights)
        row = table.loc[metric]
        assert row[["within_rho", "within_low", "within_high"]].tolist() == pytest.approx(
            [rhos[metric].rho, *interval[1:3]]
        )
        assert abs(row["within_rho"] - weighted_rho(x, y, covariates=covariates).rho) > 1e-3
        assert (row["n_kinds"], row["n_fitted"]) == (len(set(kinds)), rhos[metric].n_fitted)
        assert row["n_effective"] == pytest.approx(effective_number(weights))
    for pair in compare_metrics(rhos, weights):
        if pair.second == "magnitude" or pair.first == "magnitude":
            other = pair.first if pair.second == "magnitude" else pair.second
            sign = 1 if other == pair.first else -1
            assert table.loc[other, "above_magnitude"] == pytest.approx(sign * pair.difference)
            ends = sorted([sign * pair.low, sign * pair.high])
            assert table.loc[other, ["above_low", "above_high"]].tolist() == pytest.approx(ends)


def test_the_effects_are_shuffled_among_layers_of_a_kind():
    measurements = synthetic.measurements(n=30, metrics=("obd",), seeds=(), with_all=False)
    tops = measurements[measurements["selection"] == "top_obd"].sort_values("target_layer")
    x, y = np.random.default_rng(1).normal(size=30), tops["delta_nll"].to_numpy()
    row = correlate(tops.assign(score_sum=x), n_resamples=199).iloc[0]
    parts = [decoder_part(layer) for layer in tops["target_layer"]]
    kinds, depths = [part.component for part in parts], [part.depth for part in parts]
    rng = np.random.default_rng([0, *b"within kinds/correlation/layers/obd/zero/100"])
    within = within_kinds(x, y, kinds, depths, rng, n_resamples=199)
    assert 0.02 < within.p_value < 0.98
    assert (row["within_p"], row["within_rho"]) == (within.p_value, within.result.rho)
    assert (row["within_low"], row["within_high"]) == (within.interval.low, within.interval.high)


def test_single_weights_are_judged_by_the_p_value_for_all_of_the_model():
    weights = synthetic.sampled(40)
    measurements = synthetic.with_single_weights(synthetic.measurements(n=8), weights)
    single = weights.assign(inclusion=np.linspace(0.02, 1, 40))
    rows = correlate(measurements, sampled=weights, single_weights=single, n_resamples=99)
    rows = rows[rows["unit"] == "weights"]
    p_values = correlate(measurements, sampled=weights, n_resamples=99).query("unit == 'layers'")["within_p"]
    family = reference.benjamini_hochberg([*p_values, *rows["population_p"]])
    assert rows["p_adjusted"].tolist() == pytest.approx(family[3:])
    without = correlate(measurements, sampled=weights, n_resamples=99)
    assert without[without["unit"] == "weights"]["p_adjusted"].tolist() == pytest.approx(
        reference.benjamini_hochberg([*p_values, *without[without["unit"] == "weights"]["p_value"]])[3:]
    )


def test_the_losses_of_a_validation_give_the_interval_over_texts(tmp_path):
    metrics = ("grad_x_weight", "magnitude")
    discovery = open_discovery(make_discovery(tmp_path, metrics=metrics))
    measurements = synthetic.measurements(n=8, metrics=metrics)
    tops, losses, effects, n_tokens = losses_of(measurements)
    folder = tmp_path / "validation_1"
    (folder / "perturb_measure").mkdir(parents=True)
    write_table(folder / "measurements.csv", measurements, MEASUREMENTS)
    write_table(folder / "targets.csv", synthetic.targets(8, 0).assign(n_layers=9), TARGETS)
    path = folder / "perturb_measure" / "sequence_losses.parquet"
    losses.assign(kl_nats=0.0).to_parquet(path)
    options = {"metrics": list(metrics), "k": [100], "perturbations": ["zero"], "target_layers": ["any", "ALL"]}
    validation = Validation(folder, {"identity": {"options": options}}, discovery)
    table = write_correlations(validation).set_index("metric")
    for metric in metrics:
        own = (tops["selection"] == f"top_{metric}").to_numpy()
        expected = rho_over_texts(tops["score_sum"].to_numpy()[own], effects[own], n_tokens.astype(float))
        assert table.loc[metric, ["texts_low", "texts_high"]].tolist() == pytest.approx(expected[1:], rel=1e-9)
    losses.drop(columns="k").to_parquet(path)
    with pytest.raises(RequestError, match=r"sequence_losses\.parquet is damaged: .*\bk\b.*; remove it, or measure"):
        write_correlations(validation)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(RequestError, match=r"sequence_losses\.parquet is damaged: "):
        write_correlations(validation)
    path.unlink()
    assert write_correlations(validation)["texts_low"].isna().all()


def test_where_all_layers_were_measured_rho_has_an_interval_over_texts():
    measurements = synthetic.measurements(n=8, metrics=("obd",), seeds=(), with_all=False)
    tops, losses, effects, n_tokens = losses_of(measurements)
    every = synthetic.targets(8, 0).assign(n_layers=8)
    row = correlate(measurements, targets=every, losses=losses, n_resamples=9).iloc[0]
    _, low, high = rho_over_texts(tops["score_sum"].to_numpy(), effects, n_tokens)
    assert [row["texts_low"], row["texts_high"]] == pytest.approx([low, high], rel=1e-9)
    assert low < high
    some = correlate(measurements, targets=every.assign(n_layers=100), losses=losses, n_resamples=9).iloc[0]
    assert np.isnan([some["texts_low"], some["texts_high"]]).all()
