from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.correlation import correlate
from bridge.report.caveats import caveats
from bridge.report.phrases import perplexity_after
from bridge.report.sentences import answer, summary_lines


@pytest.fixture(scope="module")
def example():
    return synthetic.evidence()


def without(example, rows):
    kept = example.measurements[~rows(example.measurements)]
    return replace(example, measurements=kept, correlations=correlate(kept, targets=example.targets))


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


def test_without_the_whole_model_the_line_says_so(example):
    lines = summary_lines(without(example, lambda m: m["target_layer"] == "ALL"))
    assert "was not perturbed as one set" in lines[2]


def test_without_random_draws_the_line_says_so(example):
    alone = without(example, lambda m: m["selection"] == "random")
    assert "no random set of the same size was measured" in summary_lines(alone)[2]
    assert "no random control" in answer(alone)[1]


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


def test_three_sentences_with_the_difference_from_magnitude(example):
    sentences = answer(example)
    assert len(sentences) == 3
    assert "in 12 of 12 layers" in sentences[1] or "in 11 of 12 layers" in sentences[1]
    assert "magnitude (difference " in sentences[2]


def test_a_perplexity_has_the_interval_of_its_own_columns_or_none(example):
    row = example.measurements.iloc[0]
    assert "[" not in perplexity_after(row)
    row = pd.concat([row, pd.Series({"perturbed_ppl_low": 20.0, "perturbed_ppl_high": 90.0})])
    assert perplexity_after(row).endswith("[20,\u00a090]")
