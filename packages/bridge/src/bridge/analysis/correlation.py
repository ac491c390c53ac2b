"""Does the predicted criticality agree with the measured effect? The correlations table from the measurements.

Each row names its unit: ``layers`` (the score of a layer's perturbed weights against what perturbing them did),
``weights`` (single weights, all metrics on the same ones), ``ablation_curve`` (layers again, over all K at once).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from bridge.analysis.bootstrap import N_RESAMPLES
from bridge.analysis.claims import adjusted_p_values, basis_of_claim
from bridge.analysis.measured_sets import text_effects
from bridge.analysis.metric_comparison import Difference, compare_metrics, standing
from bridge.analysis.population_estimates import estimate_population
from bridge.analysis.predicted_and_measured import LAYERS, Comparison, comparisons, unequal_weights
from bridge.analysis.primary_analysis import Primary, primary_analysis
from bridge.analysis.rank_agreement import agreement
from bridge.analysis.rho_over_texts import rho_over_texts
from bridge.analysis.targets import RANGE_NOTE, is_restricted
from bridge.analysis.weighted_rho import WeightedRho, weighted_rho
from bridge.analysis.within_kinds import kind_and_depth, within_kinds
from bridge.exchange import layout
from bridge.exchange.recorded_metrics import DEFAULT_BASELINE
from bridge.exchange.tables import CORRELATIONS, write_table
from bridge.exchange.validation_run import Validation

NOT_WITHIN_KINDS = "kind and depth tell the layers apart so far that nothing is left to compare within kinds"


def correlate(
    measurements: pd.DataFrame,
    seed: int = 0,
    targets: pd.DataFrame | None = None,
    sampled: pd.DataFrame | None = None,
    baseline: str = DEFAULT_BASELINE,
    primary: Primary | None = None,
    losses: pd.DataFrame | None = None,
    n_resamples: int = N_RESAMPLES,
    single_weights: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Rank agreement of prediction and effect, one row per unit, metric, perturbation and k.

    For layers the prediction is ``score_sum``, the effect ``delta_nll`` (the mean over seeds where a perturbation is
    random). The target ALL is no layer and is left out. For single weights the prediction is the score of that weight
    by each metric, the effect abs(``delta_nll``): a score is the size of a change, and taking one weight away may as
    well lower the loss.

    Over layers of several kinds of matrix ``within_rho`` is the agreement given kind and depth, ``within_p`` its
    p-value by shuffles within kinds. Units that were chosen with different probabilities (single weights; layers, where
    some were certain) count 1 / inclusion times there, in the ``population_`` columns and where metrics are compared;
    the other columns are of the measured units as they are. ``p_adjusted`` is the p-value that a claim goes by
    (``claims.basis_of_claim``), adjusted for the whole table as one family (Benjamini & Hochberg 1995); the primary
    analysis stands outside it and keeps its own. ``above_magnitude`` is rho (given kind and depth) minus that of the
    baseline metric over the same units; ``above``, ``below`` and ``not_told_apart`` name the other metrics by what all
    pairs, compared together, show.

    >>> import bridge
    >>> validation = bridge.load_validation("outputs")
    >>> bridge.correlate(validation.measurements(), targets=validation.targets())["n"].tolist()
    [7, 7]

    Args:
        measurements: a table of MEASUREMENTS.
        seed: of the bootstrap and the permutations.
        targets: a table of TARGETS, with the probability of each layer; where they restrict the range, the note says
            so.
        sampled: a table of SAMPLED_WEIGHTS; without it there are no rows of the unit weights.
        baseline: the metric that every other must beat.
        primary: the analysis that was named before anything was measured; without one all rows are exploratory.
        losses: the losses of every measurement on each text (columns as in ``text_effects``); where all layers were
            measured, ``texts_low`` and ``texts_high`` are then the interval of rho over texts.
        n_resamples: of the bootstrap and the permutations each.
        single_weights: a table of SINGLE_WEIGHTS; with it there are estimates for all weights of the model.

    Returns:
        A table of CORRELATIONS; an estimate that is not available is empty, and its note says why.
    """
    restricted = targets is not None and is_restricted(targets)
    all_measured = targets is not None and len(targets) > 0 and bool((targets["n_layers"] <= len(targets)).all())
    compared = list(comparisons(measurements, sampled, targets, single_weights))
    rows = []
    for comparison in compared:
        row = _row(comparison, seed, n_resamples)
        key = (comparison.unit, comparison.metric, comparison.perturbation, comparison.k)
        row["primary"] = int(primary is not None and primary.is_row(*key))
        if restricted and comparison.units == LAYERS:
            row["note"] = "; ".join(filter(None, [row["note"], RANGE_NOTE]))
        if losses is not None and all_measured and comparison.unit == LAYERS:
            row |= _over_texts(comparison, losses)
        rows.append(row)
    for setting in dict.fromkeys(comparison.setting for comparison in compared):
        together = [at for at, comparison in enumerate(compared) if comparison.setting == setting]
        differences = _differences([compared[at] for at in together])
        for at in together:
            rows[at] |= _standing(differences, compared[at].metric, baseline)
    return _with_adjusted_p(pd.DataFrame(rows, columns=list(CORRELATIONS.columns)))


def write_correlations(validation: Validation, seed: int = 0) -> pd.DataFrame:
    """Compute ``correlations.csv`` of a validation from its measurements, write it and return the table."""
    baseline = validation.discovery.baseline_metric
    table = correlate(
        validation.measurements(),
        seed,
        validation.targets(),
        validation.sampled(),
        baseline,
        primary_analysis(validation.options, baseline),
        losses=validation.sequence_losses(),
        single_weights=validation.single_weights(),
    )
    write_table(validation.folder / layout.CORRELATIONS_FILE, table, CORRELATIONS)
    return table


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


def _row(comparison: Comparison, seed: int, n_resamples: int) -> dict[str, Any]:
    """A row of CORRELATIONS but for what depends on the other rows."""
    result = agreement(
        comparison.points["score_sum"].to_numpy(float),
        comparison.points["delta_nll"].to_numpy(float),
        _generator(seed, comparison.purpose),
        comparison.units,
        n_resamples,
    )
    row: dict[str, Any] = {
        "unit": comparison.unit,
        "metric": comparison.metric,
        "perturbation": comparison.perturbation,
        "k": comparison.k,
        "n_kinds": 1,
        "n_fitted": 1,
    }
    row |= result._asdict()
    row |= estimate_population(comparison.scored)._asdict()
    notes = [result.note, comparison.note]
    kinds = comparison.kinds
    if kinds is not None and not np.isnan(result.spearman):
        x, y = comparison.scored["score_sum"].to_numpy(), comparison.scored["delta_nll"].to_numpy()
        rng = _generator(seed, f"within kinds/{comparison.purpose}")
        within = within_kinds(x, y, kinds, comparison.depths, rng, comparison.weights, n_resamples)
        row |= {"n_kinds": len(set(kinds)), "n_fitted": within.result.n_fitted, "within_p": within.p_value}
        row |= {"within_rho": within.result.rho}
        row |= {"within_low": within.interval.low, "within_high": within.interval.high}
        if np.isnan(within.result.rho):
            notes.append(NOT_WITHIN_KINDS)
    row["note"] = "; ".join(filter(None, notes))
    return row


def _over_texts(comparison: Comparison, losses: pd.DataFrame) -> dict[str, float]:
    """Interval of rho over texts; empty where the losses are not of all layers and texts."""
    selection = layout.top_label(comparison.metric)
    effects, n_tokens = text_effects(losses, selection, comparison.perturbation, comparison.k)
    layers = comparison.scored.index
    if not set(layers) <= set(effects.index):
        return {}
    values = effects.loc[layers].to_numpy(float)
    _, low, high = rho_over_texts(comparison.scored["score_sum"].to_numpy(), values, n_tokens)
    return {"texts_low": low, "texts_high": high}


def _differences(compared: Sequence[Comparison]) -> list[Difference]:
    """All pairs of metrics over the units that every one of them has a score and an effect of.

    A metric that has no rho (no units, equal scores) is compared with none; its pairs have no p-value.
    """
    shared = compared[0].scored.index
    for other in compared[1:]:
        shared = shared.intersection(other.scored.index)
    if len(shared) == 0:
        return []
    rhos: dict[str, WeightedRho] = {}
    weights = unequal_weights(compared[0].scored.loc[shared, "inclusion"])
    for comparison in compared:
        points = comparison.scored.loc[shared]
        covariates = None
        if comparison.kinds is not None:
            at = comparison.scored.index.get_indexer(shared)
            kinds, depths = comparison.kinds, comparison.depths
            covariates = kind_and_depth([kinds[i] for i in at], [depths[i] for i in at])
        x, y = points["score_sum"].to_numpy(), points["delta_nll"].to_numpy()
        rhos[comparison.metric] = weighted_rho(x, y, weights, covariates)
    return compare_metrics(rhos, weights)


def _standing(differences: Sequence[Difference], metric: str, baseline: str) -> dict[str, Any]:
    """Columns on where a metric stands among the others of its setting."""
    stands = standing(list(differences), metric)
    row: dict[str, Any] = {
        "above": " ".join(sorted(stands.above)),
        "below": " ".join(sorted(stands.below)),
        "not_told_apart": " ".join(sorted(stands.not_told_apart)),
    }
    for pair in differences:
        if {pair.first, pair.second} == {metric, baseline}:
            ends = [pair.low, pair.high] if pair.first == metric else [-pair.high, -pair.low]
            row["above_magnitude"] = pair.difference if pair.first == metric else -pair.difference
            row |= {"above_low": ends[0], "above_high": ends[1]}
    return row


def _with_adjusted_p(table: pd.DataFrame) -> pd.DataFrame:
    """``p_adjusted`` over the whole table, and how many p-values its family has."""
    p_values = np.array([row[basis_of_claim(row).p_value] for _, row in table.iterrows()], dtype=float)
    primary = table["primary"].to_numpy(bool)
    table["p_adjusted"] = adjusted_p_values(p_values, primary)
    n_exploratory = int((~np.isnan(p_values) & ~primary).sum())
    table["n_tests"] = np.where(primary, 1, n_exploratory)
    return table
