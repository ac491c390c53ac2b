"""The tables of a report: a validation's numbers as rows of text, each with its uncertainty."""

from dataclasses import dataclass, field

import pandas as pd

from bridge.analysis.correlation import ALL, BASELINE, ablation_curves, top_against_random
from bridge.analysis.single_weights import sampled_metrics, weight_effects
from bridge.report.number_format import (
    DASH,
    coefficient,
    count,
    measured,
    nats,
    number,
    p_value,
    perplexity,
    plural,
    rho,
    spread,
)
from bridge.report.sentences import Evidence, above_words, beaten_random, doing_to, perplexity_interval, weight_name

N_WEIGHTS_SHOWN = 10
N_EFFECTS_SHOWN = 20


@dataclass(frozen=True)
class TextTable:
    """A table as text; ``n_text``: how many first columns are words; ``folded``: shown only on request."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    n_text: int = 1
    folded: bool = False
    notes: list[str] = field(default_factory=list)


def settings(found: Evidence) -> list[tuple[str, int]]:
    """Every (perturbation, k) measured, the one that the sentences speak of first."""
    pairs = found.measurements[["perturbation", "k"]].drop_duplicates().itertuples(index=False, name=None)
    return sorted(((name, int(k)) for name, k in pairs), key=lambda pair: pair != found.setting)


def global_effects(found: Evidence) -> list[TextTable]:
    """What was done to the target ALL; one table a setting."""
    everything = found.measurements[found.measurements["target_layer"] == ALL]
    tables = []
    for perturbation, k in settings(found):
        rows = everything[(everything["perturbation"] == perturbation) & (everything["k"] == k)]
        if len(rows):
            title = f"{doing_to(perturbation)} {plural(k, 'weight')} of all layers together"
            lines = [_global_line(row) for _, row in rows.iterrows()]
            columns = ["Which weights", "Perplexity after", "Change of loss, nats per token"]
            notes = [f"Before: perplexity {perplexity(rows['baseline_ppl'].iloc[0])}. In brackets: 95 % intervals."]
            tables.append(TextTable(title, columns, lines, folded=bool(tables), notes=notes))
    return tables


def _global_line(row: pd.Series) -> list[str]:
    which = row["selection"].replace("_", " by ", 1)
    seed = "" if pd.isna(row["seed"]) else f", draw {row['seed']}"
    return [
        f"{which}{seed}",
        measured(row["perturbed_ppl"], *perplexity_interval(row), signed=False),
        measured(row["delta_nll"], row["ci_low"], row["ci_high"]),
    ]


def layer_effects(found: Evidence) -> list[TextTable]:
    """Every layer's effect by metric and the range of its random draws; one table a setting."""
    against = top_against_random(found.measurements)
    against = against[against["target_layer"] != ALL]
    tables = []
    for perturbation, k in settings(found):
        rows = against[(against["perturbation"] == perturbation) & (against["k"] == k)]
        if len(rows):
            title = f"{doing_to(perturbation)} the top {k} of a layer"
            tables.append(_layer_table(title, rows, found, folded=bool(tables)))
    return tables


def _layer_table(title: str, rows: pd.DataFrame, found: Evidence, folded: bool) -> TextTable:
    metrics = [metric for metric in found.metrics() if metric in set(rows["metric"])]
    roles = found.targets.drop_duplicates("target_layer").set_index("target_layer")
    order = rows.groupby("target_layer", sort=False)["delta_nll"].max().sort_values(ascending=False, kind="stable")
    by_layer = {layer: group.set_index("metric") for layer, group in rows.groupby("target_layer", sort=False)}
    lines = [[layer, *_role(roles, layer), *_cells(by_layer[layer], metrics)] for layer in order.index]
    columns = ["Layer", "Role", "Score rank", "In top K", *(f"Top by {metric}" for metric in metrics), _draws(rows)]
    notes = ["Change of loss in nats per token and its 95 % interval; of random draws the smallest and the largest."]
    return TextTable(title, columns, lines, 2, folded, notes)


def _draws(rows: pd.DataFrame) -> str:
    counts = set(rows["n_random"])
    return f"{plural(counts.pop(), 'random draw')}" if len(counts) == 1 else "Random draws"


def _role(roles: pd.DataFrame, layer: str) -> list[str]:
    if layer not in roles.index:
        return [DASH] * 3
    row = roles.loc[layer]
    return [str(row["role"]), count(row["score_rank"]), count(row["n_top"])]


def _cells(group: pd.DataFrame, metrics: list[str]) -> list[str]:
    effects = [
        measured(*group.loc[metric, ["delta_nll", "ci_low", "ci_high"]]) if metric in group.index else DASH
        for metric in metrics
    ]
    drawn = spread(*group.iloc[0][["random_low", "random_high"]]).replace("\u00a0", " ")  # may break: the last column
    return [*effects, drawn or DASH]


def against_random(found: Evidence) -> list[TextTable]:
    """For each metric: in how many layers its top weights did more damage than every random draw."""
    lines = []
    for metric in found.metrics():
        effects = found.layer_effects(metric)
        facts = beaten_random(effects)
        if facts["n"]:
            medians = [nats(effects[column].median()) for column in ["delta_nll", "random_mean"]]
            won = f"{facts['wins']} of {facts['n']}"
            lines.append([metric, won, number(facts["expected"], 2), p_value(facts["p"]), *medians])
    if not lines:
        return []
    columns = ["Metric", "Layers above every draw", "By chance", "p", "Median effect", "Median of random means"]
    notes = [
        "p: binomial, taking the layers as independent; they share their texts and are so only nearly. Effects in "
        "nats per token, medians over the layers."
    ]
    return [TextTable("Top weights against random ones", columns, lines, notes=notes)]


def correlations(found: Evidence) -> list[TextTable]:
    """Rank agreement of score and effect."""
    if found.correlations.empty:
        return []
    lines = [
        [
            row["unit"].replace("_", " "),
            row["metric"],
            f"{row['perturbation']}, k = {row['k']}",
            count(row["n"]),
            rho(row["spearman"], row["ci_low"], row["ci_high"]),
            *(p_value(row[name]) for name in ["p_value", "p_adjusted"]),
            above_words(row),
            *(coefficient(row[name]) for name in ["kendall_tau_b", "weighted_tau", "rbo"]),
            _precision(row),
        ]
        for _, row in found.correlations.iterrows()
    ]
    columns = ["Unit", "Metric", "Setting", "n", "Spearman's ρ", "p", "Adjusted p", f"Above {BASELINE}"]
    columns += ["τ-b", "Weighted τ", "RBO", "Precision (chance)"]
    notes = [
        "ρ and its 95 % bootstrap interval over units; p by permutation, two-sided; adjusted for the number of metrics "
        f"(Benjamini–Hochberg); above {BASELINE}: ρ minus that of the weights' {BASELINE} over the same units; RBO: "
        "rank-biased overlap, persistence 0.9; precision: share of the units predicted highest that are among as many "
        "of largest effect, and what chance gives.",
        *_notes(found.correlations),
    ]
    return [TextTable("Agreement of score and effect", columns, lines, 3, notes=notes)]


def _notes(table: pd.DataFrame) -> list[str]:
    """Each note once, with the rows that it belongs to."""
    rows: dict[str, list[int]] = {}
    for index, note in table["note"].fillna("").items():
        for part in filter(None, str(note).split("; ")):
            rows.setdefault(part, []).append(index)
    return [f"{_rows_named(table, chosen)}: {note}." for note, chosen in rows.items()]


def _rows_named(table: pd.DataFrame, chosen: list[int]) -> str:
    if len(chosen) == len(table):
        return "All rows"
    rows = table.loc[chosen]
    units = [
        unit for unit in dict.fromkeys(rows["unit"]) if (rows["unit"] == unit).sum() == (table["unit"] == unit).sum()
    ]
    single = rows[~rows["unit"].isin(units)]
    names = [unit.replace("_", " ") for unit in units]
    names += [f"{r['unit'].replace('_', ' ')} by {r['metric']}, k = {r['k']}" for _, r in single.iterrows()]
    text = "; ".join(names)
    return text[0].upper() + text[1:]


def _precision(row: pd.Series) -> str:
    if pd.isna(row["precision_at_n"]) or not row["n"]:
        return DASH
    return f"top {row['top_n']}: {coefficient(row['precision_at_n'])} ({coefficient(row['top_n'] / row['n'])})"


def curves(found: Evidence) -> list[TextTable]:
    """Mean height of the ablation curves, next to random weights."""
    table = ablation_curves(found.measurements)
    if table.empty:
        return []
    lines = [
        [
            "all layers" if row["target_layer"] == ALL else row["target_layer"],
            f"{row['metric']}, {row['perturbation']}",
            f"{row['k_low']} to {row['k_high']} ({row['n_k']})",
            *(nats(row[name]) for name in ["area", "area_random", "area_excess"]),
        ]
        for _, row in table.sort_values("target_layer", key=lambda names: names != ALL, kind="stable").iterrows()
    ]
    columns = ["Target", "Metric, perturbation", "k (number)", "Mean height", "Random", "Excess"]
    notes = ["Area under the change of loss against ln k, divided by the width: nats per token, without an interval."]
    return [TextTable("Mean height of each curve", columns, lines, 2, folded=len(lines) > 12, notes=notes)]


def single_weights(found: Evidence) -> list[TextTable]:
    """The first weights of each metric's global ranking."""
    tables = []
    for metric, weights in found.top_weights.items():
        first = weights.sort_values("rank").head(N_WEIGHTS_SHOWN)
        lines = [
            [weight_name(row), count(row["rank"]), number(row["value"], 4), number(row["score"], 4)]
            for _, row in first.iterrows()
        ]
        title = f"The first {len(lines)} of {len(weights)} weights by {metric}"
        tables.append(TextTable(title, ["Weight", "Rank", "Value", "Score"], lines, folded=bool(tables)))
    return tables


def effects_of_weights(found: Evidence) -> list[TextTable]:
    """What each single weight did, largest effect first, next to its scores; one table a perturbation."""
    effects = weight_effects(found.measurements, found.sampled)
    if effects.empty:
        return []
    metrics = sampled_metrics(found.sampled)
    columns = ["Weight", "Value", "Change of loss, nats per token", *(f"Score by {metric}" for metric in metrics)]
    tables = []
    for perturbation, rows in effects.groupby("perturbation", sort=False):
        first = rows.sort_values("size", ascending=False, kind="stable").head(N_EFFECTS_SHOWN)
        lines = [
            [weight_name(row), number(row["value"], 4), measured(*row[["delta_nll", "ci_low", "ci_high"]])]
            + [number(row[f"score_{metric}"]) for metric in metrics]
            for _, row in first.iterrows()
        ]
        title = f"{doing_to(perturbation)} one weight: the {len(first)} of largest effect among {len(rows)}"
        tables.append(TextTable(title, columns, lines, folded=bool(tables)))
    return tables
