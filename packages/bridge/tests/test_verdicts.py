from dataclasses import replace

import pytest
import synthetic
from bridge.report.caveats import caveats
from bridge.report.sentences import answer, setup_items, summary_lines


@pytest.fixture(scope="module")
def example():
    return synthetic.evidence()


def test_without_magnitude_the_last_line_says_so():
    assert summary_lines(synthetic.evidence(metrics=("obd",)))[4].endswith("magnitude was not measured.")


def test_agreement_that_includes_zero_is_not_claimed(example):
    unsure = example.correlations.assign(ci_low=-0.2)
    assert "no agreement is shown" in answer(replace(example, correlations=unsure))[2]
    inverse = example.correlations.assign(ci_low=-0.9, ci_high=-0.2)
    assert "the wrong way round" in answer(replace(example, correlations=inverse))[2]


def test_single_weights_get_a_sentence_with_the_baseline_on_the_same_ones(example):
    metrics = ("grad_x_weight", "obd", "magnitude")
    both = synthetic.evidence(sampled=synthetic.sampled(metrics=metrics))
    rows = both.weight_correlations.set_index("metric")
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
    assert any("40 single weights are of those that the discovery sampled" in text for text in caveats(both))
    assert summary_lines(both)[:5] == summary_lines(example)
    assert setup_items(both) == setup_items(example)
    assert len(answer(example)) == 3


@pytest.mark.parametrize(
    ("sampled", "words"),
    [
        (synthetic.sampled(metrics=("obd",)), "no other metric was scored on them."),
        (synthetic.sampled(3), "no metric has a rank correlation (3 weights are too few"),
        (synthetic.sampled(metrics=("obd", "taylor2")), "; taylor2 "),
    ],
)
def test_single_weights_that_say_less(sampled, words):
    assert words in answer(synthetic.evidence(sampled=sampled))[3]


def test_an_order_of_single_weights_that_may_be_chance_is_not_claimed():
    both = synthetic.evidence(sampled=synthetic.sampled())
    unsure = both.correlations.assign(ci_low=-0.2)
    assert "grad_x_weight is not shown to rank the effect: " in answer(replace(both, correlations=unsure))[3]
