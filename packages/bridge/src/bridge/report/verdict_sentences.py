"""Does the score predict the effect? The sentences that claim it or do not, for layers and for single weights.

What may be said is decided by ``bridge.analysis.claims`` alone; here it is put into words.
"""

import numpy as np
import pandas as pd

from bridge.analysis.claims import Claim, Verdict, claim_of_row, is_weighted
from bridge.analysis.measured_sets import first_row
from bridge.analysis.metric_comparison import standing_of_row
from bridge.analysis.predicted_and_measured import CURVES, WEIGHTS
from bridge.report.evidence import Evidence
from bridge.report.number_format import coefficient, plural
from bridge.report.phrases import listed, over_measured, rho_above_baseline, rho_with_p, setting_words

MAX_LISTED = 6


def agreement_of_layers(evidence: Evidence) -> str:
    """The rank correlation of score and effect over layers, next to that of the baseline metric."""
    row = first_row(evidence.layer_correlations, metric=evidence.metric)
    return f"{_layers(evidence)}{over_measured(_with_baseline(evidence, row))}."


def verdict_on_layers(evidence: Evidence) -> str:
    """The agreement over layers, and what it shows."""
    sentence = _prefix(evidence, "layers") + _layers(evidence)
    row = first_row(evidence.layer_correlations, metric=evidence.metric)
    if row is None or pd.isna(row["spearman"]):
        return f"{sentence}."
    shown = f"{_shown(row, 'the score orders the layers', 'layers')}{_compared(row, evidence.baseline)}"
    return f"{sentence}: {shown}{over_measured(_with_baseline(evidence, row))}."


def _layers(evidence: Evidence) -> str:
    """The rank correlation over layers and that of the baseline metric, without a full stop."""
    metric, baseline = evidence.metric, evidence.baseline
    own = first_row(evidence.layer_correlations, metric=metric)
    if own is None:
        return "No rank agreement was computed: no top weights of single layers were perturbed"
    if pd.isna(own["spearman"]):
        return f"Spearman's rho for {metric}: none ({own['note']})"
    over = plural(int(own["n"]), "layer")
    if is_weighted(own):
        over = f"all {plural(int(evidence.targets['n_layers'].max()), 'layer')}, estimated from {own['n']} of them"
    sentence = f"Spearman's rho between score and effect over {over}: {metric} {rho_with_p(own)}"
    if metric == baseline:
        return sentence
    other = first_row(evidence.layer_correlations, metric=baseline)
    if other is None:
        return f"{sentence}; {baseline} was not measured"
    other_rho = "none" if pd.isna(other["spearman"]) else rho_with_p(other)
    return f"{sentence}; {baseline} {other_rho}"


def _with_baseline(evidence: Evidence, row: pd.Series | None) -> list[pd.Series]:
    """A row of the layers that has a rho, and that of the baseline metric if it has one."""
    other = first_row(evidence.layer_correlations, metric=evidence.baseline)
    rows = [row] if evidence.metric == evidence.baseline else [row, other]
    return [each for each in rows if each is not None and pd.notna(each["spearman"])]


def agreement_of_single_weights(evidence: Evidence) -> list[str]:
    """How well the metric of the sentences ranks single weights, and how the others do; nothing if none were."""
    rows = evidence.weight_correlations
    if rows.empty:
        return []
    n_weights = plural(int(rows["n"].max()), "single weight")
    ranked = {str(row["metric"]): row for _, row in rows.dropna(subset=["spearman"]).iterrows()}
    if not ranked:
        return [f"Over {n_weights} no metric has a rank correlation ({rows.iloc[0]['note']})."]
    metric = evidence.metric if evidence.metric in ranked else next(iter(ranked))
    row = ranked[metric]
    over = f"all weights of the model, estimated from {n_weights}" if is_weighted(row) else n_weights
    sentence = f"{_prefix(evidence, WEIGHTS)}Over {over}, Spearman's rho between score and size of the effect: "
    sentence += f"{metric} {rho_with_p(row)}"
    others = [other for other in ranked if other != metric]
    shown_rows = [row]
    if others:
        other = ranked[evidence.baseline if evidence.baseline in others else others[0]]
        shown_rows.append(other)
        sentence += f"; {other['metric']} {rho_with_p(other)}"
    sentence += f": {_shown(row, f'{metric} ranks the weights', 'weights')}{_compared(row, evidence.baseline)}"
    if not others:
        sentence += "; no other metric has a rho on them"
    return [f"{sentence}{over_measured(shown_rows)}."]


def exploratory(evidence: Evidence) -> list[str]:
    """What the analyses that were not named beforehand show, as one family; nothing where there are none."""
    rows = evidence.exploratory.dropna(subset=["p_adjusted"])
    if rows.empty:
        return []
    words = []
    for verdict in (Verdict.BETTER, Verdict.WRONG_WAY):
        names = [_name_of_row(row) for _, row in rows.iterrows() if claim_of_row(row).verdict is verdict]
        more = [f"{len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
        if names:
            words.append(f"{verdict}: {listed(names[:MAX_LISTED] + more)}")
    family = f"Exploratory, one false-discovery family of {len(rows)}"
    return [f"{family}: {'; '.join(words) or _nothing_shown(rows)}."]


def _nothing_shown(rows: pd.DataFrame) -> str:
    """That no row shows anything, with the smallest rho that any of them would have shown."""
    claims = [claim_of_row(row) for _, row in rows.iterrows()]
    most_sensitive = min(claims, key=lambda claim: np.nan_to_num(claim.detectable, nan=np.inf))
    return f"no agreement is shown ({detectable_words(most_sensitive, 'units')})"


def _prefix(evidence: Evidence, unit: str) -> str:
    primary = evidence.primary
    if primary is None or primary["unit"] != unit:
        return ""
    return f"Primary analysis, named before anything was measured ({setting_words(primary)}): "


def _name_of_row(row: pd.Series) -> str:
    unit = "ablation curves" if row["unit"] == CURVES else row["unit"]
    return f"{row['metric']} over {unit} ({row['perturbation']}, k = {row['k']})"


def _shown(row: pd.Series, who: str, units: str) -> str:
    """What a row of CORRELATIONS shows; ``who`` orders the units."""
    claim = claim_of_row(row)
    if claim.verdict in (Verdict.BETTER, Verdict.WRONG_WAY):
        return f"{who} {claim.verdict}"
    if claim.verdict is Verdict.ABSENT:
        return f"there is no agreement beyond ±{coefficient(claim.margin)}, within which the interval lies"
    return f"no agreement is shown ({detectable_words(claim, units)})"


def detectable_words(claim: Claim, units: str) -> str:
    """The smallest effect that would have been seen."""
    if np.isnan(claim.detectable):
        return f"too few {units} to tell"
    return f"with 80 % power a rho of {coefficient(claim.detectable)} would have been"


def _compared(row: pd.Series, baseline: str) -> str:
    """What the comparison with every other metric shows; that a metric is above others only if it agrees at all."""
    stands = standing_of_row(row)
    parts = []
    if claim_of_row(row).verdict is Verdict.BETTER:
        if stands.is_best:
            parts.append(f"it is the best of {len(stands.above) + 1} metrics")
        if stands.above:
            parts.append(f"it is above {listed(stands.above)}")
    if stands.below:
        parts.append(f"it is below {listed(stands.below)}")
    if stands.not_told_apart:
        parts.append(f"it is not told apart from {listed(stands.not_told_apart)}")
    if pd.notna(row["above_magnitude"]):
        parts.append(f"difference from {baseline} {rho_above_baseline(row)}")
    return "".join(f"; {part}" for part in parts)
