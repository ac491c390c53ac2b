from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.claims import MEASURED, POPULATION, WITHIN_KINDS
from bridge.report.caveats import caveats
from bridge.report.phrases import rho_of
from bridge.report.score_tables import correlations, estimates_for_all
from bridge.report.sentences import answer, setup_items, summary_lines
from bridge.report.verdict_sentences import (
    agreement_of_layers,
    agreement_of_single_weights,
    exploratory,
    verdict_on_layers,
)


@pytest.fixture(scope="module")
def example():
    return synthetic.evidence()


@pytest.fixture(scope="module")
def with_weights():
    return synthetic.evidence(sampled=synthetic.sampled(), metrics=("grad_x_weight", "obd", "magnitude"))


def changed(example, **columns):
    """The example with other numbers in the row of the primary analysis."""
    table = example.correlations.copy()
    for column, value in columns.items():
        table.loc[table["primary"] == 1, column] = value
    return replace(example, correlations=table)


def test_the_agreement_over_layers_in_full(example):
    """Of a primary row p itself, of another the adjusted one; of the baseline no rho where it has none."""
    table = example.correlations.copy()
    assert table["metric"].tolist() == ["grad_x_weight", "magnitude"]
    table = table.assign(spearman=[0.9, 0.5], ci_low=[0.8, -0.25], ci_high=[0.95, 0.75], p_adjusted=[0.01, 0.3])
    table = table.assign(within_rho=[0.7, 0.25], within_low=[0.5, -0.5], within_high=[0.8, 0.6])
    own = (
        "Spearman's rho between score and effect over 12 layers: grad_x_weight 0.90 [0.80, 0.95] (within kinds of "
        "matrix 0.70 [0.50, 0.80], p = 0.010); magnitude "
    )
    both = f"{own}0.50 [−0.25, 0.75] (within kinds of matrix 0.25 [−0.50, 0.60], adjusted p = 0.30)."
    assert agreement_of_layers(replace(example, correlations=table)).replace("\u00a0", " ") == both
    table.loc[1, "spearman"] = np.nan
    assert agreement_of_layers(replace(example, correlations=table)).replace("\u00a0", " ") == f"{own}none."
    table = table.assign(spearman=np.nan, note=["too few", "other"])
    assert agreement_of_layers(replace(example, correlations=table)) == (
        "Spearman's rho for grad_x_weight: none (too few)."
    )
    assert verdict_on_layers(replace(example, correlations=table)).endswith("for grad_x_weight: none (too few).")
    nothing = "No rank agreement was computed: no top weights of single layers were perturbed."
    assert agreement_of_layers(replace(example, correlations=table[table["metric"] == "magnitude"])) == nothing
    assert verdict_on_layers(replace(example, correlations=table[:0])) == nothing


def test_of_the_baseline_alone_one_rho_is_given(example):
    table = example.correlations.assign(primary=[0, 1], n_effective=[12.0, 4.0], spearman=[0.5, 0.25])
    sentence = verdict_on_layers(replace(example, correlations=table))
    assert "; grad_x_weight " not in sentence and "and grad_x_weight " not in sentence
    assert "all 100 layers, estimated from 12 of them: magnitude " in sentence
    design = sentence.partition("in which high scores are frequent: ")[2]
    assert design.startswith("magnitude 0.25 [") and design.count("magnitude") == 1


def test_the_baseline_stands_beside_whichever_comes_first_in_the_alphabet():
    example = synthetic.evidence(metrics=("obd", "magnitude"), n_control=10)
    design = verdict_on_layers(example).partition("in which high scores are frequent: ")[2]
    obd, magnitude = (rho_of(row, MEASURED) for _, row in example.correlations.iterrows())
    assert design == f"obd {obd} and magnitude {magnitude}."


def test_without_magnitude_the_last_line_says_so():
    assert summary_lines(synthetic.evidence(metrics=("obd",)))[4].endswith("magnitude was not measured.")


def test_the_claim_goes_by_the_adjusted_p_value_within_kinds(example):
    shown = changed(example, p_adjusted=0.049, within_rho=0.8, ci_low=-0.2)
    assert ": the score orders the layers better than chance" in verdict_on_layers(shown)
    inverse = changed(example, p_adjusted=0.049, within_rho=-0.8, spearman=0.9, ci_low=0.5)
    assert ": the score orders the layers the wrong way round" in verdict_on_layers(inverse)
    unsure = changed(example, p_adjusted=0.051, within_rho=0.8, ci_low=0.5)
    sentence = verdict_on_layers(unsure)
    assert ": no agreement is shown (with 80 % power a rho of 0.91 would have been)" in sentence
    assert "than chance" not in sentence


def test_absence_is_claimed_by_equivalence_alone(example):
    near_zero = {"p_adjusted": 0.9, "within_rho": 0.01}
    narrow = verdict_on_layers(changed(example, **near_zero, within_low=-0.19, within_high=0.19))
    assert ": there is no agreement beyond ±0.20, within which the interval lies" in narrow
    for ends in ({"within_low": -0.21, "within_high": 0.1}, {"within_low": -0.1, "within_high": 0.21}):
        assert "no agreement is shown" in verdict_on_layers(changed(example, **near_zero, **ends))


def test_where_every_layer_was_measured_the_interval_is_over_texts(example):
    census = changed(example, spearman=0.8, texts_low=0.7, texts_high=0.9, ci_low=0.1)
    assert "grad_x_weight 0.80 [0.70,\u00a00.90] over other texts of the same kind (within kinds" in verdict_on_layers(
        census
    )
    (table,) = correlations(census)
    assert [row[4].endswith("*") for row in table.rows] == [True, False]
    assert table.rows[0][4] == "0.80 [0.70,\u00a00.90]*"
    assert "where every layer was measured (*) over other texts of the same kind" in table.notes[0]


def test_of_single_weights_the_estimate_for_all_stands_first_and_the_designs_last():
    weights = synthetic.sampled()
    single = weights.assign(inclusion=np.linspace(0.02, 1, 40), rank=range(1, 41), score=0.0)
    example = synthetic.evidence(sampled=weights, single_weights=single)
    rows = example.weight_correlations.set_index("metric")
    sentence = agreement_of_single_weights(example)[0]
    start = "Over all weights of the model, estimated from 40 single weights, Spearman's rho between score and size of "
    assert sentence.startswith(f"{start}the effect: grad_x_weight ")
    first, design = sentence.split("; over the 40 weights that were drawn, in which high scores are frequent: ")
    for metric in ("grad_x_weight", "magnitude"):
        population, measured = (rho_of(rows.loc[metric], basis) for basis in (POPULATION, MEASURED))
        assert f"{metric} {population}, adjusted p = " in first and measured not in first
        assert f"{metric} {measured}" in design
    assert rows.loc["grad_x_weight", "p_adjusted"] < 0.025
    assert ": grad_x_weight ranks the weights better than chance" in first
    assert design.endswith("].")


def test_where_layers_were_certain_the_sentence_is_of_all_layers():
    example = synthetic.evidence(n_control=10)
    row = example.primary
    sentence = verdict_on_layers(example)
    assert (row["n"], row["n_effective"]) == (12, pytest.approx(100**2 / (2 + 98**2 / 10)))
    assert (
        f"over all 100 layers, estimated from 12 of them: grad_x_weight {rho_of(row, POPULATION)} (within" in sentence
    )
    assert f"within kinds of matrix {rho_of(row, WITHIN_KINDS)}, p = " in sentence
    measured = "; over the 12 layers that were chosen, in which high scores are frequent: grad_x_weight "
    measured += f"{rho_of(row, MEASURED)} and magnitude "
    assert measured in sentence
    assert measured in agreement_of_layers(example)
    assert "in which high scores" not in verdict_on_layers(synthetic.evidence())


def test_the_table_of_estimates_names_overlap_and_calibration(with_weights):
    (table,) = estimates_for_all(with_weights)
    assert [row[:2] for row in table.rows] == [["layers", metric] for metric in ("grad_x_weight", "obd", "magnitude")]
    row = with_weights.correlations.iloc[0]
    assert table.rows[0][3:6] == ["12", "12.0", rho_of(row, POPULATION)]
    assert table.rows[0][6].endswith(" (0.10)")
    assert table.rows[0][7].startswith(f"{row['population_ratio']:.1f}")
    assert table.rows[2][7] == "–"  # magnitude is no number of nats
    assert "calibration: total effect" in table.notes[0]


def test_fewer_than_six_layers_show_nothing():
    few = changed(synthetic.evidence(n=5), p_adjusted=1e-9)
    assert ": no agreement is shown (too few layers to tell)" in verdict_on_layers(few)


def test_others_are_named_by_what_all_pairs_show(example):
    best = verdict_on_layers(changed(example, p_adjusted=0.01, above="magnitude obd", below="", not_told_apart=""))
    assert "; it is the best of 3 metrics; it is above magnitude and obd; difference" in best
    mixed = verdict_on_layers(changed(example, p_adjusted=0.01, above="a", below="b", not_told_apart="c d e"))
    assert "; it is above a; it is below b; it is not told apart from c, d and e; " in mixed
    assert "best" not in mixed


def test_nothing_is_above_magnitude_that_shows_no_agreement(example):
    sentence = verdict_on_layers(changed(example, p_adjusted=0.2, above="magnitude", not_told_apart=""))
    assert "it is above" not in sentence and "best" not in sentence


def test_single_weights_get_a_sentence_with_the_baseline_on_the_same_ones(example, with_weights):
    rows = with_weights.weight_correlations.set_index("metric")
    sentence = answer(with_weights)[3]
    assert summary_lines(with_weights)[5] == sentence
    start = "Over 40 single weights, Spearman's rho between score and size of the effect: grad_x_weight "
    assert sentence.startswith(start)
    for metric in ("grad_x_weight", "magnitude"):
        row = rows.loc[metric]
        assert f"{metric} " in sentence
        assert f"{row['spearman']:.2f} [{row['ci_low']:.2f},".replace("-", "−") in sentence
    assert "adjusted p = " in sentence and ": grad_x_weight ranks the weights better than chance" in sentence
    assert "; difference from magnitude " in sentence
    assert any(
        "40 single weights were drawn over every order of magnitude of rank" in text for text in caveats(with_weights)
    )
    assert setup_items(with_weights) == setup_items(example)


@pytest.mark.parametrize(
    ("sampled", "words"),
    [
        (synthetic.sampled(metrics=("obd",)), "no other metric has a rho on them."),
        (synthetic.sampled(3), "no metric has a rank correlation (3 weights are too few"),
        (synthetic.sampled(metrics=("obd", "taylor2")), "; taylor2 "),
    ],
)
def test_single_weights_that_say_less(sampled, words):
    assert words in answer(synthetic.evidence(sampled=sampled))[3]


def test_the_reason_why_single_weights_have_no_rho_is_that_of_the_first_metric(with_weights):
    rows = with_weights.correlations.copy()
    of_weights = rows["unit"] == "weights"
    rows.loc[of_weights, "spearman"] = np.nan
    rows.loc[of_weights, "note"] = ["first", "second", "third"]
    rows.loc[of_weights, "n"] = [38, 40, 39]
    (sentence,) = agreement_of_single_weights(replace(with_weights, correlations=rows))
    assert sentence == "Over 40 single weights no metric has a rank correlation (first)."


def test_without_magnitude_the_first_other_metric_stands_beside():
    evidence = synthetic.evidence(sampled=synthetic.sampled(metrics=("grad_x_weight", "obd", "taylor2")))
    assert evidence.weight_correlations["metric"].tolist() == ["grad_x_weight", "obd", "taylor2"]
    sentence = answer(evidence)[3]
    assert "; obd " in sentence.partition(": grad_x_weight ranks")[0]
    assert "taylor2" not in sentence.partition(": grad_x_weight ranks")[0]


def test_an_order_of_single_weights_that_may_be_chance_is_not_claimed(with_weights):
    unsure = with_weights.correlations.assign(p_adjusted=0.06)
    sentence = answer(replace(with_weights, correlations=unsure))[3]
    assert ": no agreement is shown (with 80 % power a rho of " in sentence


def test_ablation_curves_are_called_so():
    example = synthetic.evidence(metrics=("obd",), ks=(1, 100))
    table = example.correlations
    assert table["unit"].tolist() == ["layers", "layers", "ablation_curve"]
    table = table.assign(p_adjusted=[0.9, 0.9, 0.01], within_rho=-0.5)
    (sentence,) = exploratory(replace(example, correlations=table))
    family = "Exploratory, one false-discovery family of 2"
    assert sentence == f"{family}: the wrong way round: obd over ablation curves (zero, k = 100)."


def test_exploratory_claims_are_listed_as_one_family(with_weights):
    table = with_weights.correlations.copy()
    assert table["primary"].tolist() == [1, 0, 0, 0, 0, 0]
    table["p_adjusted"] = [0.9, 0.01, 0.9, 0.9, 0.02, 0.01]
    table.loc[5, "spearman"] = -0.5
    (sentence,) = exploratory(replace(with_weights, correlations=table))
    names = table["metric"]
    assert sentence == (
        f"Exploratory, one false-discovery family of 5: better than chance: {names[1]} over layers (zero, k = 100) and "
        f"{names[4]} over weights (zero, k = 1); the wrong way round: {names[5]} over weights (zero, k = 1)."
    )
    many = pd.concat([table[table["primary"] == 0]] * 2, ignore_index=True)
    many = many.assign(k=range(1, 11), p_adjusted=[0.01] * 8 + [0.5] * 2, within_rho=0.5, spearman=0.5)
    for n, more in ((8, "and 2 more."), (6, "and {} (zero, k = 6).")):
        (sentence,) = exploratory(replace(with_weights, correlations=pd.concat([table[:1], many[:n]])))
        assert sentence.startswith(
            f"Exploratory, one false-discovery family of {n}: better than chance: obd over layers "
        )
        assert sentence.endswith(more.format(f"{many['metric'][5]} over {many['unit'][5]}"))
        assert sentence.count("(zero, k = ") == 6
    (nothing,) = exploratory(replace(with_weights, correlations=table.assign(p_adjusted=0.5)))
    assert nothing.endswith("no agreement is shown (with 80 % power a rho of 0.57 would have been).")
    assert exploratory(replace(with_weights, correlations=table.assign(p_adjusted=np.nan))) == []
