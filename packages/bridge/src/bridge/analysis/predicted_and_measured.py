"""Prediction and effect of the same units, side by side: every comparison that the measurements allow.

The units of a comparison come in the order of their names, whatever the order of the measurements, so that sums and
random numbers, and with them every digit of a result, depend on the values alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import pandas as pd

from bridge.analysis.ablation_curves import curves_of_layers
from bridge.analysis.components import decoder_part
from bridge.analysis.measured_sets import SETTING, rows_where, single_layers, top_sets
from bridge.analysis.single_weights import weight_effects
from bridge.exchange import layout

LAYERS, WEIGHTS, CURVES = "layers", "weights", "ablation_curve"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Prediction and effect of the same units, by one metric under one perturbation.

    Attributes:
        unit: ``layers``, ``weights`` or ``ablation_curve``.
        metric: whose scores predict.
        perturbation: what was done to the weights.
        k: how many weights were perturbed; of an ablation curve the largest number.
        points: one row a unit, with the columns ``score_sum`` (prediction), ``delta_nll`` (effect) and ``inclusion``
            (the probability with which the unit was chosen to be measured; NaN where that is not known).
        note: what the points are, or empty.
    """

    unit: str
    metric: str
    perturbation: str
    k: int
    points: pd.DataFrame
    note: str = ""

    @property
    def units(self) -> str:
        """The plural by which notes call the units."""
        return WEIGHTS if self.unit == WEIGHTS else LAYERS

    @property
    def purpose(self) -> str:
        """What the random numbers are for; the results of one comparison do not depend on the others."""
        return f"correlation/{self.unit}/{self.metric}/{self.perturbation}/{self.k}"

    @property
    def setting(self) -> tuple[str, str, int]:
        """What comparisons of several metrics share: unit, perturbation and k."""
        return self.unit, self.perturbation, self.k

    @cached_property
    def scored(self) -> pd.DataFrame:
        """The points that have a score; an effect that is not finite is the largest, +inf."""
        points = self.points.dropna(subset=["score_sum"]).astype(float)
        return points.assign(delta_nll=points["delta_nll"].where(np.isfinite(points["delta_nll"]), np.inf))

    @cached_property
    def weights(self) -> np.ndarray | None:
        """1 / inclusion of each scored unit; see ``unequal_weights``."""
        return unequal_weights(self.scored["inclusion"])

    @cached_property
    def kinds(self) -> list[str] | None:
        """The kind of matrix of each scored unit; None for single weights, and where all layers are of one kind."""
        if self.unit == WEIGHTS:
            return None
        kinds = [decoder_part(str(layer)).component for layer in self.scored.index]
        return kinds if len(set(kinds)) > 1 else None

    @cached_property
    def depths(self) -> list[float | None]:
        """The decoder layer of each scored unit, None outside of them."""
        return [decoder_part(str(layer)).depth for layer in self.scored.index]


def unequal_weights(inclusion: pd.Series) -> np.ndarray | None:
    """1 / inclusion, (n,); None where all units are equally probable, or some probability is not known."""
    if inclusion.isna().any() or inclusion.nunique() <= 1:
        return None
    weights: np.ndarray = 1 / inclusion.to_numpy(float)
    return weights


def comparisons(
    measurements: pd.DataFrame,
    sampled: pd.DataFrame | None,
    targets: pd.DataFrame | None = None,
    single_weights: pd.DataFrame | None = None,
) -> Iterator[Comparison]:
    """All comparisons of prediction and effect that the measurements allow.

    Args:
        measurements: a table of MEASUREMENTS.
        sampled: a table of SAMPLED_WEIGHTS; without it there are none of the unit weights.
        targets: a table of TARGETS, which holds the inclusion probability of the layers.
        single_weights: a table of SINGLE_WEIGHTS, which holds that of single weights.
    """
    tops = top_sets(measurements)
    of_layers = pd.Series(dtype=float)
    if targets is not None:
        of_layers = targets.drop_duplicates("target_layer").set_index("target_layer")["inclusion"].astype(float)
    for key, sets in tops.groupby(SETTING, sort=False):
        metric, perturbation, k = cast(tuple[str, str, int], key)
        ordered = single_layers(sets).sort_values(["target_layer", "seed"], kind="stable")
        points = ordered.groupby("target_layer")[["score_sum", "delta_nll"]].mean()
        points["inclusion"] = of_layers.reindex(points.index)
        yield Comparison(unit=LAYERS, metric=metric, perturbation=perturbation, k=int(k), points=points)
    effects = _with_inclusion(weight_effects(measurements, sampled), single_weights)
    if sampled is not None and len(effects):
        for perturbation in effects["perturbation"].unique():
            rows = rows_where(effects, perturbation=perturbation)
            rows = rows.sort_values(layout.WEIGHT_KEY, kind="stable").set_index(layout.WEIGHT_KEY)
            for metric in layout.metrics_of_columns(sampled.columns):
                columns = {"score_sum": rows[layout.score_column(metric)], "delta_nll": rows["size"]}
                points = pd.DataFrame(columns | {"inclusion": rows["inclusion"]})
                yield Comparison(unit=WEIGHTS, metric=metric, perturbation=perturbation, k=1, points=points)
    for key, sets in tops.groupby(["metric", "perturbation"], sort=False):
        metric, perturbation = cast(tuple[str, str], key)
        ordered = sets.sort_values(["target_layer", "seed"], kind="stable")
        points, ks = curves_of_layers(ordered)
        if len(points):
            yield Comparison(
                unit=CURVES,
                metric=metric,
                perturbation=perturbation,
                k=int(sets["k"].max()),
                points=points.sort_index().assign(inclusion=of_layers),
                note=f"mean height of the curve over log k, k = {', '.join(map(str, ks))}",
            )


def _with_inclusion(effects: pd.DataFrame, single_weights: pd.DataFrame | None) -> pd.DataFrame:
    """The effects of single weights, and the probability with which each was drawn where the table says so."""
    if single_weights is None or effects.empty:
        return effects.assign(inclusion=np.nan)
    inclusion = single_weights[[*layout.WEIGHT_KEY, "inclusion"]].astype({"row": "Int64", "col": "Int64"})
    return effects.merge(inclusion, on=layout.WEIGHT_KEY, how="left")
