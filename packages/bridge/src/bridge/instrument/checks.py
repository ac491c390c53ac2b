"""Checks of the measurements: of the discovery's model and corpus, complete, and with an effect; else the run fails."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bridge.analysis.single_weights import weight_rows
from bridge.exchange import baseline_file
from bridge.exchange.errors import RunError
from bridge.exchange.fingerprint import MISSING, difference, recorded_fingerprint
from bridge.exchange.layout import BASELINE_FILE, WEIGHT_KEY, is_top, top_label
from bridge.instrument.plan import Plan


def baseline_of(measurements: pd.DataFrame) -> dict[str, Any]:
    """The one baseline that all measurements were taken against."""
    columns = {"corpus_sha256": "corpus_sha256", "n_tokens": "n_tokens", "baseline_nll": "nll"}
    baselines = measurements[list(columns)].rename(columns=columns).drop_duplicates()
    if len(baselines) > 1:
        raise RunError("the measurements are not of one baseline; remove the validation's folder and measure again")
    return {str(column): value for column, value in baselines.iloc[0].to_dict().items()}


class BaselineCheck:
    """Compare the instrument's baseline with the discovery's once it is written: hours before the last measurement.

    Args:
        ready: the plan, with the discovery.
        folder: the instrument's.
        warn: called with what could not be compared.
    """

    def __init__(self, ready: Plan, folder: Path, warn: Callable[[str], None]) -> None:
        self.ready = ready
        self.folder = folder
        self.warn = warn
        self.done = False

    def __call__(self) -> None:
        """Check the baseline if it is there and was not checked before."""
        path = self.folder / BASELINE_FILE
        if self.done or not path.exists():
            return
        measured = baseline_file.read(str(path))
        check_model(self.ready, measured, self.folder, self.warn)
        check_baseline(self.ready, measured, self.folder)
        self.done = True


def check_model(ready: Plan, measured: Mapping[str, Any], folder: Path, warn: Callable[[str], None]) -> None:
    """Refuse measurements of other parameter values, or of another tokenizer, than the discovery's: bit for bit."""
    discovered, measured_fingerprint = ready.discovery.fingerprint, recorded_fingerprint(measured, folder)
    if discovered is None:
        warn(f"the discovery {MISSING}")
        return
    if measured_fingerprint is None:
        warn(f"the measurement {MISSING}")
        return
    differing = difference(discovered, measured_fingerprint)
    if differing:
        raise RunError(
            f"the model that was measured is not the discovery's: they differ in {differing}; "
            f"run the discovery again with the model there is now, or set it right, remove {folder}, and validate again"
        )


def check_baseline(ready: Plan, measured: Mapping[str, Any], folder: Path) -> None:
    """Refuse measurements of another setup than the discovery's: prediction and effect would not belong together.

    Where other texts judge, their baseline is the instrument's own, and only the model must be the discovery's.
    """
    expected: dict[str, Any] = {**ready.discovery.model, **ready.discovery.corpus, **ready.discovery.baseline}
    keys = ("dtype", "revision") if ready.other_texts else ("corpus_sha256", "n_tokens", "dtype", "revision")
    different = [key for key in keys if key in measured and measured[key] != expected.get(key)]
    if not ready.other_texts and not math.isclose(measured["nll"], expected["nll"], rel_tol=baseline_file.TOLERANCE):
        different.append("nll")
    if different:
        details = ", ".join(f"{key} is {measured[key]}, was {expected.get(key)}" for key in different)
        raise RunError(
            f"the measurement's baseline is not the discovery's: {details}; "
            f"run the discovery again with what there is now, or set it right, remove {folder}, and validate again"
        )


def check_effects(ready: Plan, targets: Sequence[str], measurements: pd.DataFrame) -> None:
    """Refuse measurements that lack a target, or in which the chosen weights changed nothing at all."""
    chosen = ready.options
    tops = measurements[measurements["selection"].map(is_top).astype(bool)]
    perturbations = tops["perturbation"].str.split("(").str[0]  # scale(0.5) is of the kind scale
    measured = set(zip(tops["target_layer"], tops["selection"], perturbations, tops["k"], strict=True))
    for layer in targets:
        for metric in chosen["metrics"]:
            for perturbation in chosen["perturbations"]:
                for k in chosen["k"]:
                    if (layer, top_label(metric), perturbation, k) not in measured:
                        raise RunError(f"the measurements lack the top {k} of {layer} by {metric} ({perturbation})")
    changed = pd.concat([tops, weight_rows(measurements)]) if len(tops) else weight_rows(measurements)
    if (changed["delta_nll"] == 0).all():
        raise RunError(
            "perturbing the chosen weights changed the loss nowhere: the perturbation did not reach the model"
        )


def check_single_weights(ready: Plan, measurements: pd.DataFrame) -> None:
    """Refuse measurements that lack a weight that was to be perturbed alone."""
    if ready.single_weights is None:
        return
    rows = weight_rows(measurements)
    perturbations = rows["perturbation"].str.split("(").str[0]
    for perturbation in ready.options["perturbations"]:
        absent = _weight_keys(ready.single_weights) - _weight_keys(rows[perturbations == perturbation])
        if absent:
            raise RunError(
                f"the measurements lack {len(absent)} of {len(ready.single_weights)} single weights ({perturbation})"
            )


def _weight_keys(weights: pd.DataFrame) -> set[tuple[str, ...]]:
    if weights.empty:
        return set()
    return set(weights[WEIGHT_KEY].astype(str).itertuples(index=False, name=None))
