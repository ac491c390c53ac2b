"""A finished discovery run as the bridge reads it: which one, its options, and its tables, checked."""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from bridge.analysis.single_weights import FILE, PLACE
from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import Fingerprint, recorded_fingerprint
from bridge.exchange.flags import did_you_mean
from bridge.exchange.printable import say
from bridge.exchange.run_folder import find_runs, read_manifest
from bridge.exchange.tables import LAYER_SUMMARY, SAMPLED_WEIGHTS, STABILITY, TOP_WEIGHTS, Table, read_table

KIND = "critical_analysis"


@dataclass(frozen=True)
class Discovery:
    """The folder of a complete discovery run and its manifest."""

    folder: Path
    manifest: dict

    @property
    def options(self) -> dict:
        """Every flag that decided the numbers, by parameter name."""
        return self.manifest["identity"]["options"]

    @property
    def model(self) -> dict:
        """Facts of the model: id, revision, dtype and more."""
        return self.manifest["identity"]["model"]

    @property
    def corpus(self) -> dict:
        """Facts of the corpus: source, hashes, counts."""
        return self.manifest["identity"]["corpus"]

    @cached_property
    def baseline(self) -> dict:
        """What ``baseline.json`` says: the loss and perplexity before any perturbation."""
        path = self.folder / "baseline.json"
        try:
            baseline = json.loads(path.read_text(encoding="utf-8"))
            if all(math.isfinite(baseline[key]) for key in ("nll", "ppl", "n_tokens")):
                return baseline
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise RequestError(f"{path} is missing or damaged: expected the run's baseline; run the discovery again")

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the model as it was scored; None in the runs of versions that took none."""
        return recorded_fingerprint(self.baseline, self.folder)

    def metrics(self, wanted: Sequence[str] | None = None) -> list[str]:
        """The metrics of the run, or the wanted ones after a check that the run has them."""
        known = self.options["metric"]
        for metric in wanted or ():
            if metric not in known:
                hint = did_you_mean(metric, known)
                raise RequestError(f"{self.folder} has no metric '{metric}'{hint}; it has: {', '.join(known)}")
        return list(dict.fromkeys(wanted or known))

    def ks(self, metric: str, kind: str = "weights") -> list[int]:
        """Ascending, every K whose top-K file exists; kind is ``weights`` (global) or ``per_layer``."""
        name = re.compile(rf"top_(\d+)_{kind}_{re.escape(metric)}\.csv")
        found = sorted(int(match[1]) for path in self.folder.iterdir() if (match := name.fullmatch(path.name)))
        if not found:
            mode = "per_layer" if kind == "per_layer" else "global"
            raise RequestError(
                f"{self.folder} holds no top_<K>_{kind}_{metric}.csv; run the discovery with --mode {mode}"
            )
        return found

    def path(self, metric: str, k: int, kind: str = "weights") -> Path:
        """Where a top-K file lies."""
        return self.folder / f"top_{k}_{kind}_{metric}.csv"

    def summary(self, metric: str) -> pd.DataFrame:
        """The score of every parameter: table LAYER_SUMMARY, in model order."""
        path = self.folder / f"layer_summary_{metric}.csv"
        summary = read_table(path, LAYER_SUMMARY)
        if summary["parameter"].duplicated().any() or not np.isfinite(summary["score_sum"]).all():
            raise RequestError(f"{path} is damaged: a parameter is there twice, or a score is not finite")
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
        found = weights["parameter"].value_counts()
        wrong = [name for name in expected.index.union(found.index) if expected.get(name, 0) != found.get(name, 0)]
        if wrong:
            raise RequestError(
                f"{path} is damaged: expected {expected.get(wrong[0], 0)} weights of {wrong[0]}, "
                f"it has {found.get(wrong[0], 0)}"
            )
        return weights

    def sampled(self) -> pd.DataFrame:
        """A few weights of every parameter with the scores of all metrics: table SAMPLED_WEIGHTS."""
        path = self.folder / FILE
        if not path.exists():
            raise RequestError(f"{path} is missing: --single-weights takes them from there; run the discovery again")
        sampled = read_sampled(path, self.metrics())
        shares = [f"share_{metric}" for metric in self.metrics()]
        if not set(shares) <= set(sampled) or not sampled[shares].gt(0).all(axis=None):
            raise RequestError(f"{path} lacks {shares[0]} or another share, or one is not above 0; discover again")
        return sampled

    def stability(self) -> pd.DataFrame | None:
        """How alike the discoveries of halves of the corpus are: table STABILITY, where the run measured it."""
        path = self.folder / "stability.csv"
        return read_table(path, STABILITY) if path.exists() else None


def read_sampled(path: Path, metrics: Sequence[str]) -> pd.DataFrame:
    """A table of SAMPLED_WEIGHTS with the scores of all the metrics, checked."""
    scores = [f"score_{metric}" for metric in metrics]
    sampled = read_table(path, Table(SAMPLED_WEIGHTS.name, SAMPLED_WEIGHTS.columns | dict.fromkeys(scores, "float")))
    if not np.isfinite(sampled[["value", *scores]].to_numpy()).all():
        raise RequestError(f"{path} is damaged: a value or a score is not a finite number")
    if sampled.duplicated(PLACE).any():
        raise RequestError(f"{path} is damaged: a weight is there twice")
    return sampled


def _read_weights(path: Path) -> pd.DataFrame:
    weights = read_table(path, TOP_WEIGHTS)
    if not np.isfinite(weights[["value", "score"]].to_numpy()).all():
        raise RequestError(f"{path} is damaged: a value or a score is not a finite number")
    if weights.duplicated(PLACE).any():
        raise RequestError(f"{path} is damaged: a weight is there twice")
    return weights


def choose_discovery(places: Sequence[str]) -> Discovery:
    """The newest complete discovery run in the folder that ``--from`` names, or that folder itself.

    Raises:
        RequestError: no folder or several, no complete run, or runs of different models to choose from.
    """
    place = one_place(places)
    runs = [open_discovery(folder) for folder in find_runs(place, KIND)]
    by_model = {(run.model["id"], run.model.get("revision")): run for run in runs}
    if len(by_model) > 1:
        named = ", ".join(f"{run.folder.name} of {model}" for (model, _), run in by_model.items())
        raise RequestError(f"{place} holds runs of several models ({named}); name one run's folder with --from")
    if len(runs) > 1:
        say(f"{place} holds {len(runs)} discovery runs; the newest is {runs[-1].folder.name}", stream=sys.stderr)
    return runs[-1]


def open_discovery(folder: Path) -> Discovery:
    """A discovery run's folder, after a look at its manifest."""
    manifest = read_manifest(folder)
    identity = manifest.get("identity")
    parts = [identity.get(key) for key in ("options", "model", "corpus")] if isinstance(identity, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or "metric" not in parts[0] or "id" not in parts[1]:
        raise RequestError(f"{folder}/manifest.json does not say which options, model and corpus the run had")
    return Discovery(folder, manifest)


def one_place(places: Sequence[str]) -> Path:
    """The one folder that ``--from`` must name."""
    if len(places) != 1:
        raise RequestError(f"--from takes one folder here, not {len(places)}: {', '.join(places)}")
    return Path(places[0])
