"""Does the predicted criticality agree with the measured effect? The correlations table from the measurements.

Each row names its unit: ``layers`` (the score of a layer's perturbed weights against what perturbing them did),
``weights`` (single weights, all metrics on the same ones), ``ablation_curve`` (layers again, over all K at once).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from bridge.analysis.ablation_curves import curves_of_layers
from bridge.analysis.measured_sets import SETTING, rows_where, single_layers, top_sets
from bridge.analysis.population_estimates import with_population_estimates
from bridge.analysis.rank_agreement import MIN_UNITS, agreement
from bridge.analysis.single_weights import weight_effects
from bridge.analysis.spearman import rho_difference
from bridge.analysis.targets import RANGE_NOTE, is_restricted
from bridge.exchange import layout
from bridge.exchange.metric_definitions import DEFAULT_BASELINE, read_metric_definitions
from bridge.exchange.tables import CORRELATIONS, write_table
from bridge.exchange.validation_run import Validation


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Prediction and effect of the same units, by one metric under one perturbation.

    Attributes:
        unit: ``layers``, ``weights`` or ``ablation_curve``.
        metric: whose scores predict.
        perturbation: what was done to the weights.
        k: how many weights were perturbed; of an ablation curve the largest number.
        points: one row a unit, with the columns ``score_sum`` (prediction) and ``delta_nll`` (effect).
        note: what the points are, or empty.
    """

    unit: str
    metric: str
    perturbation: str
    k: int
    points: pd.DataFrame
    note: str = ""

    @property
    def purpose(self) -> str:
        """What the random numbers are for; the results of one comparison do not depend on the others."""
        return f"correlation/{self.unit}/{self.metric}/{self.perturbation}/{self.k}"

    def is_same_but_metric(self, other: "_Comparison") -> bool:
        """Whether two comparisons are of the same unit, perturbation and k."""
        return (self.unit, self.perturbation, self.k) == (other.unit, other.perturbation, other.k)


def correlate(
    measurements: pd.DataFrame,
    seed: int = 0,
    targets: pd.DataFrame | None = None,
    sampled: pd.DataFrame | None = None,
    baseline: str = DEFAULT_BASELINE,
    single_weights: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Rank agreement of prediction and effect, one row per unit, metric, perturbation and k.

    For layers the prediction is ``score_sum``, the effect ``delta_nll`` (the mean over seeds where a
    perturbation is random). The target ALL is no layer and is left out. For single weights the prediction is
    the score of that weight by each metric, the effect abs(``delta_nll``): a score is the size of a change, and
    taking one weight away may as well lower the loss. ``p_adjusted`` controls the false discovery rate over
    the metrics that share unit, perturbation and k (Benjamini & Hochberg 1995). ``above_magnitude`` is rho minus that
    of the baseline metric over the same units, with the paired bootstrap interval.

    >>> import bridge
    >>> validation = bridge.load_validation("outputs")
    >>> bridge.correlate(validation.measurements(), targets=validation.targets())["n"].tolist()
    [7, 7]

    Args:
        measurements: a table of MEASUREMENTS.
        seed: of the bootstrap and the permutations.
        targets: a table of TARGETS; where they restrict the range, the note says so.
        sampled: a table of SAMPLED_WEIGHTS; without it there are no rows of the unit weights.
        baseline: the metric that every other must beat.
        single_weights: a table of SINGLE_WEIGHTS; with it there are estimates for all weights of the model.

    Returns:
        A table of CORRELATIONS; an estimate that is not available is empty, and its note says why.
    """
    restricted = targets is not None and is_restricted(targets)
    comparisons = list(_comparisons(measurements, sampled))
    rows = []
    for comparison in comparisons:
        units = "weights" if comparison.unit == "weights" else "layers"
        result = agreement(
            comparison.points["score_sum"].to_numpy(float),
            comparison.points["delta_nll"].to_numpy(float),
            _generator(seed, comparison.purpose),
            units,
        )
        notes = [result.note, comparison.note]
        if restricted and units == "layers":
            notes.append(RANGE_NOTE)
        row = {
            "unit": comparison.unit,
            "metric": comparison.metric,
            "perturbation": comparison.perturbation,
            "k": comparison.k,
        }
        row |= result._asdict()
        row["note"] = "; ".join(filter(None, notes))
        for other in comparisons:
            if other.metric == baseline and other is not comparison and comparison.is_same_but_metric(other):
                row |= _above(comparison.points, other.points, _generator(seed, f"difference/{comparison.purpose}"))
        rows.append(row)
    table = _with_adjusted_p(pd.DataFrame(rows, columns=list(CORRELATIONS.columns)))
    return with_population_estimates(table, measurements, targets, sampled, single_weights)


def write_correlations(validation: Validation, seed: int = 0) -> pd.DataFrame:
    """Compute ``correlations.csv`` of a validation from its measurements, write it and return the table."""
    baseline = read_metric_definitions(validation.discovery.manifest).baseline
    table = correlate(
        validation.measurements(),
        seed,
        validation.targets(),
        validation.sampled(),
        baseline,
        single_weights=validation.single_weights(),
    )
    write_table(validation.folder / layout.CORRELATIONS_FILE, table, CORRELATIONS)
    return table


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


def _comparisons(measurements: pd.DataFrame, sampled: pd.DataFrame | None) -> Iterator[_Comparison]:
    """All comparisons of prediction and effect that the measurements allow."""
    tops = top_sets(measurements)
    for (metric, perturbation, k), sets in tops.groupby(SETTING, sort=False):
        points = single_layers(sets).groupby("target_layer", sort=False)[["score_sum", "delta_nll"]].mean()
        yield _Comparison(unit="layers", metric=metric, perturbation=perturbation, k=k, points=points)
    effects = weight_effects(measurements, sampled)
    if sampled is not None and len(effects):
        for perturbation in effects["perturbation"].unique():
            rows = rows_where(effects, perturbation=perturbation)
            for metric in layout.metrics_of_columns(sampled):
                points = pd.DataFrame({"score_sum": rows[layout.score_column(metric)], "delta_nll": rows["size"]})
                yield _Comparison(unit="weights", metric=metric, perturbation=perturbation, k=1, points=points)
    for (metric, perturbation), sets in tops.groupby(["metric", "perturbation"], sort=False):
        points, ks = curves_of_layers(sets)
        if len(points):
            yield _Comparison(
                unit="ablation_curve",
                metric=metric,
                perturbation=perturbation,
                k=int(sets["k"].max()),
                points=points,
                note=f"mean height of the curve over log k, k = {', '.join(map(str, ks))}",
            )


def _above(points: pd.DataFrame, baseline: pd.DataFrame, rng: np.random.Generator) -> dict[str, float]:
    """By how much a rho is above the baseline's over the units that both hold; empty where either has no rho."""
    points, baseline = points.dropna(), baseline.dropna()
    shared = points.index.intersection(baseline.index, sort=False)
    first = points.loc[shared].to_numpy(float).T  # (2, n): prediction and effect
    second = baseline.loc[shared].to_numpy(float).T
    has_ranks = all(len(np.unique(values)) > 1 for values in [*first, *second])
    if len(shared) < MIN_UNITS or not has_ranks:
        return {}
    difference = rho_difference((first[0], first[1]), (second[0], second[1]), rng)
    return {"above_magnitude": difference.value, "above_low": difference.low, "above_high": difference.high}


def _with_adjusted_p(table: pd.DataFrame) -> pd.DataFrame:
    """``p_adjusted`` by Benjamini and Hochberg over the metrics of each unit, perturbation and k."""
    table["p_adjusted"] = np.nan
    known = table[table["p_value"].notna()]
    for _, group in known.groupby(["unit", "perturbation", "k"], sort=False):
        table.loc[group.index, "p_adjusted"] = stats.false_discovery_control(group["p_value"].to_numpy(float))
    return table
