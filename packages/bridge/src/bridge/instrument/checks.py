"""What is measured must be of the discovery's setup, whole, and an effect at all; else the run fails."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from bridge.analysis.single_weights import PLACE, weight_rows
from bridge.exchange import baseline_file
from bridge.exchange.errors import RunError
from bridge.exchange.fingerprint import MISSING, difference, recorded_fingerprint
from bridge.instrument.plan import Plan


def baseline_of(measurements: pd.DataFrame) -> dict:
    """The one baseline that all measurements were taken against."""
    columns = {"corpus_sha256": "corpus_sha256", "n_tokens": "n_tokens", "baseline_nll": "nll"}
    baselines = measurements[list(columns)].rename(columns=columns).drop_duplicates()
    if len(baselines) > 1:
        raise RunError("the measurements are not of one baseline; remove the validation's folder and measure again")
    return baselines.iloc[0].to_dict()


def baseline_check(ready: Plan, folder: Path, warn: Callable[[str], None]) -> Callable[[], None]:
    """A function that compares the instrument's baseline once it is written: hours before the last measurement.

    Args:
        ready: the plan, with the discovery.
        folder: the instrument's.
        warn: called with what could not be compared.
    """
    checked = False

    def check() -> None:
        nonlocal checked
        path = folder / "baseline.json"
        if not checked and path.exists():
            measured = json.loads(path.read_text(encoding="utf-8"))
            check_model(ready, measured, folder, warn)
            check_baseline(ready, measured, folder)
            checked = True

    return check


def check_model(ready: Plan, measured: dict, folder: Path, warn: Callable[[str], None]) -> None:
    """Refuse measurements of other values, or of another tokenizer, than the discovery's: bit for bit."""
    there, here = ready.discovery.fingerprint, recorded_fingerprint(measured, folder)
    if there is None or here is None:
        warn(f"the {'measurement' if there else 'discovery'} {MISSING}")
    elif what := difference(there, here):
        raise RunError(
            f"the model that was measured is not the discovery's: they differ in {what}; "
            f"run the discovery again with the model there is now, or set it right, remove {folder}, and validate again"
        )


def check_baseline(ready: Plan, measured: dict, folder: Path) -> None:
    """Refuse measurements of another setup than the discovery's: prediction and effect would not belong together."""
    expected = {**ready.discovery.model, **ready.discovery.corpus, **ready.discovery.baseline}
    keys = ("corpus_sha256", "n_tokens", "dtype", "revision")
    different = [key for key in keys if key in measured and measured[key] != expected.get(key)]
    if not math.isclose(measured["nll"], expected["nll"], rel_tol=baseline_file.TOLERANCE):
        different.append("nll")
    if different:
        what = ", ".join(f"{key} is {measured[key]}, was {expected.get(key)}" for key in different)
        raise RunError(
            f"the measurement's baseline is not the discovery's: {what}; "
            f"run the discovery again with what there is now, or set it right, remove {folder}, and validate again"
        )


def check_effects(ready: Plan, targets: Sequence[str], measurements: pd.DataFrame) -> None:
    """Refuse measurements that lack a target, or in which the chosen weights changed nothing at all."""
    chosen = ready.options
    tops = measurements[measurements["selection"].str.startswith("top_")]
    kinds = tops["perturbation"].str.split("(").str[0]  # scale(0.5) is of the kind scale
    found = set(zip(tops["target_layer"], tops["selection"], kinds, tops["k"], strict=True))
    for layer in targets:
        for metric in chosen["metrics"]:
            for perturbation in chosen["perturbations"]:
                for k in chosen["k"]:
                    if (layer, f"top_{metric}", perturbation, k) not in found:
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
    found = weight_rows(measurements)
    kinds = found["perturbation"].str.split("(").str[0]
    for perturbation in ready.options["perturbations"]:
        absent = _places(ready.single_weights) - _places(found[kinds == perturbation])
        if absent:
            raise RunError(
                f"the measurements lack {len(absent)} of {len(ready.single_weights)} single weights ({perturbation})"
            )


def _places(weights: pd.DataFrame) -> set[tuple]:
    return set(weights[PLACE].astype(str).itertuples(index=False, name=None)) if len(weights) else set()
