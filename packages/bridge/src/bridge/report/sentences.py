"""What a validation found, in sentences: each number with its uncertainty, each claim no larger than its data."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from bridge.analysis.correlation import ALL, BASELINE, top_against_random
from bridge.analysis.single_weights import SELECTION
from bridge.report.number_format import count, exp, measured, nats, number, p_value, perplexity, plural, rho, spread

_DOING = {"zero": "Zeroing", "sign_flip": "Flipping the sign of"}


@dataclass(frozen=True)
class Evidence:
    """All that a report is made from; see ``report.write_report``."""

    validation_manifest: dict
    discovery_manifest: dict
    measurements: pd.DataFrame
    targets: pd.DataFrame
    correlations: pd.DataFrame
    top_weights: dict[str, pd.DataFrame]
    summaries: dict[str, pd.DataFrame]
    sampled: pd.DataFrame | None = None
    stability: pd.DataFrame | None = None

    @property
    def setting(self) -> tuple[str, int]:
        """The perturbation and k that the sentences speak of: the first perturbation, at its largest k."""
        first = self.measurements["perturbation"].iloc[0]
        return first, int(self.measurements.loc[self.measurements["perturbation"] == first, "k"].max())

    @property
    def metric(self) -> str:
        """The metric of largest rho in that setting, magnitude aside; the first one if none has a rho.

        Over layers, or where these give none over single weights.
        """
        for table in (self.layer_correlations(), self.weight_correlations()):
            rows = table.dropna(subset=["spearman"])
            rows = rows[rows["metric"] != BASELINE]
            if len(rows):
                return rows.loc[rows["spearman"].idxmax(), "metric"]
        return next((m for m in [*self.metrics(), *self.top_weights] if m != BASELINE), BASELINE)

    def metrics(self) -> list[str]:
        """The metrics whose top weights were perturbed, the baseline last."""
        chosen = self.measurements["selection"]
        names = dict.fromkeys(chosen[chosen.str.startswith("top_")].str.removeprefix("top_"))
        return sorted(names, key=lambda name: name == BASELINE)

    def layer_correlations(self) -> pd.DataFrame:
        """The rows of the unit layers in the setting."""
        table, (perturbation, k) = self.correlations, self.setting
        return table[(table["unit"] == "layers") & (table["perturbation"] == perturbation) & (table["k"] == k)]

    def weight_correlations(self) -> pd.DataFrame:
        """The rows of the unit weights under the first perturbation."""
        table = self.correlations
        return table[(table["unit"] == "weights") & (table["perturbation"] == self.setting[0])]

    def layer_effects(self, metric: str | None = None) -> pd.DataFrame:
        """Top against random over the single layers in the setting."""
        perturbation, k = self.setting
        table = top_against_random(self.measurements)
        table = table[(table["perturbation"] == perturbation) & (table["k"] == k) & (table["target_layer"] != ALL)]
        return table if metric is None else table[table["metric"] == metric]


def summary_lines(found: Evidence) -> list[str]:
    """The result in lines: the setup, the weight, the top-K, the layer, the agreement; that of single weights."""
    return [_setup(found), _weight(found), _global(found), _layer(found), _agreement(found), *_single_weights(found)]


def answer(found: Evidence) -> list[str]:
    """Sentences: is the top-K critical, where does it hurt most, do the scores predict it, and for single weights."""
    if not found.metrics():
        return ["No sets of weights were perturbed, only single weights.", _weight(found), *_single_weights(found)]
    return [
        _global(found),
        f"{_layer(found).rstrip('.')}; {_beaten(found)}",
        _verdict(found),
        *_single_weights(found),
    ]


def _setup(found: Evidence) -> str:
    model, corpus = (identity(found.discovery_manifest, part) for part in ("model", "corpus"))
    row = found.measurements.iloc[0]
    name = model.get("id") or row["model"]
    size = f" ({count(model['n_parameters'])} parameters)" if model.get("n_parameters") else ""
    return (
        f"{name}{size} on {corpus.get('source', 'its corpus')} ({plural(int(row['n_sequences']), 'sequence')}, "
        f"{plural(int(row['n_tokens']), 'token')}): baseline perplexity {perplexity(row['baseline_ppl'])}."
    )


def identity(manifest: dict, part: str) -> dict:
    """The ``model``, ``corpus`` or ``options`` that a manifest gives; empty if it gives none."""
    return (manifest.get("identity") or {}).get(part) or {}


def _weight(found: Evidence) -> str:
    metric = found.metric if found.metric in found.top_weights else next(iter(found.top_weights), None)
    if metric is None or found.top_weights[metric].empty:
        return "No ranking of single weights was given."
    first = found.top_weights[metric].sort_values("rank").iloc[0]
    value, score = number(first["value"]), number(first["score"])
    return f"Most critical weight by {metric}: {weight_name(first)} = {value}, score {score}."


def weight_name(weight: pd.Series) -> str:
    """``parameter[row, col]``, or ``parameter[row]`` of a vector."""
    col = "" if pd.isna(weight["col"]) else f", {int(weight['col'])}"
    return f"{weight['parameter']}[{int(weight['row'])}{col}]"


def _global(found: Evidence) -> str:
    perturbation, k = found.setting
    rows = found.measurements
    rows = rows[(rows["target_layer"] == ALL) & (rows["perturbation"] == perturbation) & (rows["k"] == k)]
    top = rows[rows["selection"] == f"top_{found.metric}"]
    if top.empty:
        return f"The global top-{k} by {found.metric} was not perturbed as one set (the target {ALL} was not measured)."
    effect = top.iloc[0]
    after = measured(effect["perturbed_ppl"], *perplexity_interval(effect), signed=False)
    return (
        f"{doing_to(perturbation)} the global top-{k} by {found.metric} takes perplexity from "
        f"{perplexity(effect['baseline_ppl'])} to {after} ({effect_words(effect)}); {_random_words(rows, k)}."
    )


def perplexity_interval(row: pd.Series) -> tuple[float, float]:
    """The ends of the perturbed perplexity's interval: those of the change of loss, added and exponentiated."""
    return exp(row["baseline_nll"] + row["ci_low"]), exp(row["baseline_nll"] + row["ci_high"])


def doing_to(perturbation: str) -> str:
    """How a sentence begins that tells of a perturbation."""
    return _DOING.get(perturbation, f"Applying {perturbation} to")


def effect_words(row: pd.Series) -> str:
    """``loss +1.2 [1.1, 1.3] nats per token``."""
    if not np.isfinite(row["delta_nll"]):
        return "its loss is infinite or undefined"
    return f"loss {measured(row['delta_nll'], row['ci_low'], row['ci_high'])} nats per token"


def _random_words(rows: pd.DataFrame, k: int) -> str:
    drawn = rows[rows["selection"] == "random"]
    if drawn.empty:
        return "no random set of the same size was measured"
    low, high = drawn["delta_nll"].min(), drawn["delta_nll"].max()
    losses = nats(low) if len(drawn) == 1 else f"in {spread(low, high)} over {plural(len(drawn), 'draw')}"
    highest = perplexity(exp(rows["baseline_nll"].iloc[0] + high))
    return f"{plural(k, 'random weight')}: to {highest} at most (loss {losses})"


def _layer(found: Evidence) -> str:
    effects = found.layer_effects()
    if effects.empty:
        return "No single layer was measured."
    worst = effects.loc[effects["delta_nll"].idxmax()]
    n = effects["target_layer"].nunique()
    return (
        f"The most damaging of {plural(n, 'layer')} tested is {worst['target_layer']}, by its top {worst['k']} of "
        f"{worst['metric']} ({effect_words(worst)})."
    )


def beaten_random(effects: pd.DataFrame) -> dict:
    """In how many layers the top set did more damage than every random draw, and whether chance explains it.

    Under chance each layer does so with probability 1 / (B + 1); the binomial p-value takes the layers as
    independent, which they are not quite: they share their texts.
    """
    tested = effects[effects["n_random"] > 0]
    if tested.empty:
        return {"n": 0}
    draws = int(tested["n_random"].min())
    wins = int((tested["delta_nll"] > tested["random_high"]).sum())
    chance = 1 / (draws + 1)
    p = float(stats.binomtest(wins, len(tested), chance, alternative="greater").pvalue)
    return {"n": len(tested), "wins": wins, "draws": draws, "expected": chance * len(tested), "p": p}


def _beaten(found: Evidence) -> str:
    facts = beaten_random(found.layer_effects(found.metric))
    if not facts["n"]:
        return "no random control was measured within the layers."
    draws = "the one random draw" if facts["draws"] == 1 else f"each of {facts['draws']} random draws"
    return (
        f"in {facts['wins']} of {plural(facts['n'], 'layer')} the top weights by {found.metric} did more damage than "
        f"{draws} (by chance: {number(facts['expected'], 2)}, p = {p_value(facts['p'])})."
    )


def _agreement(found: Evidence) -> str:
    rows = found.layer_correlations().set_index("metric")
    if found.metric not in rows.index:
        return "No rank agreement was computed: no top weights of single layers were perturbed."
    best = rows.loc[found.metric]
    if pd.isna(best["spearman"]):
        return f"Spearman's rho for {found.metric}: none ({best['note']})."
    layers = plural(int(best["n"]), "layer")
    text = f"Spearman's rho between score and effect over {layers}: {found.metric} {rho_words(best)}"
    if found.metric == BASELINE:
        return f"{text}."
    if BASELINE not in rows.index:
        return f"{text}; {BASELINE} was not measured."
    other = rows.loc[BASELINE]
    return f"{text}; {BASELINE} {'none' if pd.isna(other['spearman']) else rho_words(other)}."


def rho_words(row: pd.Series) -> str:
    """``0.90 [0.74, 0.97], p = 0.0002``."""
    return f"{rho(row['spearman'], row['ci_low'], row['ci_high'])}, p = {p_value(row['p_value'])}"


def _verdict(found: Evidence) -> str:
    sentence = _agreement(found).rstrip(".")
    rows = found.layer_correlations().set_index("metric")
    if found.metric not in rows.index or pd.isna(rows.loc[found.metric, "spearman"]):
        return f"{sentence}."
    row = rows.loc[found.metric]
    if pd.isna(row["above_magnitude"]):
        return f"{sentence}: {_claim(row)}."
    sure = "above" if row["above_low"] > 0 else "below" if row["above_high"] < 0 else "not clearly different from"
    return f"{sentence}: {_claim(row)}, and it is {sure} {BASELINE} (difference {above_words(row)})."


def above_words(row: pd.Series) -> str:
    """How far a rho is above magnitude's: ``0.75 [0.59, 0.90]``."""
    return rho(row["above_magnitude"], row["above_low"], row["above_high"])


def _claim(row: pd.Series) -> str:
    if row["ci_low"] > 0:
        return "the score orders the layers better than chance"
    return "the score orders the layers the wrong way round" if row["ci_high"] < 0 else "no agreement is shown"


def _single_weights(found: Evidence) -> list[str]:
    """Which metric ranks single weights best, and how the baseline does on the same ones; nothing if none were."""
    rows = found.weight_correlations()
    if rows.empty:
        return []
    measured_weights = plural(int(rows["n"].max()), "single weight")
    ranked = rows.dropna(subset=["spearman"]).set_index("metric").sort_values("spearman", ascending=False)
    if ranked.empty:
        return [f"Over {measured_weights} no metric has a rank correlation ({rows.iloc[0]['note']})."]
    best, others = ranked.index[0], list(ranked.index[1:])
    other = BASELINE if BASELINE in others else next(iter(others), None)
    claim = "ranks the size of the effect best" if ranked.loc[best, "ci_low"] > 0 else "is not shown to rank the effect"
    text = f"Over {measured_weights}, {best} {claim}: Spearman's rho {rho_words(ranked.loc[best])}"
    if other is None:
        return [f"{text}; no other metric was scored on them." if len(rows) == 1 else f"{text}; no other has a rho."]
    text += f"; {other} {rho_words(ranked.loc[other])}"
    row = ranked.loc[best]
    return [f"{text}." if pd.isna(row["above_magnitude"]) else f"{text} (difference {above_words(row)})."]


def setup_facts(found: Evidence) -> list[tuple[str, str]]:
    """Model, corpus and setting as name and value, for the head of the report."""
    model, corpus = (identity(found.discovery_manifest, part) for part in ("model", "corpus"))
    row = found.measurements.iloc[0]
    sets = found.measurements[found.measurements["selection"] != SELECTION]
    sizes = f"k = {', '.join(map(str, sorted(set(sets['k']))))}" if len(sets) else "single weights alone"
    return [
        ("Model", f"{model.get('id') or row['model']} ({model.get('dtype', 'dtype unknown')})"),
        ("Parameters", count(model.get("n_parameters"))),
        ("Corpus", f"{corpus.get('source', 'unknown')}, {corpus.get('packing', 'packing unknown')}"),
        ("Size", f"{plural(int(row['n_sequences']), 'sequence')}, {plural(int(row['n_tokens']), 'token')}"),
        ("Baseline", f"perplexity {perplexity(row['baseline_ppl'])}, loss {number(row['baseline_nll'], 4)}"),
        ("Perturbation", f"{', '.join(dict.fromkeys(found.measurements['perturbation']))}; {sizes}"),
    ]
