"""What a validation shows, in sentences: each number with its uncertainty, each claim no larger than its data."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bridge.analysis.measured_sets import infinite_where_undefined, rows_where
from bridge.exchange import layout
from bridge.report.evidence import Evidence
from bridge.report.number_format import count, exp, nats, number, p_value, perplexity, plural, spread
from bridge.report.phrases import (
    doing_to,
    loss_change_in_words,
    perplexity_after,
    setting_words,
    top_minus_random,
    weight_name,
)
from bridge.report.verdict_sentences import (
    agreement_of_layers,
    agreement_of_single_weights,
    exploratory,
    verdict_on_layers,
)


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
    """Sentences: the primary analysis; is the top-K critical, where does it hurt most, and what else is shown."""
    if not evidence.metrics:
        nothing = "No sets of weights were perturbed, only single weights."
        single_weights = agreement_of_single_weights(evidence)
        return [*single_weights, nothing, most_critical_weight(evidence), *exploratory(evidence)]
    return [
        verdict_on_layers(evidence),
        _global_top_set(evidence),
        f"{_most_damaging_layer(evidence).rstrip('.')}; {_layers_above_random(evidence)}",
        *agreement_of_single_weights(evidence),
        *exploratory(evidence),
    ]


def most_critical_weight(evidence: Evidence) -> str:
    """The first weight of the ranking by the metric that the sentences speak of."""
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
        ("Primary analysis", _primary(evidence)),
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


def _primary(evidence: Evidence) -> str:
    """The analysis that was named before anything was measured."""
    primary = evidence.primary
    if primary is None:
        return "none was named, everything is exploratory"
    return f"{setting_words(primary)}, over {primary['unit']}"


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
        f"{perplexity_after(effect)} ({loss_change_in_words(effect)}); {_global_random_sets(rows, k)}"
        f"{_above_global_random_sets(evidence)}."
    )


def _above_global_random_sets(evidence: Evidence) -> str:
    """By how much the global top set is above the random ones, as the instrument compared them draw by draw."""
    perturbation, k = evidence.setting
    rows = rows_where(evidence.top_against_random, target_layer=layout.ALL, perturbation=perturbation, k=k)
    rows = rows_where(rows, metric=evidence.metric).dropna(subset=["n_draws"])
    return f"; {top_minus_random(rows.iloc[0])}" if len(rows) else ""


def _global_random_sets(rows: pd.DataFrame, k: int) -> str:
    """What perturbing K random weights of the whole model did."""
    drawn = rows_where(rows, selection=layout.RANDOM)
    if drawn.empty:
        return "no random set of the same size was measured"
    effects = infinite_where_undefined(drawn["delta_nll"])
    low, high = effects.min(), effects.max()
    losses = nats(low) if len(drawn) == 1 else f"in {spread(low, high)} over {plural(len(drawn), 'draw')}"
    n_unbounded = int(np.isinf(effects).sum())
    unbounded = f"; {n_unbounded} of {len(drawn)} without a finite loss" if n_unbounded else ""
    highest = perplexity(exp(rows["baseline_nll"].iloc[0] + high))
    return f"{plural(k, 'random weight')}: to {highest} at most (loss {losses}{unbounded})"


def _most_damaging_layer(evidence: Evidence) -> str:
    effects = evidence.layer_effects
    if effects.empty:
        return "No single layer was measured."
    worst = effects.iloc[int(effects["delta_nll"].to_numpy(float).argmax())]
    n_layers = effects["target_layer"].nunique()
    return (
        f"The most damaging of {plural(n_layers, 'layer')} tested is {worst['target_layer']}, by its top {worst['k']} "
        f"of {worst['metric']} ({loss_change_in_words(worst)})."
    )


def _layers_above_random(evidence: Evidence) -> str:
    """In how many layers the top weights did more damage than every random draw."""
    above = evidence.layers_above_random(evidence.metric)
    if above.n == 0:
        return "no top set of a layer was compared with random ones."
    draws = "the one random draw" if above.draws == 1 else f"each of {above.draws} random draws"
    by_chance = f"by chance: {number(above.expected, 2)}, p = {p_value(above.p_value)}"
    return (
        f"in {above.wins} of {plural(above.n, 'layer')} the top weights by {evidence.metric} did more damage than "
        f"{draws} ({by_chance})."
    )
