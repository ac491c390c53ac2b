"""A validation run as the bridge reads it: its tables, checked, and the discovery that it validates."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from bridge.exchange import layout
from bridge.exchange.discovery_run import Discovery, one_folder, open_discovery, read_sampled
from bridge.exchange.errors import RequestError
from bridge.exchange.existing_runs import find_runs, read_manifest
from bridge.exchange.file_content import checked
from bridge.exchange.manifest import ValidationManifest
from bridge.exchange.printable import say
from bridge.exchange.sequence_losses import read_sequence_losses
from bridge.exchange.tables import COMPARISONS, CORRELATIONS, MEASUREMENTS, SINGLE_WEIGHTS, TARGETS, read_table


@dataclass(frozen=True)
class Validation:
    """The folder of a validation run, its manifest, and the discovery that it validates."""

    folder: Path
    manifest: ValidationManifest
    discovery: Discovery

    @property
    def options(self) -> dict[str, Any]:
        """Every option that decided the numbers."""
        return cast(dict[str, Any], self.manifest["identity"]["options"])

    @property
    def metrics(self) -> list[str]:
        """The metrics whose top weights were perturbed."""
        metrics: list[str] = self.options["metrics"]
        return metrics

    def measurements(self) -> pd.DataFrame:
        """What was measured: table MEASUREMENTS."""
        return read_table(self.folder / layout.MEASUREMENTS_FILE, MEASUREMENTS)

    def targets(self) -> pd.DataFrame:
        """The layers that were chosen: table TARGETS; no rows where no single layer was perturbed."""
        single_layers = set(self.options["target_layers"]) - {layout.ALL}
        if not single_layers:
            return pd.DataFrame(columns=list(TARGETS.columns))
        return read_table(self.folder / layout.TARGETS_FILE, TARGETS)

    def sampled(self) -> pd.DataFrame | None:
        """The sampled weights with the scores of all metrics, if single weights were perturbed."""
        path = self.folder / layout.SAMPLED_WEIGHTS_FILE
        return read_sampled(path, self.discovery.metrics()) if path.exists() else None

    def comparisons(self) -> pd.DataFrame:
        """Top sets against random ones: table COMPARISONS; no rows where the instrument compared none."""
        path = self.folder / layout.COMPARISONS_FILE
        if not path.exists():
            return pd.DataFrame(columns=list(COMPARISONS.columns))
        return read_table(path, COMPARISONS)

    def sequence_losses(self) -> pd.DataFrame | None:
        """The losses of every measurement on each sequence; None where the instrument's folder is not kept."""
        measured = self.folder / layout.run_folder_name(layout.PERTURBATION, layout.MEASUREMENT_ID)
        path = measured / layout.SEQUENCE_LOSSES_FILE
        return read_sequence_losses(path) if path.exists() else None

    def single_weights(self) -> pd.DataFrame | None:
        """The weights that were perturbed alone: table SINGLE_WEIGHTS; None if none were."""
        path = self.folder / layout.SINGLE_WEIGHTS_FILE
        return read_table(path, SINGLE_WEIGHTS) if path.exists() else None

    def correlations(self) -> pd.DataFrame:
        """The agreement of score and effect: table CORRELATIONS."""
        return read_table(self.folder / layout.CORRELATIONS_FILE, CORRELATIONS)


def choose_validation(folders: Sequence[str]) -> Validation:
    """The newest complete validation in the folder that ``--from`` names, or that folder itself.

    Raises:
        RequestError: no folder or several, no complete validation, or its discovery is no longer there.
    """
    parent = one_folder(folders)
    runs = find_runs(parent, layout.VALIDATION)
    newest = runs[-1]
    if len(runs) > 1:
        say(f"{parent} holds {len(runs)} validations; the newest is {newest.name}", stream=sys.stderr)
    manifest = checked(read_manifest(newest), ValidationManifest, newest / layout.MANIFEST_FILE)
    return Validation(newest, manifest, open_discovery(_discovery_folder(newest, manifest)))


def _discovery_folder(folder: Path, manifest: ValidationManifest) -> Path:
    """Where the discovery lies, also after both were moved together."""
    absolute = Path(manifest.get("discovery_folder", ""))
    relative = folder.resolve().parent / manifest.get("discovery_relative", "")
    for candidate in (relative, absolute):
        if (candidate / layout.MANIFEST_FILE).exists():
            return candidate
    raise RequestError(f"the discovery of {folder} is no longer at {absolute}; put it back to work on the validation")
