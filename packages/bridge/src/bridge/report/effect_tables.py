"""Tables of measured effects: of the whole model, of layers against random weights, of curves, of single weights."""

import pandas as pd

from bridge.analysis.measured_sets import first_row, rows_where, single_layers
from bridge.exchange import layout
from bridge.report.evidence import Evidence
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
    spread,
)
from bridge.report.phrases import DRAWS_NEEDED, doing_to, loss_change, perplexity_after, weight_name
from bridge.report.text_table import TextTable

N_EFFECTS_SHOWN = 20
N_CURVES_SHOWN = 12  # more are folded
TEXTS_THAT_DECIDE = "Texts that decide: how many texts of equal effect would spread it as these do (n_eff)."


def global_effects(evidence: Evidence) -> list[TextTable]:
    """What was done to the target ALL; one table a setting, the first one open."""
    tables: list[TextTable] = []
    for perturbation, k in evidence.settings:
        rows = rows_where(evidence.measurements, target_layer=layout.ALL, perturbation=perturbation, k=k)
        if rows.empty:
            continue
        before = perplexity(rows["baseline_ppl"].iloc[0])
        tables.append(
            TextTable(
                title=f"{doing_to(perturbation)} {plural(k, 'weight')} of all layers together",
                columns=["Which weights", "Perplexity after", "Change of loss, nats per token", "Texts that decide"],
                rows=[
                    [_which_weights(row), perplexity_after(row), loss_change(row), _texts_that_decide(row)]
                    for _, row in rows.iterrows()
                ],
                folded=bool(tables),
                notes=[f"Before: perplexity {before}. In brackets: 95 % intervals over texts. {TEXTS_THAT_DECIDE}"],
            )
        )
    return tables


def _which_weights(row: pd.Series) -> str:
    """The selection of a measurement as words: ``top by obd``, ``random, draw 0``."""
    words = str(row["selection"]).replace("_", " by ", 1)
    return words if pd.isna(row["seed"]) else f"{words}, draw {row['seed']}"


def _texts_that_decide(row: pd.Series) -> str:
    """``7.2 of 12``: n_eff of a measurement and its number of texts."""
    if pd.isna(row.get("n_eff")):
        return DASH
    return f"{number(row['n_eff'], 2)} of {count(row.get('n_clusters', row['n_sequences']))}"


def layer_effects(evidence: Evidence) -> list[TextTable]:
    """Every layer's effect by metric and the range of its random draws; one table a setting, the first one open."""
    layers = single_layers(evidence.top_against_random)
    tables: list[TextTable] = []
    for perturbation, k in evidence.settings:
        rows = rows_where(layers, perturbation=perturbation, k=k)
        if len(rows):
            title = f"{doing_to(perturbation)} the top {k} of a layer"
            tables.append(_layer_table(evidence, title, rows, folded=bool(tables)))
    return tables


def _layer_table(evidence: Evidence, title: str, effects: pd.DataFrame, folded: bool) -> TextTable:
    """One row a layer, the largest effect first; ``effects``: rows of ``top_against_random`` in one setting."""
    metrics = [metric for metric in evidence.metrics if metric in set(effects["metric"])]
    layers = effects.groupby("target_layer", sort=False)
    rows = []
    for layer in layers["delta_nll"].max().sort_values(ascending=False, kind="stable").index:
        of_layer = rows_where(effects, target_layer=layer)
        of_metrics = [first_row(of_layer, metric=metric) for metric in metrics]
        cells = [DASH if row is None else loss_change(row) for row in of_metrics]
        rows.append([layer, *_role(evidence.targets, layer), *cells, _range_of_draws(of_layer)])
    n_draws = set(effects["n_random"])
    draws = plural(n_draws.pop(), "random draw") if len(n_draws) == 1 else "Random draws"
    return TextTable(
        title=title,
        columns=["Layer", "Role", "Score rank", "In top K", *(f"Top by {metric}" for metric in metrics), draws],
        rows=rows,
        n_text=2,
        folded=folded,
        notes=["Change of loss in nats per token and its 95 % interval; of random draws the smallest and the largest."],
    )


def _role(targets: pd.DataFrame, layer: str) -> list[str]:
    """Role, rank of the score and share of the top-K of a layer."""
    row = first_row(targets, target_layer=layer)
    if row is None:
        return [DASH] * 3
    return [str(row["role"]), count(row["score_rank"]), count(row["n_top"])]


def _range_of_draws(effects_of_layer: pd.DataFrame) -> str:
    first = effects_of_layer.iloc[0]  # the draws are the same for every metric
    words = spread(first["random_low"], first["random_high"])
    return words.replace("\u00a0", " ") or DASH  # the last column may break its lines


def against_random(evidence: Evidence) -> list[TextTable]:
    """For each metric: in how many layers its top weights did more damage than every random draw.

    Then every top set of the setting against the random sets of its target, as the instrument compared them.
    """
    rows = []
    for metric in evidence.metrics:
        above = evidence.layers_above_random(metric)
        if above.n:
            effects = rows_where(evidence.layer_effects, metric=metric)
            rows.append(
                [
                    metric,
                    f"{above.wins} of {above.n}",
                    number(above.expected, 2),
                    p_value(above.p_value),
                    nats(effects["delta_nll"].median()),
                    nats(effects["random_mean"].median()),
                ]
            )
    if not rows:
        return _differences(evidence)
    return [
        TextTable(
            title="Top weights against random ones",
            columns=["Metric", "Layers above every draw", "By chance", "p", "Median effect", "Median of random means"],
            rows=rows,
            notes=[
                "p: binomial, taking the layers as independent; they share their texts and are so only nearly. Effects "
                "in nats per token, medians over the layers."
            ],
        ),
        *_differences(evidence),
    ]


def _differences(evidence: Evidence) -> list[TextTable]:
    """Each target's top set minus the mean of its random sets, largest difference first."""
    perturbation, k = evidence.setting
    effects = rows_where(evidence.top_against_random, perturbation=perturbation, k=k).dropna(subset=["n_draws"])
    effects = effects.sort_values(["difference", "target_layer", "metric"], ascending=[False, True, True])
    rows = []
    for _, row in effects.iterrows():
        p = p_value(row["p_value"]) if pd.notna(row["p_value"]) else "none: too few draws"
        rows.append(
            [
                "all layers" if row["target_layer"] == layout.ALL else row["target_layer"],
                row["metric"],
                measured(row["difference"], row["difference_low"], row["difference_high"]),
                number(row["n_eff"], 2),
                f"{count(row['n_beaten'])} of {count(row['n_draws'])}",
                p,
            ]
        )
    if not rows:
        return []
    unbounded = effects[["unbounded_share", "control_unbounded_share"]].fillna(0).max()
    notes = [
        "Difference from the mean of the random sets, nats per token, with its 95 % interval over texts and random "
        f"sets; p: rank among the draws, which needs {DRAWS_NEEDED} of them to reach 0.05; draws beaten: those that "
        f"did less damage, seed by seed where the perturbation has seeds. {TEXTS_THAT_DECIDE}"
    ]
    if unbounded.max() > 0:
        shares = f"{coefficient(unbounded.iloc[0])} of the top sets' and {coefficient(unbounded.iloc[1])} of the draws'"
        notes.append(f"Up to {shares} losses of a target are not finite; they count as the largest damage.")
    return [
        TextTable(
            title="By how much more damage than random weights",
            columns=["Target", "Metric", "Difference", "Texts that decide", "Draws beaten", "p"],
            rows=rows,
            n_text=2,
            folded=True,
            notes=notes,
        )
    ]


def curve_heights(evidence: Evidence) -> list[TextTable]:
    """Mean height of the ablation curves, next to random weights; the whole model first."""
    curves = evidence.ablation_curves
    if curves.empty:
        return []
    is_layer = curves["target_layer"] != layout.ALL
    rows = []
    for _, curve in pd.concat([curves[~is_layer], curves[is_layer]]).iterrows():
        rows.append(
            [
                "all layers" if curve["target_layer"] == layout.ALL else curve["target_layer"],
                f"{curve['metric']}, {curve['perturbation']}",
                f"{curve['k_low']} to {curve['k_high']} ({curve['n_k']})",
                nats(curve["area"]),
                nats(curve["area_random"]),
                nats(curve["area_excess"]),
            ]
        )
    return [
        TextTable(
            title="Mean height of each curve",
            columns=["Target", "Metric, perturbation", "k (number)", "Mean height", "Random", "Excess"],
            rows=rows,
            n_text=2,
            folded=len(rows) > N_CURVES_SHOWN,
            notes=[
                "Area under the change of loss against ln k, divided by the width: nats per token, without an interval."
            ],
        )
    ]


def effects_of_weights(evidence: Evidence) -> list[TextTable]:
    """What each single weight did, largest effect first, next to its scores; one table a perturbation."""
    effects = evidence.weight_effects
    if effects.empty:
        return []
    metrics = evidence.sampled_metrics
    tables: list[TextTable] = []
    for perturbation, of_perturbation in effects.groupby("perturbation", sort=False):
        largest = of_perturbation.sort_values("size", ascending=False, kind="stable").head(N_EFFECTS_SHOWN)
        rows = []
        for _, effect in largest.iterrows():
            scores = [number(effect[layout.score_column(metric)]) for metric in metrics]
            rows.append([weight_name(effect), number(effect["value"], 4), loss_change(effect), *scores])
        how_many = f"the {len(rows)} of largest effect among {len(of_perturbation)}"
        tables.append(
            TextTable(
                title=f"{doing_to(str(perturbation))} one weight: {how_many}",
                columns=["Weight", "Value", "Change of loss, nats per token", *(f"Score by {m}" for m in metrics)],
                rows=rows,
                folded=bool(tables),
            )
        )
    return tables
