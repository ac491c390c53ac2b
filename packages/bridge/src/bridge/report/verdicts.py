"""Does the score predict the effect? The sentences that claim it or do not, for layers and for single weights."""

import pandas as pd

from bridge.report.evidence import Evidence
from bridge.report.number_format import plural
from bridge.report.phrases import rho_above_baseline, rho_with_p


def agreement_of_layers(evidence: Evidence) -> str:
    """The rank correlation of score and effect over layers, next to that of the baseline metric."""
    metric, baseline = evidence.metric, evidence.baseline
    rows = evidence.layer_correlations.set_index("metric")
    if metric not in rows.index:
        return "No rank agreement was computed: no top weights of single layers were perturbed."
    best = rows.loc[metric]
    if pd.isna(best["spearman"]):
        return f"Spearman's rho for {metric}: none ({best['note']})."
    n_layers = plural(int(best["n"]), "layer")
    sentence = f"Spearman's rho between score and effect over {n_layers}: {metric} {rho_with_p(best)}"
    if metric == baseline:
        return f"{sentence}."
    if baseline not in rows.index:
        return f"{sentence}; {baseline} was not measured."
    other = rows.loc[baseline]
    other_rho = "none" if pd.isna(other["spearman"]) else rho_with_p(other)
    return f"{sentence}; {baseline} {other_rho}."


def verdict_on_layers(evidence: Evidence) -> str:
    """The agreement over layers, and what it shows."""
    sentence = agreement_of_layers(evidence).rstrip(".")
    rows = evidence.layer_correlations.set_index("metric")
    if evidence.metric not in rows.index or pd.isna(rows.loc[evidence.metric, "spearman"]):
        return f"{sentence}."
    row = rows.loc[evidence.metric]
    if pd.isna(row["above_magnitude"]):
        return f"{sentence}: {_claim(row)}."
    difference = f"difference {rho_above_baseline(row)}"
    return f"{sentence}: {_claim(row)}, and it is {_comparison(row)} {evidence.baseline} ({difference})."


def _claim(row: pd.Series) -> str:
    """What the interval of a rho shows."""
    if row["ci_low"] > 0:
        return "the score orders the layers better than chance"
    if row["ci_high"] < 0:
        return "the score orders the layers the wrong way round"
    return "no agreement is shown"


def _comparison(row: pd.Series) -> str:
    """What the interval of the difference from the baseline's rho shows."""
    if row["above_low"] > 0:
        return "above"
    if row["above_high"] < 0:
        return "below"
    return "not clearly different from"


def agreement_of_single_weights(evidence: Evidence) -> list[str]:
    """Which metric ranks single weights best, and how the baseline does on the same ones; nothing if none were."""
    rows = evidence.weight_correlations
    if rows.empty:
        return []
    n_weights = plural(int(rows["n"].max()), "single weight")
    ranked = rows.dropna(subset=["spearman"]).set_index("metric").sort_values("spearman", ascending=False)
    if ranked.empty:
        return [f"Over {n_weights} no metric has a rank correlation ({rows.iloc[0]['note']})."]
    best, row = ranked.index[0], ranked.iloc[0]
    claim = "ranks the size of the effect best" if row["ci_low"] > 0 else "is not shown to rank the effect"
    sentence = f"Over {n_weights}, {best} {claim}: Spearman's rho {rho_with_p(row)}"
    others = list(ranked.index[1:])
    if len(rows) == 1:
        return [f"{sentence}; no other metric was scored on them."]
    if not others:
        return [f"{sentence}; no other has a rho."]
    other = evidence.baseline if evidence.baseline in others else others[0]
    sentence = f"{sentence}; {other} {rho_with_p(ranked.loc[other])}"
    if pd.isna(row["above_magnitude"]):
        return [f"{sentence}."]
    return [f"{sentence} (difference {rho_above_baseline(row)})."]
