from dataclasses import replace

import pandas as pd
import pytest
import synthetic
from bridge.analysis import top_against_random as module
from bridge.report import evidence as evidence_module
from bridge.report.html import write_pages


@pytest.fixture(scope="module")
def example():
    return synthetic.evidence()


def test_no_effect_decides_which_metric_the_sentences_speak_of(example):
    assert example.metric == example.primary["metric"] == "grad_x_weight"
    assert example.exploratory["metric"].tolist() == ["magnitude"]
    other = example.correlations.assign(primary=(example.correlations["metric"] == "magnitude").astype(int))
    assert replace(example, correlations=other).metric == "magnitude"
    exploratory = replace(example, correlations=example.correlations.assign(primary=0, spearman=-0.5))
    assert exploratory.primary is None
    assert (exploratory.metric, exploratory.setting) == ("grad_x_weight", ("zero", 100))
    assert synthetic.evidence(metrics=("magnitude",)).metric == "magnitude"


def test_another_metric_is_the_baseline_where_the_discovery_says_so(example):
    manifest = synthetic.manifest() | {"metrics": {"grad_x_weight": {"formula": "g", "baseline": True}}}
    exploratory = example.correlations.assign(primary=0)
    turned = replace(example, discovery_manifest=manifest, correlations=exploratory)
    assert turned.metrics == ["magnitude", "grad_x_weight"]
    assert (turned.baseline, turned.metric) == ("grad_x_weight", "magnitude")


def test_the_setting_is_the_first_perturbation_at_its_largest_k():
    zero = synthetic.measurements(n=4, ks=(1, 100))
    flipped = zero.assign(perturbation="sign_flip", k=zero["k"] * 7)
    both = synthetic.evidence_of(pd.concat([zero, flipped]))
    assert both.setting == ("zero", 100)
    assert replace(both, correlations=both.correlations.assign(primary=0)).setting == ("zero", 100)
    mixed = replace(both, measurements=pd.concat([zero[:1], flipped, zero[1:]]))
    assert replace(mixed, correlations=both.correlations.assign(primary=0)).setting == ("zero", 100)
    assert both.settings == [("zero", 100), ("zero", 1), ("sign_flip", 7), ("sign_flip", 700)]
    assert set(both.layer_effects["perturbation"]) == {"zero"}
    assert set(both.layer_effects["k"]) == {100}
    assert set(both.layer_correlations["perturbation"]) == {"zero"}


def test_the_sampled_metrics_are_those_of_the_scores(example):
    assert example.sampled_metrics == [] and example.weight_effects.empty
    weights = synthetic.sampled(6, metrics=("obd", "magnitude"))
    measured = synthetic.with_single_weights(synthetic.measurements(n=2), weights)
    sampled = replace(example, sampled=weights, measurements=measured)
    assert sampled.sampled_metrics == ["obd", "magnitude"]
    assert sampled.weight_effects["score_obd"].tolist() == weights["score_obd"].tolist()


def test_layers_above_random_are_those_of_the_metric_in_the_setting(example):
    above = example.layers_above_random("grad_x_weight")
    effects = example.layer_effects
    effects = effects[effects["metric"] == "grad_x_weight"]
    wins = int((effects["delta_nll"] > effects["random_high"]).sum())
    assert wins > 0
    assert (above.n, above.wins, above.draws) == (12, wins, 3)


def test_a_layer_that_beats_some_draws_only_is_not_above_random(example):
    example.layer_effects["n_beaten"] = 2  # of 3 draws
    assert example.layers_above_random("grad_x_weight")[:4] == (12, 0, 3, 12 / 4)


def test_a_report_compares_top_and_random_once(tmp_path, monkeypatch, blank_figures):
    calls = []

    def counted(measurements, comparisons):
        calls.append(len(measurements))
        return module.top_against_random(measurements, comparisons)

    monkeypatch.setattr(evidence_module, "top_against_random", counted)
    example = synthetic.evidence(n=5, ks=(1, 100))
    write_pages(tmp_path, example)
    assert calls == [len(example.measurements)]


def test_of_two_perturbations_the_first_measured_one_is_spoken_of():
    both, alone = synthetic.evidence_of_two_perturbations()
    for evidence in (both, replace(both, correlations=both.correlations.assign(primary=0))):
        assert evidence.setting == ("zero", 100)
    for tables in ("layer_effects", "layer_correlations", "weight_correlations"):
        table, expected = (getattr(evidence, tables) for evidence in (both, alone["zero"]))
        assert len(table) and set(table["perturbation"]) == {"zero"}
        columns = [column for column in table if column not in ("p_adjusted", "n_tests")]  # of the whole family
        pd.testing.assert_frame_equal(
            table[columns].reset_index(drop=True), expected[columns].reset_index(drop=True), check_dtype=False
        )
    assert set(alone["sign_flip"].weight_correlations["perturbation"]) == {"sign_flip"}
    assert both.layer_effects["delta_nll"].tolist() != alone["sign_flip"].layer_effects["delta_nll"].tolist()
    assert both.layers_above_random("magnitude") == alone["zero"].layers_above_random("magnitude")
