"""A complete discovery run as the bridge reads it: its manifest and its tables, checked."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from bridge.exchange import layout
from bridge.exchange.errors import RequestError, did_you_mean
from bridge.exchange.existing_runs import find_runs, read_manifest
from bridge.exchange.file_content import checked
from bridge.exchange.fingerprint import Fingerprint, recorded_fingerprint
from bridge.exchange.json_file import read_json
from bridge.exchange.layout import WEIGHT_KEY, Scope
from bridge.exchange.manifest import Baseline, CorpusInfo, DiscoveryManifest, ModelInfo
from bridge.exchange.printable import say
from bridge.exchange.recorded_metrics import MetricDefinitions, read_metric_definitions
from bridge.exchange.tables import LAYER_SUMMARY, SAMPLED_WEIGHTS, STABILITY, TOP_WEIGHTS, Table, read_table


@dataclass(frozen=True)
class Discovery:
    """The folder of a complete discovery run and its manifest."""

    folder: Path
    manifest: DiscoveryManifest

    @property
    def options(self) -> dict[str, Any]:
        """Every flag that decided the numbers, by parameter name."""
        return cast(dict[str, Any], self.manifest["identity"]["options"])

    @property
    def model(self) -> ModelInfo:
        """The scored model: id, revision, dtype and more."""
        return self.manifest["identity"]["model"]

    @property
    def corpus(self) -> CorpusInfo:
        """The texts that the scores were computed on: source, hashes, counts."""
        return self.manifest["identity"]["corpus"]

    @cached_property
    def metric_definitions(self) -> MetricDefinitions:
        """Formula, unit and source of each metric, as the discovery wrote them into its manifest."""
        return read_metric_definitions(cast(dict[str, Any], self.manifest))

    @property
    def baseline_metric(self) -> str:
        """The metric that the others must beat."""
        return self.metric_definitions.baseline

    @cached_property
    def baseline(self) -> Baseline:
        """The content of ``baseline.json``: the loss and perplexity before any perturbation."""
        path = self.folder / layout.BASELINE_FILE
        try:
            baseline = checked(read_json(path), Baseline, path)
        except FileNotFoundError:
            raise RequestError(f"{path} is missing; run the discovery again") from None
        except RequestError as error:
            raise RequestError(f"{error}; run the discovery again") from None
        for name in ("nll", "ppl"):
            if not math.isfinite(baseline[name]):
                raise RequestError(f"{path} is damaged: {name} is not a finite number; run the discovery again")
        return baseline

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the scored model; None for runs of versions that recorded none."""
        return recorded_fingerprint(self.baseline, self.folder)

    def metrics(self, wanted: Sequence[str] | None = None) -> list[str]:
        """The metrics of the run, or the wanted ones after a check that the run has them."""
        known: list[str] = self.options["metric"]
        for metric in wanted or ():
            if metric not in known:
                hint = did_you_mean(metric, known)
                raise RequestError(f"{self.folder} has no metric '{metric}'{hint}; it has: {', '.join(known)}")
        return list(dict.fromkeys(wanted or known))

    def ks(self, metric: str, scope: Scope = "weights") -> list[int]:
        """Ascending, every K of which there is a file of the metric's top-K."""
        ks = []
        for path in self.folder.iterdir():
            file = layout.parse_weights_file(path.name)
            if file and (file.kind, file.scope, file.metric) == ("top", scope, metric):
                ks.append(file.k)
        if not ks:
            mode = "per_layer" if scope == "per_layer" else "global"
            raise RequestError(
                f"{self.folder} holds no top_<K>_{scope}_{metric}.csv; run the discovery with --mode {mode}"
            )
        return sorted(ks)

    def path(self, metric: str, k: int, scope: Scope = "weights") -> Path:
        """The path of a top-K file."""
        return self.folder / layout.weights_file("top", k, scope, metric)

    def summary(self, metric: str) -> pd.DataFrame:
        """The score of every parameter: table LAYER_SUMMARY, in model order."""
        path = self.folder / layout.layer_summary_file(metric)
        summary = read_table(path, LAYER_SUMMARY)
        if summary["parameter"].duplicated().any() or not np.isfinite(summary["score_sum"]).all():
            raise RequestError(f"{path} is damaged: a parameter occurs twice, or a score is not finite")
        return summary

    def top_weights(self, metric: str, k: int) -> pd.DataFrame:
        """The global top-K: table TOP_WEIGHTS, best first."""
        path = self.path(metric, k)
        weights = _read_weights(path)
        expected = min(k, int(self.summary(metric)["n_weights"].sum()))
        if weights["rank"].tolist() != list(range(1, expected + 1)):
            raise RequestError(f"{path} is damaged: expected the ranks 1 to {expected}, it has {len(weights)} rows")
        return weights

    def top_per_layer(self, metric: str, k: int) -> pd.DataFrame:
        """The top-K of each parameter: table TOP_WEIGHTS, ranked within the parameter."""
        path = self.path(metric, k, "per_layer")
        weights = _read_weights(path)
        expected = self.summary(metric).set_index("parameter")["n_weights"].clip(upper=k)
        counts = weights["parameter"].value_counts()
        for name in expected.index.union(counts.index):
            if expected.get(name, 0) != counts.get(name, 0):
                raise RequestError(
                    f"{path} is damaged: expected {expected.get(name, 0)} weights of {name}, "
                    f"it has {counts.get(name, 0)}"
                )
        return weights

    def sampled(self) -> pd.DataFrame:
        """Weights of known probability with the scores of all metrics: table SAMPLED_WEIGHTS."""
        path = self.folder / layout.SAMPLED_WEIGHTS_FILE
        if not path.exists():
            raise RequestError(f"{path} is missing: --single-weights takes them from there; run the discovery again")
        sampled = read_sampled(path, self.metrics())
        shares = [layout.share_column(metric) for metric in self.metrics()]
        if not set(shares) <= set(sampled) or not sampled[shares].gt(0).all(axis=None):
            raise RequestError(f"{path} lacks {shares[0]} or another share, or one is not above 0; discover again")
        return sampled

    def stability(self) -> pd.DataFrame | None:
        """How alike the discoveries of halves of the corpus are: table STABILITY, where the run measured it."""
        path = self.folder / layout.STABILITY_FILE
        return _read_own(path, STABILITY) if path.exists() else None


def read_sampled(path: Path, metrics: Sequence[str]) -> pd.DataFrame:
    """A table of SAMPLED_WEIGHTS with the scores of all the metrics, checked."""
    scores = [layout.score_column(metric) for metric in metrics]
    table = Table(SAMPLED_WEIGHTS.name, SAMPLED_WEIGHTS.columns | dict.fromkeys(scores, "float"))
    sampled = _read_own(path, table)
    if not np.isfinite(sampled[["value", *scores]].to_numpy()).all():
        raise RequestError(f"{path} is damaged: a value or a score is not a finite number")
    if sampled.duplicated(WEIGHT_KEY).any():
        raise RequestError(f"{path} is damaged: a weight occurs twice")
    return sampled


def _read_own(path: Path, table: Table) -> pd.DataFrame:
    """A table that only a discovery writes; one that is damaged, or of an earlier version, is to be made again."""
    try:
        return read_table(path, table)
    except RequestError as error:
        raise RequestError(f"{error}; run the discovery again") from None


def _read_weights(path: Path) -> pd.DataFrame:
    weights = read_table(path, TOP_WEIGHTS)
    if not np.isfinite(weights[["value", "score"]].to_numpy()).all():
        raise RequestError(f"{path} is damaged: a value or a score is not a finite number")
    if weights.duplicated(WEIGHT_KEY).any():
        raise RequestError(f"{path} is damaged: a weight occurs twice")
    return weights


def choose_discovery(folders: Sequence[str]) -> Discovery:
    """The newest complete discovery run in the folder that ``--from`` names, or that folder itself.

    Raises:
        RequestError: no folder or several, no complete run, or runs of different models to choose from.
    """
    parent = one_folder(folders)
    runs = [open_discovery(folder) for folder in find_runs(parent, layout.DISCOVERY)]
    by_model = {(run.model["id"], run.model.get("revision")): run for run in runs}
    if len(by_model) > 1:
        named = ", ".join(f"{run.folder.name} of {model}" for (model, _), run in by_model.items())
        raise RequestError(f"{parent} holds runs of several models ({named}); name one run's folder with --from")
    if len(runs) > 1:
        say(f"{parent} holds {len(runs)} discovery runs; the newest is {runs[-1].folder.name}", stream=sys.stderr)
    return runs[-1]


def open_discovery(folder: Path) -> Discovery:
    """A discovery run's folder, once its manifest names the options, the model and the corpus of the run."""
    manifest = checked(read_manifest(folder), DiscoveryManifest, folder / layout.MANIFEST_FILE)
    return Discovery(folder, manifest)


def one_folder(folders: Sequence[str]) -> Path:
    """The one folder that ``--from`` must name."""
    if len(folders) != 1:
        raise RequestError(f"--from takes one folder here, not {len(folders)}: {', '.join(folders)}")
    return Path(folders[0])
