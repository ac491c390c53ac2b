"""Validate a discovery: one run of the measuring instrument over many layers, then tables and a report."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from bridge.analysis.correlation import write_correlations
from bridge.exchange import layout
from bridge.exchange.atomic_file import atomic_path
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.existing_runs import find_runs, is_complete, read_manifest
from bridge.exchange.fingerprint import write_fingerprint
from bridge.exchange.manifest import ValidationManifest
from bridge.exchange.printable import say
from bridge.exchange.run_folder import Run, open_run, remove_leftovers
from bridge.exchange.tables import MEASUREMENTS, SINGLE_WEIGHTS, TARGETS, read_table, write_table
from bridge.exchange.validation_run import Validation
from bridge.instrument import process
from bridge.instrument.checks import (
    BaselineCheck,
    baseline_of,
    check_baseline,
    check_effects,
    check_single_weights,
)
from bridge.instrument.plan import Plan, plan
from bridge.instrument.validation_options import ValidationOptions
from bridge.report import html


class TargetsFailedError(RunError):
    """Some targets could not be measured; ``lines`` are those of the report on the others."""

    def __init__(self, message: str, lines: list[str]) -> None:
        super().__init__(message)
        self.lines = lines


def validate(options: ValidationOptions) -> list[str]:
    """Measure what perturbing the discovered weights does, and write the tables and the report.

    A run that was killed is resumed. For a shard only the measurements are taken.

    Returns:
        The lines to print at the end: where the report is, then its summary; for a shard, where it is and what to
        do next.

    Raises:
        RequestError: the request is wrong; nothing was started, unless the instrument itself refused it.
        TargetsFailedError: some targets failed; the others are measured and reported.
        RunError: the measurement failed, or is not of the setup that the discovery had.
    """
    ready = plan(options)
    say(ready.cost, stream=sys.stderr)
    if ready.shard:
        return _measure_shard(ready, options)
    parts = _parts(ready, options.merge) if options.merge else None
    run = open_run(ready.output, layout.VALIDATION, ready.identity, options.experiment_id, _discovery_folder(ready))
    with run.recorded():
        failed = _measure(ready, run, parts)
        write_table(run.folder / layout.TARGETS_FILE, ready.targets, TARGETS)
        validation = Validation(run.folder, cast(ValidationManifest, run.manifest), ready.discovery)
        write_correlations(validation)
        lines = [f"report: {run.folder / layout.REPORT_HTML}", *html.write_report(validation)]
    if failed:
        raise TargetsFailedError(f"{len(failed)} targets failed ({', '.join(failed)}); the others are reported", lines)
    return lines


def _discovery_folder(ready: Plan) -> dict[str, str]:
    """Entries of the manifest that name the discovery, also after both folders were moved together."""
    folder = ready.discovery.folder.resolve()
    return {
        "discovery_folder": str(folder),
        "discovery_relative": os.path.relpath(folder, ready.output.resolve()),
    }


def _measure(ready: Plan, run: Run, parts: list[Path] | None) -> dict[str, str]:
    """Run the instrument (or merge the parts), unless it was done before, and copy the measurements here.

    Returns:
        The targets that failed, with their errors; the measurements are those of the others.
    """
    _prepare(ready, run)
    folder = run.folder.absolute() / layout.run_folder_name(layout.PERTURBATION, layout.MEASUREMENT_ID)
    if is_complete(folder):
        remove_leftovers(folder)
    else:
        if parts:
            command, script = _merge_command(ready, parts), process.MERGE
        else:
            command, script = _measure_command(ready, run), process.SCRIPT
        command += [f"--output={folder.parent}", f"--experiment-id={layout.MEASUREMENT_ID}"]
        run.update(instrument=command)
        try:
            process.measure(
                command,
                cwd=run.folder,
                log=run.folder / layout.PERTURB_LOG,
                folder=folder,
                watch=BaselineCheck(ready, folder, run.warn),
                script=script,
            )
        except RunError:
            if not _failed_targets(folder) or not (folder / layout.MEASUREMENTS_FILE).exists():
                raise
    failed = _failed_targets(folder)
    run.update(failed_targets=failed)
    for target, error in failed.items():
        run.warn(f"{target} could not be measured: {error}")
    _accept(ready, run, folder, [target for target in ready.options["target_layers"] if target not in failed])
    return failed


def _prepare(ready: Plan, run: Run) -> None:
    """Write the warnings, and the files that the instrument reads beside those of the discovery."""
    for warning in ready.warnings:
        run.warn(warning)
    if ready.discovery.fingerprint:  # the instrument compares it with the model's
        write_fingerprint(run.folder, ready.discovery.fingerprint)
    if ready.single_weights is not None:
        write_table(run.folder / layout.SINGLE_WEIGHTS_FILE, ready.single_weights, SINGLE_WEIGHTS)
        _copy(ready.discovery.folder / layout.SAMPLED_WEIGHTS_FILE, run.folder / layout.SAMPLED_WEIGHTS_FILE)


def _accept(ready: Plan, run: Run, folder: Path, targets: Sequence[str]) -> None:
    """Check the measurements, and copy them here."""
    try:
        measurements = read_table(folder / layout.MEASUREMENTS_FILE, MEASUREMENTS)
    except RequestError as error:
        log = run.folder / layout.PERTURB_LOG
        raise RunError(f"the instrument left no usable measurements: {error}; see {log}") from None
    BaselineCheck(ready, folder, run.warn)()
    check_baseline(ready, baseline_of(measurements), folder)
    check_effects(ready, targets, measurements)
    check_single_weights(ready, measurements)
    manifest = read_manifest(folder)
    run.update(measured_corpus=manifest["identity"].get("corpus") or {})
    for warning in manifest.get("warnings") or []:
        run.warn(f"measurement: {warning}")
    _copy(folder / layout.MEASUREMENTS_FILE, run.folder / layout.MEASUREMENTS_FILE)
    if (folder / layout.COMPARISONS_FILE).exists():
        _copy(folder / layout.COMPARISONS_FILE, run.folder / layout.COMPARISONS_FILE)


def _measure_command(ready: Plan, run: Run) -> list[str]:
    """The instrument's command. It starts in the run's folder: relative paths are the same for every shard."""
    command = list(ready.command)
    targets = ready.options["target_layers"]
    if targets:
        files = [os.path.relpath(path.resolve(), run.folder.resolve()) for path in ready.weights_files.values()]
        command += ["--target-layer", ",".join(targets), "--weights-csv", *files]
    if ready.single_weights is not None:
        command.append(f"--per-weight={layout.SINGLE_WEIGHTS_FILE}")
    return command


def _merge_command(ready: Plan, parts: list[Path]) -> list[str]:
    if not process.MERGE.is_file():
        raise RequestError(f"{process.MERGE} is missing: this llm_perturb cannot put shards together")
    return [str(ready.python), str(process.MERGE), "--from", *map(str, parts)]


def _failed_targets(folder: Path) -> dict[str, str]:
    """The targets that the instrument could not measure, if that alone is why its last attempt failed."""
    if not (folder / layout.MANIFEST_FILE).exists():
        return {}
    manifest = read_manifest(folder)
    failed = manifest.get("failed_targets") or {}
    error = manifest.get("error") or ""
    they_alone = manifest.get("status") == "failed" and all(message in error for message in failed.values())
    return failed if they_alone else {}


def _measure_shard(ready: Plan, options: ValidationOptions) -> list[str]:
    """Measure one part of the request, in a folder of its own."""
    shard = ready.shard
    assert shard is not None
    name = options.experiment_id and shard.experiment_id(options.experiment_id)
    identity = ready.identity | {"shard": options.shard}
    run = open_run(ready.output, layout.PARTIAL_VALIDATION, identity, name, _discovery_folder(ready))
    log = run.folder / layout.PERTURB_LOG
    shard_folder = layout.run_folder_name(layout.SHARD, shard.experiment_id(layout.MEASUREMENT_ID))
    folder = run.folder.absolute() / shard_folder
    with run.recorded():
        _prepare(ready, run)
        if not is_complete(folder):
            command = _measure_command(ready, run)
            command += [f"--shard={shard}", f"--output={folder.parent}", f"--experiment-id={layout.MEASUREMENT_ID}"]
            run.update(instrument=command)
            check = BaselineCheck(ready, folder, run.warn)
            process.measure(command, cwd=run.folder, log=log, folder=folder, watch=check)
        if not is_complete(folder):
            raise RunError(f"the instrument left no {folder}; see {log}")
        BaselineCheck(ready, folder, run.warn)()
    return [
        f"shard {options.shard}: {run.folder}",
        f"when all {shard.of} are measured, gather their folders in one and give the same command with "
        "--merge THAT_FOLDER instead of --shard",
    ]


def _parts(ready: Plan, folders: Sequence[str]) -> list[Path]:
    """The finished parts of this request that lie in the folders of ``--merge``.

    Raises:
        RequestError: there is none.
    """
    parts = [part for folder in folders for part in find_runs(Path(folder), layout.PARTIAL_VALIDATION)]
    request = {**ready.identity, "shard": None}
    same = [part for part in parts if {**read_manifest(part)["identity"], "shard": None} == request]
    if not same:
        raise RequestError(
            f"--merge {', '.join(folders)}: the {len(parts)} parts there are of another request; "
            "repeat the flags that they were measured with"
        )
    return list(dict.fromkeys(part.absolute() for part in same))


def _copy(source: Path, path: Path) -> None:
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
