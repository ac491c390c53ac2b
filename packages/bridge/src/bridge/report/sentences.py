"""What a validation shows, in sentences: each number with its uncertainty, each claim no larger than its data."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from bridge.analysis.measured_sets import rows_where
from bridge.exchange import layout
from bridge.report.evidence import Evidence
from bridge.report.number_format import count, exp, nats, number, p_value, perplexity, plural, spread
from bridge.report.phrases import doing_to, loss_change_in_words, perplexity_after, weight_name
from bridge.report.verdicts import agreement_of_layers, agreement_of_single_weights, verdict_on_layers


def summary_lines(evidence: Evidence) -> list[str]:
    """The result in lines: the setup, the weight, the top-K, the layer, the agreement; that of single weights."""
    return [
        _setup(evidence),
        most_critical_weight(evidence),
        _global_top_set(evidence),
        _most_damaging_layer(evidence),
        agreement_of_layers(evidence),
        *agreement_of_single_weights(evidence),
    ]


def answer(evidence: Evidence) -> list[str]:
    """Sentences: is the top-K critical, where does it hurt most, do the scores predict it, and for single weights."""
    if not evidence.metrics:
        nothing = "No sets of weights were perturbed, only single weights."
        return [nothing, most_critical_weight(evidence), *agreement_of_single_weights(evidence)]
    return [
        _global_top_set(evidence),
        f"{_most_damaging_layer(evidence).rstrip('.')}; {_layers_above_random(evidence)}",
        verdict_on_layers(evidence),
        *agreement_of_single_weights(evidence),
    ]


def most_critical_weight(evidence: Evidence) -> str:
    """The first weight of the ranking that predicts best."""
    rankings = evidence.top_weights
    metric = evidence.metric if evidence.metric in rankings else next(iter(rankings), None)
    if metric is None or rankings[metric].empty:
        return "No ranking of single weights was given."
    first = rankings[metric].sort_values("rank").iloc[0]
    value, score = number(first["value"]), number(first["score"])
    return f"Most critical weight by {metric}: {weight_name(first)} = {value}, score {score}."


def setup_items(evidence: Evidence) -> list[tuple[str, str]]:
    """Model, corpus and setting as name and value, for the head of the report."""
    model, corpus = evidence.model, evidence.corpus
    first = evidence.measurements.iloc[0]
    sets = evidence.measurements[evidence.measurements["selection"] != layout.SINGLE_WEIGHT]
    ks = ", ".join(str(k) for k in sorted(set(sets["k"])))
    sizes = f"k = {ks}" if len(sets) else "single weights alone"
    perturbations = ", ".join(dict.fromkeys(evidence.measurements["perturbation"]))
    return [
        ("Model", f"{model.get('id') or first['model']} ({model.get('dtype', 'dtype unknown')})"),
        ("Parameters", count(model.get("n_parameters"))),
        ("Texts of the scores", _source(corpus)),
        ("Texts of the effects", _judging_texts(evidence)),
        ("Size", _corpus_size(first)),
        ("Baseline", f"perplexity {perplexity(first['baseline_ppl'])}, loss {number(first['baseline_nll'], 4)}"),
        ("Perturbation", f"{perturbations}; {sizes}"),
    ]


def _source(corpus: Mapping[str, Any]) -> str:
    return f"{corpus.get('source', 'unknown')}, {corpus.get('packing', 'packing unknown')}"


def _judging_texts(evidence: Evidence) -> str:
    if evidence.judged_by_other_texts:
        return _source(evidence.measured_corpus)
    return "MEASURED ON THE TEXTS THAT GAVE THE SCORES: on unseen texts the agreement may be lower"


def _setup(evidence: Evidence) -> str:
    model = evidence.model
    first = evidence.measurements.iloc[0]
    name = model.get("id") or first["model"]
    size = f" ({count(model['n_parameters'])} parameters)" if model.get("n_parameters") else ""
    source = evidence.measured_corpus.get("source", "its corpus")
    before = perplexity(first["baseline_ppl"])
    return f"{name}{size} on {source} ({_corpus_size(first)}): baseline perplexity {before}."


def _corpus_size(row: pd.Series) -> str:
    """How many sequences and tokens a measurement was taken on."""
    return f"{plural(int(row['n_sequences']), 'sequence')}, {plural(int(row['n_tokens']), 'token')}"


def _global_top_set(evidence: Evidence) -> str:
    """What perturbing the top-K of the whole model did, next to random weights."""
    perturbation, k = evidence.setting
    metric = evidence.metric
    rows = rows_where(evidence.measurements, target_layer=layout.ALL, perturbation=perturbation, k=k)
    top = rows_where(rows, selection=layout.top_label(metric))
    if top.empty:
        return (
            f"The global top-{k} by {metric} was not perturbed as one set (the target {layout.ALL} was not measured)."
        )
    effect = top.iloc[0]
    before = perplexity(effect["baseline_ppl"])
    return (
        f"{doing_to(perturbation)} the global top-{k} by {metric} takes perplexity from {before} to "
        f"{perplexity_after(effect)} ({loss_change_in_words(effect)}); {_global_random_sets(rows, k)}."
    )


def _global_random_sets(rows: pd.DataFrame, k: int) -> str:
    """What perturbing K random weights of the whole model did."""
    drawn = rows_where(rows, selection=layout.RANDOM)
    if drawn.empty:
        return "no random set of the same size was measured"
    low, high = drawn["delta_nll"].min(), drawn["delta_nll"].max()
    losses = nats(low) if len(drawn) == 1 else f"in {spread(low, high)} over {plural(len(drawn), 'draw')}"
    highest = perplexity(exp(rows["baseline_nll"].iloc[0] + high))
    return f"{plural(k, 'random weight')}: to {highest} at most (loss {losses})"


def _most_damaging_layer(evidence: Evidence) -> str:
    effects = evidence.layer_effects
    if effects.empty:
        return "No single layer was measured."
    worst = effects.loc[effects["delta_nll"].idxmax()]
    n_layers = effects["target_layer"].nunique()
    return (
        f"The most damaging of {plural(n_layers, 'layer')} tested is {worst['target_layer']}, by its top {worst['k']} "
        f"of {worst['metric']} ({loss_change_in_words(worst)})."
    )


def _layers_above_random(evidence: Evidence) -> str:
    """In how many layers the top weights did more damage than every random draw."""
    above = evidence.layers_above_random(evidence.metric)
    if above.n == 0:
        return "no random control was measured within the layers."
    draws = "the one random draw" if above.draws == 1 else f"each of {above.draws} random draws"
    by_chance = f"by chance: {number(above.expected, 2)}, p = {p_value(above.p_value)}"
    return (
        f"in {above.wins} of {plural(above.n, 'layer')} the top weights by {evidence.metric} did more damage than "
        f"{draws} ({by_chance})."
    )
