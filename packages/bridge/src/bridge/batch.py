"""Validate a discovery: one run of the measuring instrument over many layers, then tables and a report."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from bridge import baseline, instrument
from bridge.errors import RequestError, RunError
from bridge.plan import Options, Plan, plan
from bridge.records import MEASUREMENTS, TARGETS, TOP_WEIGHTS, atomic_path, read_table, write_table
from bridge.runs import Run, open_run, read_manifest
from bridge.single_weights import FILE, PLACE, weight_rows
from bridge.validation import KIND, Validation

SINGLE_WEIGHTS = "single_weights.csv"


def validate(options: Options) -> list[str]:
    """Measure what perturbing the discovered weights does, and write the tables and the report.

    Started again after a kill, it goes on where it was.

    Returns:
        The lines that a person wants to read at the end: where the report is, then what it says.

    Raises:
        RequestError: the request is wrong; nothing was started, unless the instrument itself refused it.
        RunError: the measurement failed, or is not of the setup that the discovery had.
    """
    ready = plan(options)
    discovery_folder = ready.discovery.folder.resolve()
    facts = {
        "discovery_folder": str(discovery_folder),
        "discovery_relative": os.path.relpath(discovery_folder, ready.output.resolve()),
    }
    run = open_run(ready.output, KIND, ready.identity, options.experiment_id, facts)
    with run.recorded():
        for warning in ready.warnings:
            run.warn(warning)
        if ready.single_weights is not None:
            write_table(run.folder / SINGLE_WEIGHTS, ready.single_weights, TOP_WEIGHTS)
            _copy(ready.discovery.folder / FILE, run.folder / FILE)
        _measure(ready, run)
        write_table(run.folder / "targets.csv", ready.targets, TARGETS)
        validation = Validation(run.folder, run.manifest, ready.discovery)
        validation.write_correlations()
        lines = validation.write_report()
    return [f"report: {run.folder / 'report.html'}", *lines]


def _measure(ready: Plan, run: Run) -> None:
    """Have the instrument measure, unless it has finished before; check its measurements and copy them here."""
    folder = run.folder.absolute() / "perturb_measure"
    check = _baseline_check(ready, folder)
    if not _is_complete(folder):
        command = [*ready.command, f"--output={folder.parent}", "--experiment-id=measure"]
        if ready.single_weights is not None:
            command.append(f"--per-weight={folder.parent / SINGLE_WEIGHTS}")
        run.update(instrument=command)
        instrument.measure(command, ready.discovery.folder, run.folder / "perturb.log", folder, check)
    try:
        measurements = read_table(folder / "measurements.csv", MEASUREMENTS)
    except RequestError as error:
        raise RunError(
            f"the instrument left no usable measurements: {error}; see {run.folder / 'perturb.log'}"
        ) from None
    check()
    _check_baseline(ready, _baseline_of(measurements), folder)
    _check_effects(ready, measurements)
    _check_single_weights(ready, measurements)
    _copy(folder / "measurements.csv", run.folder / "measurements.csv")


def _copy(source: Path, path: Path) -> None:
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def _is_complete(folder: Path) -> bool:
    return (folder / "manifest.json").exists() and read_manifest(folder).get("status") == "complete"


def _baseline_of(measurements: pd.DataFrame) -> dict:
    """The one baseline that all measurements were taken against."""
    columns = {"corpus_sha256": "corpus_sha256", "n_tokens": "n_tokens", "baseline_nll": "nll"}
    baselines = measurements[list(columns)].rename(columns=columns).drop_duplicates()
    if len(baselines) > 1:
        raise RunError("the measurements are not of one baseline; remove the validation's folder and measure again")
    return baselines.iloc[0].to_dict()


def _baseline_check(ready: Plan, folder: Path) -> Callable[[], None]:
    """A function that compares the instrument's baseline once it is written: hours before the last measurement."""
    checked = False

    def check() -> None:
        nonlocal checked
        path = folder / "baseline.json"
        if not checked and path.exists():
            _check_baseline(ready, json.loads(path.read_text(encoding="utf-8")), folder)
            checked = True

    return check


def _check_baseline(ready: Plan, measured: dict, folder: Path) -> None:
    """Refuse measurements of another setup than the discovery's: prediction and effect would not belong together."""
    expected = {**ready.discovery.model, **ready.discovery.corpus, **ready.discovery.baseline}
    keys = ("corpus_sha256", "n_tokens", "dtype", "revision")
    different = [key for key in keys if key in measured and measured[key] != expected.get(key)]
    if not math.isclose(measured["nll"], expected["nll"], rel_tol=baseline.TOLERANCE):
        different.append("nll")
    if different:
        what = ", ".join(f"{key} is {measured[key]}, was {expected.get(key)}" for key in different)
        raise RunError(
            f"the measurement's baseline is not the discovery's: {what}; "
            f"run the discovery again with what there is now, or set it right, remove {folder}, and validate again"
        )


def _check_effects(ready: Plan, measurements: pd.DataFrame) -> None:
    """Refuse measurements that lack a target, or in which the chosen weights changed nothing at all."""
    chosen = ready.options
    tops = measurements[measurements["selection"].str.startswith("top_")]
    kinds = tops["perturbation"].str.split("(").str[0]  # scale(0.5) is of the kind scale
    found = set(zip(tops["target_layer"], tops["selection"], kinds, tops["k"], strict=True))
    for layer in chosen["target_layers"]:
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


def _check_single_weights(ready: Plan, measurements: pd.DataFrame) -> None:
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
