import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.correlation import correlate
from bridge.report.caveats import limits
from bridge.report.sentences import Evidence, answer, beaten_random, setup_facts, summary_lines


def evidence(n=12, n_control=4, metrics=("grad_x_weight", "magnitude"), sampled=None, **choices):
    measurements = synthetic.measurements(n=n, metrics=metrics, **choices)
    if sampled is not None:
        measurements = synthetic.with_single_weights(measurements, sampled)
    targets = synthetic.targets(n, n_control)
    return Evidence(
        synthetic.manifest("validation"),
        synthetic.manifest(),
        measurements,
        targets,
        correlate(measurements, targets=targets, sampled=sampled),
        {metric: synthetic.top_weights() for metric in metrics},
        {metric: synthetic.summary() for metric in metrics},
        sampled,
    )


@pytest.fixture(scope="module")
def found():
    return evidence()


def without(found, rows):
    kept = found.measurements[~rows(found.measurements)]
    return replace(found, measurements=kept, correlations=correlate(kept, targets=found.targets))


def test_five_lines_name_setup_weight_set_layer_and_agreement(found):
    setup, weight, whole, layer, agreement = summary_lines(found)
    assert setup.startswith("SmolLM2-135M-Instruct (134,515,008 parameters) on embedded texts (100 sequences, 18,211")
    assert setup.endswith("baseline perplexity 37.04.")
    first = synthetic.top_weights().iloc[0]
    assert f"{first['parameter']}[{first['row']}, {first['col']}] = " in weight
    assert whole.startswith("Zeroing the global top-100 by grad_x_weight takes perplexity from 37.04 to ")
    assert "100 random weights: to 37.0" in whole
    assert "over 3 draws" in whole
    tops = found.measurements[found.measurements["selection"].str.startswith("top_")]
    tops = tops[tops["target_layer"] != "ALL"]
    assert tops.loc[tops["delta_nll"].idxmax(), "target_layer"] in layer
    row = found.correlations.set_index("metric").loc["grad_x_weight"]
    assert f"over 12 layers: grad_x_weight {row['spearman']:.2f} [{row['ci_low']:.2f}," in agreement
    assert "; magnitude " in agreement


def test_the_metric_of_largest_rho_is_the_best_but_never_magnitude(found):
    assert found.metric == "grad_x_weight"
    reversed_rho = found.correlations.assign(spearman=-found.correlations["spearman"])
    assert replace(found, correlations=reversed_rho).metric == "grad_x_weight"
    assert evidence(metrics=("magnitude",)).metric == "magnitude"


def test_without_magnitude_the_last_line_says_so():
    assert summary_lines(evidence(metrics=("obd",)))[4].endswith("magnitude was not measured.")


def test_without_the_whole_model_the_line_says_so(found):
    lines = summary_lines(without(found, lambda m: m["target_layer"] == "ALL"))
    assert "was not perturbed as one set" in lines[2]


def test_without_random_draws_the_line_says_so(found):
    alone = without(found, lambda m: m["selection"] == "random")
    assert "no random set of the same size was measured" in summary_lines(alone)[2]
    assert "no random control" in answer(alone)[1]


def test_without_layers_the_lines_say_so(found):
    lines = summary_lines(without(found, lambda m: m["target_layer"] != "ALL"))
    assert lines[3] == "No single layer was measured."
    assert "0 layers are too few" in lines[4]


def test_an_infinite_loss_is_said_not_shown_as_nan(found):
    measurements = found.measurements.copy()
    everything = (measurements["target_layer"] == "ALL") & (measurements["selection"] == "top_grad_x_weight")
    broken = ["perturbed_nll", "delta_nll", "ci_low", "ci_high", "perturbed_ppl", "delta_ppl"]
    measurements.loc[everything, broken] = np.inf
    text = " ".join(summary_lines(replace(found, measurements=measurements)))
    assert "to ∞" in text
    assert "its loss is infinite or undefined" in text
    assert "nan" not in text
    assert any("infinite or undefined: 1" in limit for limit in limits(replace(found, measurements=measurements)))


def test_three_sentences_with_the_difference_from_magnitude(found):
    sentences = answer(found)
    assert len(sentences) == 3
    assert "in 12 of 12 layers" in sentences[1] or "in 11 of 12 layers" in sentences[1]
    assert "magnitude (difference " in sentences[2]


def test_agreement_that_includes_zero_is_not_claimed(found):
    unsure = found.correlations.assign(ci_low=-0.2)
    assert "no agreement is shown" in answer(replace(found, correlations=unsure))[2]
    inverse = found.correlations.assign(ci_low=-0.9, ci_high=-0.2)
    assert "the wrong way round" in answer(replace(found, correlations=inverse))[2]


def test_layers_above_every_draw_are_counted_against_chance(found):
    effects = found.layer_effects("grad_x_weight")
    effects = effects.assign(delta_nll=1.0, random_high=[0.5] * 3 + [2.0] * 9)
    facts = beaten_random(effects)
    assert (facts["wins"], facts["n"], facts["draws"], facts["expected"]) == (3, 12, 3, 3.0)
    tail = sum(math.comb(12, wins) * 0.25**wins * 0.75 ** (12 - wins) for wins in range(3, 13))
    assert facts["p"] == pytest.approx(tail)


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"n": 6}, "Only 6 layers tested"),
        ({"n_control": 0}, "range is restricted"),
        ({"metrics": ("grad_x_weight", "obd")}, "is the best of 2 metrics"),
        ({"seeds": (0,)}, "only 1 random draw; with 1 no p-value of a single layer can be below 0.50"),
        ({"seeds": ()}, "only 0 random draws."),
    ],
)
def test_limits_name_what_weakens_the_result(change, limit):
    assert any(limit in text for text in limits(evidence(**change)))


def test_limits_of_the_corpus_and_the_manifests(found):
    table = found.measurements.assign(n_sequences=4, n_weights=20, corpus_sha256="00")
    manifest = synthetic.manifest("validation") | {"warnings": ["the corpus is short"]}
    text = "\n".join(limits(replace(found, measurements=table, validation_manifest=manifest)))
    assert "Only 4 sequences" in text
    assert "fewer than k weights were perturbed" in text
    assert "other token sequences" in text
    assert "Warning of the validation: the corpus is short" in text
    assert "model.embed_tokens.weight = lm_head.weight" in text
    assert "same texts" in "\n".join(limits(found))


def test_single_weights_get_a_sentence_with_the_baseline_on_the_same_ones(found):
    metrics = ("grad_x_weight", "obd", "magnitude")
    both = evidence(sampled=synthetic.sampled(metrics=metrics))
    rows = both.weight_correlations().set_index("metric")
    sentence = answer(both)[3]
    assert summary_lines(both)[5] == sentence
    assert sentence.startswith(
        "Over 40 single weights, grad_x_weight ranks the size of the effect best: Spearman's rho "
    )
    for metric in ("grad_x_weight", "magnitude"):
        row = rows.loc[metric]
        assert f"{metric} " in sentence
        assert f"{row['spearman']:.2f} [{row['ci_low']:.2f},".replace("-", "−") in sentence
    assert "(difference " in sentence
    assert any("40 single weights are of those that the discovery sampled" in text for text in limits(both))
    assert summary_lines(both)[:5] == summary_lines(found)
    assert setup_facts(both) == setup_facts(found)
    assert len(answer(found)) == 3


@pytest.mark.parametrize(
    ("sampled", "words"),
    [
        (synthetic.sampled(metrics=("obd",)), "no other metric was scored on them."),
        (synthetic.sampled(3), "no metric has a rank correlation (3 weights are too few"),
        (synthetic.sampled(metrics=("obd", "taylor2")), "; taylor2 "),
    ],
)
def test_single_weights_that_say_less(sampled, words):
    assert words in answer(evidence(sampled=sampled))[3]


def test_an_order_of_single_weights_that_may_be_chance_is_not_claimed():
    both = evidence(sampled=synthetic.sampled())
    unsure = both.correlations.assign(ci_low=-0.2)
    assert "grad_x_weight is not shown to rank the effect: " in answer(replace(both, correlations=unsure))[3]


def test_a_model_of_few_layers_has_no_restricted_range():
    found = evidence(n_control=0)
    every = replace(found, targets=found.targets.assign(n_layers=12))
    assert any("range is restricted" in text for text in limits(found))
    assert not any("range is restricted" in text for text in limits(every))


def test_stability_of_the_ranking_is_told_where_it_was_measured():
    rows = [("halves", 10, 0.25), ("halves", 10, 0.5), ("halves", 100, 0.9), ("seeds", 10, 0.7)]
    table = pd.DataFrame(rows, columns=["kind", "k", "jaccard"]).assign(jaccard_chance=1e-6)
    found = evidence()
    texts = limits(replace(found, stability=table.assign(metric=found.metric, other=found.metric)))
    (text,) = [text for text in texts if "Jaccard" in text]
    assert f"the top 10 by {found.metric} of two random halves" in text
    assert "0.25 to 0.50 (2 splits; " in text and "chance gives 1.0×10⁻⁶" in text
    assert limits(replace(found, stability=table.assign(metric="another"))) == limits(found)
