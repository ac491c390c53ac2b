"""A validation folder: what was measured in it, and the tables and the report that follow from that."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bridge.analysis.correlation import ALL, correlate
from bridge.analysis.single_weights import FILE
from bridge.exchange.discovery_run import Discovery, one_place, open_discovery, read_sampled
from bridge.exchange.errors import RequestError
from bridge.exchange.printable import say
from bridge.exchange.run_folder import find_runs, read_manifest
from bridge.exchange.tables import CORRELATIONS, MEASUREMENTS, TARGETS, read_table, write_table
from bridge.report.html import write_report

KIND = "validation"


@dataclass(frozen=True)
class Validation:
    """A folder with ``measurements.csv`` and ``targets.csv``, its manifest, and the discovery that it validates."""

    folder: Path
    manifest: dict
    discovery: Discovery

    @property
    def metrics(self) -> list[str]:
        """The metrics whose top weights were perturbed."""
        return self.manifest["identity"]["options"]["metrics"]

    def measurements(self) -> pd.DataFrame:
        """What was measured: table MEASUREMENTS."""
        return read_table(self.folder / "measurements.csv", MEASUREMENTS)

    def targets(self) -> pd.DataFrame:
        """The layers that were chosen: table TARGETS; no rows where no single layer was perturbed."""
        if not set(self.manifest["identity"]["options"]["target_layers"]) - {ALL}:
            return pd.DataFrame(columns=list(TARGETS.columns))
        return read_table(self.folder / "targets.csv", TARGETS)

    def sampled(self) -> pd.DataFrame | None:
        """The sampled weights with the scores of all metrics, if single weights were perturbed."""
        path = self.folder / FILE
        return read_sampled(path, self.discovery.metrics()) if path.exists() else None

    def write_correlations(self, seed: int = 0) -> pd.DataFrame:
        """Compute ``correlations.csv`` from the measurements, write and return it."""
        correlations = correlate(self.measurements(), seed, self.targets(), self.sampled())
        write_table(self.folder / "correlations.csv", correlations, CORRELATIONS)
        return correlations

    def write_report(self) -> list[str]:
        """Write report.html, report.md and the plots; returns the report's summary lines."""
        discovery = self.discovery
        return write_report(
            self.folder,
            validation_manifest=self.manifest,
            discovery_manifest=discovery.manifest,
            discovery_folder=discovery.folder,
            measurements=self.measurements(),
            targets=self.targets(),
            correlations=read_table(self.folder / "correlations.csv", CORRELATIONS),
            top_weights={metric: discovery.top_weights(metric, discovery.ks(metric)[0]) for metric in self.metrics},
            summaries={metric: discovery.summary(metric) for metric in self.metrics},
            sampled=self.sampled(),
            stability=discovery.stability(),
        )


def choose_validation(places: Sequence[str]) -> Validation:
    """The newest complete validation in the folder that ``--from`` names, or that folder itself.

    Raises:
        RequestError: there is none, or the discovery that it validates is not to be found.
    """
    place = one_place(places)
    found = find_runs(place, KIND)
    folder = found[-1]
    if len(found) > 1:
        say(f"{place} holds {len(found)} validations; the newest is {folder.name}", stream=sys.stderr)
    manifest = read_manifest(folder)
    return Validation(folder, manifest, open_discovery(_discovery_folder(folder, manifest)))


def _discovery_folder(folder: Path, manifest: dict) -> Path:
    """Where the discovery lies, also after both were moved together."""
    absolute = Path(manifest.get("discovery_folder", ""))
    for candidate in (folder.resolve().parent / manifest.get("discovery_relative", ""), absolute):
        if (candidate / "manifest.json").exists():
            return candidate
    raise RequestError(f"the discovery of {folder} is no longer at {absolute}; put it back to work on the validation")
