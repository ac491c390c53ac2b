"""Tables of scores: their agreement with the effects, and the weights that rank highest."""

import pandas as pd

from bridge.analysis.claims import MEASURED, POPULATION, WITHIN_KINDS, Verdict, claim_of_row
from bridge.analysis.measured_sets import rows_where
from bridge.analysis.metric_comparison import standing_of_row
from bridge.analysis.predicted_and_measured import CURVES
from bridge.report.evidence import Evidence
from bridge.report.number_format import DASH, coefficient, count, measured, number, p_value, rho
from bridge.report.phrases import rho_above_baseline, rho_of, weight_name
from bridge.report.text_table import TextTable

N_WEIGHTS_SHOWN = 10
OVER_TEXTS = "*"  # marks an interval over texts


def correlations(evidence: Evidence) -> list[TextTable]:
    """Rank agreement of score and effect."""
    table = evidence.correlations
    if table.empty:
        return []
    baseline = evidence.baseline
    columns = ["Unit", "Metric", "Setting", "n", "Spearman's ρ", "ρ within kinds", "Adjusted p", "Shown"]
    columns += ["Would have been shown", f"ρ minus {baseline}'s", "Above", "τ-b", "Weighted τ", "RBO"]
    columns += ["Precision (chance)"]
    n_exploratory = int(evidence.exploratory["p_adjusted"].notna().sum())
    explanation = [
        "ρ and its 95 % bootstrap interval over the measured units, or where every layer was measured "
        f"({OVER_TEXTS}) over other texts of the same kind",
        "within kinds: ρ given the kind of matrix and the depth, which the claim goes by; units that were chosen with "
        "different probabilities count 1 / probability times, and without kinds the claim goes by the estimate for all "
        "of the next table",
        "p by permutation (within kinds), two-sided; that of the primary analysis is its own, all others are adjusted "
        f"as one false-discovery family of {n_exploratory} (Benjamini–Hochberg)",
        "would have been shown: the smallest ρ that 80 % of such studies show",
        f"ρ minus {baseline}'s over the same units",
        "above: other metrics that this one is shown to be above, all pairs of a setting compared together (Holm)",
        "RBO: rank-biased overlap, persistence 0.9",
        "precision: share of the units predicted highest that are among as many of largest effect, and what chance "
        "gives; both averaged over ties",
    ]
    return [
        TextTable(
            title="Agreement of score and effect",
            columns=columns,
            rows=[_correlation_cells(row) for _, row in _primary_first(table).iterrows()],
            n_text=3,
            notes=[f"{'; '.join(explanation)}.", *_notes(table)],
        )
    ]


def estimates_for_all(evidence: Evidence) -> list[TextTable]:
    """What the measured layers and weights say of all: agreement, overlap of the highest, calibration."""
    table = _primary_first(evidence.correlations)
    table = table[table["population_rho"].notna() & (table["unit"] != CURVES)]
    if table.empty:
        return []
    share = f"{100 * table['population_share'].iloc[0]:.3g} %"
    explanation = [
        "each measured layer or weight counts 1 / (its probability of being measured) times",
        "effective n: how many equally probable ones would tell as much",
        "ρ and its 95 % interval over samples; none where all were measured",
        f"overlap: part of the {share} of largest effects that is among the {share} of highest scores, and what chance "
        "gives",
        "calibration: total effect (of single weights: total size of the effects) / total score, where weights are "
        "zeroed and a score is in nats per token; 1 is the right size",
    ]
    return [
        TextTable(
            title="Estimates for all layers and weights of the model",
            columns=["Unit", "Metric", "Setting", "n", "Effective n", "ρ", "Overlap (chance)", "Calibration"],
            rows=[_estimate_cells(row, evidence) for _, row in table.iterrows()],
            n_text=3,
            notes=[f"{'; '.join(explanation)}."],
        )
    ]


def _estimate_cells(row: pd.Series, evidence: Evidence) -> list[str]:
    calibration = DASH
    if row["perturbation"] == "zero" and evidence.definitions[row["metric"]].estimates_loss_change:
        calibration = measured(row["population_ratio"], row["ratio_low"], row["ratio_high"], signed=False)
    overlap = rho(row["population_precision"], row["precision_low"], row["precision_high"])
    return [
        _unit(row),
        row["metric"],
        f"{row['perturbation']}, k = {row['k']}",
        count(row["n"]),
        number(row["n_effective"]),
        rho_of(row, POPULATION),
        f"{overlap} ({coefficient(row['population_share'])})",
        calibration,
    ]


def _primary_first(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values("primary", ascending=False, kind="stable")


def _correlation_cells(row: pd.Series) -> list[str]:
    """A row of CORRELATIONS as text."""
    claim, stands = claim_of_row(row), standing_of_row(row)
    shown = f"{claim.verdict} (±{coefficient(claim.margin)})" if claim.verdict is Verdict.ABSENT else claim.verdict
    return [
        f"{_unit(row)}, primary" if row["primary"] else _unit(row),
        row["metric"],
        f"{row['perturbation']}, k = {row['k']}",
        count(row["n"]),
        _rho_of_measured(row),
        rho_of(row, WITHIN_KINDS),
        p_value(row["p_adjusted"]),
        str(shown),
        coefficient(claim.detectable),
        rho_above_baseline(row),
        ", ".join(stands.above) or DASH,
        coefficient(row["kendall_tau_b"]),
        coefficient(row["weighted_tau"]),
        coefficient(row["rbo"]),
        _precision(row),
    ]


def _rho_of_measured(row: pd.Series) -> str:
    """Rho over the measured units; where these are all layers, with its interval over texts."""
    if pd.notna(row["texts_low"]):
        return f"{rho(row['spearman'], row['texts_low'], row['texts_high'])}{OVER_TEXTS}"
    return rho_of(row, MEASURED)


def _unit(row: pd.Series) -> str:
    return str(row["unit"]).replace("_", " ")


def _precision(row: pd.Series) -> str:
    """The precision among the top n, and in parentheses what chance gives."""
    if pd.isna(row["precision_at_n"]) or not row["n"]:
        return DASH
    by_chance = coefficient(row["top_n"] / row["n"])
    return f"top {row['top_n']}: {coefficient(row['precision_at_n'])} ({by_chance})"


def _notes(table: pd.DataFrame) -> list[str]:
    """Each note of CORRELATIONS once, with the rows that it belongs to."""
    rows_of_note: dict[str, list[int]] = {}
    for position, notes in enumerate(table["note"].fillna("")):
        for note in filter(None, str(notes).split("; ")):
            rows_of_note.setdefault(note, []).append(position)
    return [f"{_names_of_rows(table, indices)}: {note}." for note, indices in rows_of_note.items()]


def _names_of_rows(table: pd.DataFrame, indices: list[int]) -> str:
    """Words for some rows of CORRELATIONS: all of them, whole units, then single rows."""
    if len(indices) == len(table):
        return "All rows"
    rows = table.iloc[indices]
    names = []
    whole_units = []
    for unit, of_unit in rows.groupby("unit", sort=False):
        if len(of_unit) == len(rows_where(table, unit=unit)):
            whole_units.append(unit)
            names.append(_unit(of_unit.iloc[0]))
    for _, row in rows[~rows["unit"].isin(whole_units)].iterrows():
        names.append(f"{_unit(row)} by {row['metric']}, k = {row['k']}")
    text = "; ".join(names)
    return text[0].upper() + text[1:]


def top_weights(evidence: Evidence) -> list[TextTable]:
    """The first weights of each metric's global ranking; the first table open."""
    tables: list[TextTable] = []
    for metric, weights in evidence.top_weights.items():
        rows = []
        for _, weight in weights.sort_values("rank").head(N_WEIGHTS_SHOWN).iterrows():
            value, score = number(weight["value"], 4), number(weight["score"], 4)
            rows.append([weight_name(weight), count(weight["rank"]), value, score])
        tables.append(
            TextTable(
                title=f"The first {len(rows)} of {len(weights)} weights by {metric}",
                columns=["Weight", "Rank", "Value", "Score"],
                rows=rows,
                folded=bool(tables),
            )
        )
    return tables
