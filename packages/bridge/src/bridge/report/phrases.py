"""Phrases that the sentences and the tables of a report share."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bridge.analysis.claims import MEASURED, POPULATION, WITHIN_KINDS, Basis, is_weighted
from bridge.analysis.predicted_and_measured import WEIGHTS
from bridge.report.evidence import Evidence
from bridge.report.number_format import measured, p_value, plural, rho

DRAWS_NEEDED = 19  # the fewest with which the p-value of one target can reach 0.05
_DOING = {"zero": "Zeroing", "sign_flip": "Flipping the sign of"}


def doing_to(perturbation: str) -> str:
    """How a sentence begins that tells of a perturbation."""
    return _DOING.get(perturbation, f"Applying {perturbation} to")


def weight_name(weight: pd.Series) -> str:
    """``parameter[row, col]``, or ``parameter[row]`` of a vector."""
    position = str(int(weight["row"]))
    if pd.notna(weight["col"]):
        position += f", {int(weight['col'])}"
    return f"{weight['parameter']}[{position}]"


def loss_change(row: pd.Series) -> str:
    """A measured change of loss and its interval: ``+1.2 [1.1, 1.3]``."""
    return measured(row["delta_nll"], row["ci_low"], row["ci_high"])


def loss_change_in_words(row: pd.Series) -> str:
    """``loss +1.2 [1.1, 1.3] nats per token``."""
    if not np.isfinite(row["delta_nll"]):
        return "its loss is infinite or undefined"
    return f"loss {loss_change(row)} nats per token"


def perplexity_after(row: pd.Series) -> str:
    """The perturbed perplexity, with its interval over texts where the measurements have one.

    That of the change of loss would not do: the texts decide the loss before the change as well.
    """
    low, high = row.get("perturbed_ppl_low", np.nan), row.get("perturbed_ppl_high", np.nan)
    return measured(row["perturbed_ppl"], low, high, signed=False)


def rho_with_p(row: pd.Series) -> str:
    """A rank correlation with its interval and the p-value that a claim goes by.

    ``0.90 [0.74, 0.97], p = 0.0002``; over layers of several kinds ``0.90 [0.74, 0.97] (within kinds of matrix 0.85
    [0.70, 0.94], p = 0.0004)``. Every p-value but that of the primary analysis is adjusted, and called so. Where units
    were chosen with different probabilities it is the estimate for all of them; where every layer was measured, the
    interval is that over texts, and called so.
    """
    name = "p" if row["primary"] else "adjusted p"
    p = "" if pd.isna(row["p_adjusted"]) else f", {name} = {p_value(row['p_adjusted'])}"
    if is_weighted(row):
        over_all = rho_of(row, POPULATION)
    elif pd.notna(row["texts_low"]):
        over_all = f"{rho(row['spearman'], row['texts_low'], row['texts_high'])} over other texts of the same kind"
    else:
        over_all = rho_of(row, MEASURED)
    if row["n_kinds"] == 1:
        return f"{over_all}{p}"
    if pd.isna(row["within_rho"]):
        return f"{over_all} (none within kinds of matrix)"
    return f"{over_all} (within kinds of matrix {rho_of(row, WITHIN_KINDS)}{p})"


def rho_of(row: pd.Series, basis: Basis) -> str:
    """One of the rank correlations in a row of CORRELATIONS, with its interval."""
    return rho(row[basis.rho], row[basis.low], row[basis.high])


def over_measured(rows: Sequence[pd.Series]) -> str:
    """What rho is over the measured units as they were chosen, for metrics whose rho is given for all units."""
    shown = [row for row in rows if is_weighted(row)]
    if not shown:
        return ""
    units = "weights that were drawn" if shown[0]["unit"] == WEIGHTS else "layers that were chosen"
    rhos = listed([f"{row['metric']} {rho_of(row, MEASURED)}" for row in shown])
    return f"; over the {shown[0]['n']:,} {units}, in which high scores are frequent: {rhos}"


def top_minus_random(row: pd.Series) -> str:
    """A row of ``analysis.top_against_random`` that was compared: the difference, its interval, and p or why none."""
    if np.isfinite(row["difference"]):
        words = f"{measured(row['difference'], row['difference_low'], row['difference_high'])} more than their mean"
    else:
        words = "a loss is not finite, no difference from the random sets"
    if pd.notna(row["p_value"]):
        return f"{words}, p = {p_value(row['p_value'])}"
    return f"{words} (no p: {plural(int(row['n_draws']), 'draw')}, {DRAWS_NEEDED} are needed)"


def setting_words(row: pd.Series) -> str:
    """Metric, perturbation and k of a row of CORRELATIONS: ``obd, zero, k = 100``."""
    return f"{row['metric']}, {row['perturbation']}, k = {row['k']}"


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def rho_above_baseline(row: pd.Series) -> str:
    """How far a rho is above that of the baseline metric: ``0.75 [0.59, 0.90]``."""
    return rho(row["above_magnitude"], row["above_low"], row["above_high"])


def measured_on(evidence: Evidence) -> str:
    """Which texts the effects were measured on, for titles and captions."""
    if evidence.judged_by_other_texts:
        return f"measured on other texts than gave the scores ({evidence.measured_corpus.get('source', 'unknown')})"
    return "measured on the texts that gave the scores"
