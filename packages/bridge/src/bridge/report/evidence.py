"""The data of a report: what a validation and its discovery left, and the tables that follow, each computed once."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd

from bridge.analysis.ablation_curves import ablation_curves
from bridge.analysis.measured_sets import first_row, rows_where, single_layers, top_sets
from bridge.analysis.predicted_and_measured import LAYERS
from bridge.analysis.single_weights import weight_effects
from bridge.analysis.top_against_random import LayersAboveRandom, layers_above_random, top_against_random
from bridge.exchange import layout
from bridge.exchange.recorded_metrics import MetricDefinitions, read_metric_definitions
from bridge.exchange.tables import COMPARISONS
from bridge.exchange.validation_run import Validation


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The tables and manifests of a validation and of the discovery that it validates.

    Attributes:
        validation_manifest: manifest of the validation run.
        discovery_manifest: manifest of the discovery run whose ranking was tested.
        discovery_folder: where that run lies; only named in the report.
        measurements: table MEASUREMENTS, at least one row.
        targets: table TARGETS.
        correlations: table CORRELATIONS.
        comparisons: table COMPARISONS; no rows where nothing was compared with random sets.
        top_weights: for each metric its global top-K (table TOP_WEIGHTS).
        summaries: for each metric its table LAYER_SUMMARY.
        sampled: table SAMPLED_WEIGHTS, where single weights were perturbed.
        stability: table STABILITY, where the discovery measured it.
    """

    validation_manifest: dict[str, Any]
    discovery_manifest: dict[str, Any]
    discovery_folder: Path
    measurements: pd.DataFrame
    targets: pd.DataFrame
    correlations: pd.DataFrame
    top_weights: dict[str, pd.DataFrame]
    summaries: dict[str, pd.DataFrame]
    comparisons: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(COMPARISONS.columns)))
    sampled: pd.DataFrame | None = None
    stability: pd.DataFrame | None = None

    @cached_property
    def definitions(self) -> MetricDefinitions:
        """What the metrics are, as the discovery's manifest says."""
        return read_metric_definitions(self.discovery_manifest)

    @property
    def baseline(self) -> str:
        """The metric that every other must beat."""
        return self.definitions.baseline

    @property
    def model(self) -> dict[str, Any]:
        """Metadata of the model; empty if the discovery's manifest gives none."""
        return self._identity("model")

    @property
    def corpus(self) -> dict[str, Any]:
        """Metadata of the corpus that gave the scores; empty if the discovery's manifest gives none."""
        return self._identity("corpus")

    @property
    def judged_by_other_texts(self) -> bool:
        """Whether the effects were measured on other token sequences than gave the scores."""
        return set(self.measurements["corpus_sha256"]) != {self.corpus.get("corpus_sha256")}

    @property
    def measured_corpus(self) -> dict[str, Any]:
        """Metadata of the corpus that the effects were measured on."""
        if not self.judged_by_other_texts:
            return self.corpus
        return self.validation_manifest.get("measured_corpus") or {}

    def _identity(self, part: str) -> dict[str, Any]:
        identity = self.discovery_manifest.get("identity") or {}
        return identity.get(part) or {}

    @cached_property
    def setting(self) -> tuple[str, int]:
        """The perturbation and k that the sentences speak of: those of the primary analysis over layers.

        Where that is over single weights its perturbation, else the first one; at its largest k.
        """
        primary = self.primary
        perturbation = str(self.measurements["perturbation"].iloc[0] if primary is None else primary["perturbation"])
        if primary is not None and primary["unit"] == LAYERS:
            return perturbation, int(primary["k"])
        return perturbation, int(rows_where(self.measurements, perturbation=perturbation)["k"].max())

    @cached_property
    def primary(self) -> pd.Series | None:
        """The row of CORRELATIONS that was named before anything was measured; None if there is none."""
        return first_row(self.correlations, primary=1)

    @cached_property
    def exploratory(self) -> pd.DataFrame:
        """The other rows of CORRELATIONS."""
        return rows_where(self.correlations, primary=0)

    @cached_property
    def settings(self) -> list[tuple[str, int]]:
        """Every (perturbation, k) measured, the one that the sentences speak of first."""
        measured = self.measurements[["perturbation", "k"]].drop_duplicates()
        pairs = [(perturbation, int(k)) for perturbation, k in measured.itertuples(index=False, name=None)]
        return sorted(pairs, key=lambda pair: pair != self.setting)

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics whose top weights were perturbed, the baseline last."""
        return self.baseline_last(self.top_sets["metric"])

    def baseline_last(self, metrics: Iterable[str]) -> list[str]:
        """Each metric once, in their order, the baseline last."""
        return sorted(dict.fromkeys(metrics), key=lambda metric: metric == self.baseline)

    @cached_property
    def metric(self) -> str:
        """The metric that the sentences speak of: that of the primary analysis, which no effect has chosen.

        Without one the first metric that is not the baseline.
        """
        if self.primary is not None:
            return str(self.primary["metric"])
        others = (metric for metric in [*self.metrics, *self.top_weights] if metric != self.baseline)
        return next(others, self.baseline)

    @cached_property
    def layer_correlations(self) -> pd.DataFrame:
        """The rows of the unit layers in the setting."""
        perturbation, k = self.setting
        return rows_where(self.correlations, unit="layers", perturbation=perturbation, k=k)

    @cached_property
    def weight_correlations(self) -> pd.DataFrame:
        """The rows of the unit weights under the first perturbation."""
        return rows_where(self.correlations, unit="weights", perturbation=self.setting[0])

    @cached_property
    def top_sets(self) -> pd.DataFrame:
        """The measurements of top sets of weights; see ``analysis.measured_sets``."""
        return top_sets(self.measurements)

    @cached_property
    def top_against_random(self) -> pd.DataFrame:
        """Every top set next to the random sets of its target; see ``analysis.top_against_random``."""
        return top_against_random(self.measurements, self.comparisons)

    @cached_property
    def layer_effects(self) -> pd.DataFrame:
        """``top_against_random`` of the single layers in the setting."""
        perturbation, k = self.setting
        return single_layers(rows_where(self.top_against_random, perturbation=perturbation, k=k))

    def layers_above_random(self, metric: str) -> LayersAboveRandom:
        """In how many layers a metric's top weights did more damage than every random draw, in the setting."""
        effects = rows_where(self.layer_effects, metric=metric)
        compared = effects[["n_beaten", "n_draws"]].fillna(0).astype(int)
        return layers_above_random(compared["n_beaten"].to_numpy(), compared["n_draws"].to_numpy())

    @cached_property
    def weight_effects(self) -> pd.DataFrame:
        """The effect of each single weight with its scores; see ``analysis.single_weights``."""
        return weight_effects(self.measurements, self.sampled)

    @cached_property
    def sampled_metrics(self) -> list[str]:
        """The metrics by which the single weights have scores."""
        return [] if self.sampled is None else layout.metrics_of_columns(self.sampled.columns)

    @cached_property
    def ablation_curves(self) -> pd.DataFrame:
        """The mean height of each curve of the effect against k; see ``analysis.ablation_curves``."""
        return ablation_curves(self.measurements)


def evidence_of(validation: Validation) -> Evidence:
    """Read all tables of a validation and of its discovery."""
    discovery = validation.discovery
    return Evidence(
        validation_manifest=cast(dict[str, Any], validation.manifest),
        discovery_manifest=cast(dict[str, Any], discovery.manifest),
        discovery_folder=discovery.folder,
        measurements=validation.measurements(),
        targets=validation.targets(),
        correlations=validation.correlations(),
        comparisons=validation.comparisons(),
        top_weights={metric: discovery.top_weights(metric, discovery.ks(metric)[0]) for metric in validation.metrics},
        summaries={metric: discovery.summary(metric) for metric in validation.metrics},
        sampled=validation.sampled(),
        stability=discovery.stability(),
    )
