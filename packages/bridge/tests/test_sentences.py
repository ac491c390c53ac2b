from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.correlation import correlate
from bridge.report.caveats import caveats
from bridge.report.number_format import nats
from bridge.report.phrases import perplexity_after
from bridge.report.sentences import answer, most_critical_weight, setup_items, summary_lines


@pytest.fixture(scope="module")
def example():
    return synthetic.evidence()


def without(example, rows):
    kept = example.measurements[~rows(example.measurements)]
    correlations = correlate(kept, targets=example.targets, primary=synthetic.primary_of(kept))
    return replace(example, measurements=kept, correlations=correlations, comparisons=synthetic.comparisons(kept))


def test_five_lines_name_setup_weight_set_layer_and_agreement(example):
    setup, weight, whole, layer, agreement = summary_lines(example)
    assert setup.startswith("SmolLM2-135M-Instruct (134,515,008 parameters) on embedded texts (100 sequences, 18,211")
    assert setup.endswith("baseline perplexity 37.04.")
    first = synthetic.top_weights().iloc[0]
    assert f"{first['parameter']}[{first['row']}, {first['col']}] = " in weight
    assert whole.startswith("Zeroing the global top-100 by grad_x_weight takes perplexity from 37.04 to ")
    assert "100 random weights: to 37.0" in whole
    assert "over 3 draws" in whole
    tops = example.measurements[example.measurements["selection"].str.startswith("top_")]
    tops = tops[tops["target_layer"] != "ALL"]
    assert tops.loc[tops["delta_nll"].idxmax(), "target_layer"] in layer
    row = example.correlations.set_index("metric").loc["grad_x_weight"]
    assert f"over 12 layers: grad_x_weight {row['spearman']:.2f} [{row['ci_low']:.2f}," in agreement
    assert "; magnitude " in agreement


def test_each_line_in_full(example):
    setup, weight, whole, layer, _ = summary_lines(example)
    assert setup == (
        "SmolLM2-135M-Instruct (134,515,008 parameters) on embedded texts (100 sequences, 18,211 tokens): "
        "baseline perplexity 37.04."
    )
    critical = "Most critical weight by grad_x_weight: model.layers.3.mlp.up_proj.weight[11, 41] = 0.158, score 0.0741."
    assert weight == critical
    assert whole == answer(example)[1]
    assert whole.replace("\u00a0", " ") == (
        "Zeroing the global top-100 by grad_x_weight takes perplexity from 37.04 to 189,000 (loss +8.5 [7.5, 9.6] nats "
        "per token); 100 random weights: to 37.04 at most (loss in [−0.00021, 0.00001] over 3 draws); "
        "+8.54 [8.44, 8.64] more than their mean (no p: 3 draws, 19 are needed)."
    )
    assert layer.replace("\u00a0", " ") == (
        "The most damaging of 12 layers tested is model.layers.3.mlp.gate_proj, by its top 100 of grad_x_weight "
        "(loss +0.0307 [0.0269, 0.0344] nats per token)."
    )
    assert answer(example)[2] == (
        f"{layer.removesuffix('.')}; in 12 of 12 layers the top weights by grad_x_weight did more damage than each of "
        "3 random draws (by chance: 3.0, p = 6.0×10⁻⁸)."
    )


def test_the_head_of_the_report_in_full(example):
    assert setup_items(example) == [
        ("Primary analysis", "grad_x_weight, zero, k = 100, over layers"),
        ("Model", "SmolLM2-135M-Instruct (float32)"),
        ("Parameters", "134,515,008"),
        ("Texts of the scores", "embedded texts, documents"),
        (
            "Texts of the effects",
            "MEASURED ON THE TEXTS THAT GAVE THE SCORES: on unseen texts the agreement may be lower",
        ),
        ("Size", "100 sequences, 18,211 tokens"),
        ("Baseline", "perplexity 37.04, loss 3.612"),
        ("Perturbation", "zero; k = 100"),
    ]


def test_the_head_of_the_report_is_that_of_the_first_measurement(example):
    first = example.measurements.iloc[:1]
    others = example.measurements.iloc[1:].assign(model="another", baseline_ppl=9.0, baseline_nll=9.0, n_tokens=9)
    manifest = {"identity": {"corpus": example.corpus}}
    for table in (first, pd.concat([first, others])):
        changed = replace(example, measurements=table, discovery_manifest=manifest)
        items = dict(setup_items(changed))
        assert items["Model"] == "SmolLM2-135M-Instruct (dtype unknown)"
        assert (items["Parameters"], items["Size"]) == ("–", "100 sequences, 18,211 tokens")
        assert items["Baseline"] == "perplexity 37.04, loss 3.612"
        assert summary_lines(changed)[0] == (
            "SmolLM2-135M-Instruct on embedded texts (100 sequences, 18,211 tokens): baseline perplexity 37.04."
        )


def test_one_random_draw_is_called_one(example):
    one = without(example, lambda m: (m["selection"] == "random") & (m["seed"] != 0))
    sentences = answer(one)
    drawn = one.measurements[(one.measurements["target_layer"] == "ALL") & (one.measurements["selection"] == "random")]
    assert f"(loss {nats(drawn['delta_nll'].iloc[0])})" in sentences[1]
    assert "did more damage than the one random draw (by chance: 6.0, p = 0.00024)." in sentences[2]


def test_without_the_whole_model_the_line_says_so(example):
    lines = summary_lines(without(example, lambda m: m["target_layer"] == "ALL"))
    assert "was not perturbed as one set" in lines[2]


def test_without_random_draws_the_line_says_so(example):
    alone = without(example, lambda m: m["selection"] == "random")
    assert "no random set of the same size was measured" in summary_lines(alone)[2]
    assert "no top set of a layer was compared with random ones" in answer(alone)[2]


def test_the_most_critical_weight_is_the_first_of_the_ranking_that_is_known(example):
    ranking = synthetic.top_weights(k=3)
    for metrics, named in ((["obd", "grad_x_weight"], "grad_x_weight"), (["obd", "magnitude"], "obd")):
        sentence = most_critical_weight(replace(example, top_weights=dict.fromkeys(metrics, ranking[::-1])))
        assert sentence == most_critical_weight(replace(example, top_weights={named: ranking}))
        assert sentence.startswith(f"Most critical weight by {named}: {ranking['parameter'][0]}[")
    for nothing in ({}, {"grad_x_weight": ranking[:0]}):
        sentence = most_critical_weight(replace(example, top_weights=nothing))
        assert sentence == "No ranking of single weights was given."


def test_without_layers_the_lines_say_so(example):
    lines = summary_lines(without(example, lambda m: m["target_layer"] != "ALL"))
    assert lines[3] == "No single layer was measured."
    assert "0 layers are too few" in lines[4]


def test_an_infinite_loss_is_said_not_shown_as_nan(example):
    measurements = example.measurements.copy()
    everything = (measurements["target_layer"] == "ALL") & (measurements["selection"] == "top_grad_x_weight")
    broken = ["perturbed_nll", "delta_nll", "ci_low", "ci_high", "perturbed_ppl", "delta_ppl"]
    measurements.loc[everything, broken] = np.inf
    text = " ".join(summary_lines(replace(example, measurements=measurements)))
    assert "to ∞" in text
    assert "its loss is infinite or undefined" in text
    assert "nan" not in text
    assert any("infinite or undefined: 1" in limit for limit in caveats(replace(example, measurements=measurements)))


def test_the_primary_analysis_comes_first_and_the_exploratory_ones_last(example):
    sentences = answer(example)
    assert len(sentences) == 4
    named = "Primary analysis, named before anything was measured (grad_x_weight, zero, k = 100): Spearman's rho"
    assert sentences[0].startswith(named)
    assert "; difference from magnitude " in sentences[0]
    assert setup_items(example)[0] == ("Primary analysis", "grad_x_weight, zero, k = 100, over layers")
    assert "+9." in sentences[1] or "+8." in sentences[1]
    assert "more than their mean (no p: 3 draws, 19 are needed)" in sentences[1]
    assert "in 12 of 12 layers" in sentences[2] or "in 11 of 12 layers" in sentences[2]
    assert sentences[3].startswith("Exploratory, one false-discovery family of 1: ")


def test_a_random_draw_without_a_finite_loss_is_the_largest(example):
    measurements = example.measurements.copy()
    drawn = measurements.index[(measurements["target_layer"] == "ALL") & (measurements["selection"] == "random")]
    measurements.loc[drawn[1], "delta_nll"] = np.nan
    broken = replace(example, measurements=measurements, comparisons=synthetic.comparisons(measurements))
    sentence = answer(broken)[1]
    assert "100 random weights: to ∞ at most" in sentence and "over 3 draws; 1 of 3 without a finite loss)" in sentence
    assert "a loss is not finite, no difference from the random sets" in sentence


def test_a_p_value_of_the_whole_model_is_printed_where_the_draws_allow_one(example):
    table = example.comparisons.assign(p_value=0.05, n_draws=19)
    assert "more than their mean, p = 0.050." in answer(replace(example, comparisons=table))[1]


def test_a_perplexity_has_the_interval_of_its_own_columns_or_none(example):
    row = example.measurements.iloc[0]
    assert "[" not in perplexity_after(row)
    row = pd.concat([row, pd.Series({"perturbed_ppl_low": 20.0, "perturbed_ppl_high": 90.0})])
    assert perplexity_after(row).endswith("[20,\u00a090]")


def test_of_two_perturbations_the_sentences_speak_of_the_first_one():
    both, alone = synthetic.evidence_of_two_perturbations()
    lines, zero, sign_flip = (summary_lines(evidence)[:5] for evidence in (both, alone["zero"], alone["sign_flip"]))
    assert lines == zero
    assert all(line != other for line, other in zip(lines[2:], sign_flip[2:], strict=True))
    assert answer(both)[:3] == answer(alone["zero"])[:3]
    assert dict(setup_items(both))["Perturbation"] == "zero, sign_flip; k = 1, 100"


def test_where_the_second_perturbation_is_the_primary_one_the_sentences_speak_of_it():
    both, alone = synthetic.evidence_of_two_perturbations()
    rows = both.correlations
    named = (rows["perturbation"] == "sign_flip") & (rows["unit"] == "layers") & (rows["metric"] == "grad_x_weight")
    turned = replace(both, correlations=rows.assign(primary=(named & (rows["k"] == 100)).astype(int)))
    assert turned.setting == ("sign_flip", 100)
    assert summary_lines(turned)[2:4] == summary_lines(alone["sign_flip"])[2:4]
    assert answer(turned)[1:3] == answer(alone["sign_flip"])[1:3]
