"""Validate a discovery: one run of the measuring instrument over many layers, then tables and a report."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from bridge.analysis.single_weights import FILE
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.fingerprint import write_fingerprint
from bridge.exchange.run_folder import Run, find_runs, open_run, read_manifest
from bridge.exchange.tables import MEASUREMENTS, TARGETS, TOP_WEIGHTS, atomic_path, read_table, write_table
from bridge.instrument import process
from bridge.instrument.checks import baseline_check, baseline_of, check_baseline, check_effects, check_single_weights
from bridge.instrument.plan import Options, Plan, plan
from bridge.validation_run import KIND, Validation

PART = "partial_validation"
SINGLE_WEIGHTS = "single_weights.csv"


class TargetsFailedError(RunError):
    """Some targets could not be measured; ``lines`` are those of the report on the others."""

    def __init__(self, message: str, lines: list[str]) -> None:
        super().__init__(message)
        self.lines = lines


def validate(options: Options) -> list[str]:
    """Measure what perturbing the discovered weights does, and write the tables and the report.

    Started again after a kill, it goes on where it was. Of a shard, only the measurements are made.

    Returns:
        The lines that a person wants to read at the end: where the report is, then what it says; of a shard, where
        it is and what comes next.

    Raises:
        RequestError: the request is wrong; nothing was started, unless the instrument itself refused it.
        TargetsFailedError: some targets failed; the others are measured and reported.
        RunError: the measurement failed, or is not of the setup that the discovery had.
    """
    ready = plan(options)
    if options.shard:
        return _measure_shard(ready, options)
    parts = _parts(ready, options.merge) if options.merge else None
    run = open_run(ready.output, KIND, ready.identity, options.experiment_id, _facts(ready))
    with run.recorded():
        failed = _measure(ready, run, parts)
        write_table(run.folder / "targets.csv", ready.targets, TARGETS)
        validation = Validation(run.folder, run.manifest, ready.discovery)
        validation.write_correlations()
        lines = [f"report: {run.folder / 'report.html'}", *validation.write_report()]
    if failed:
        raise TargetsFailedError(f"{len(failed)} targets failed ({', '.join(failed)}); the others are reported", lines)
    return lines


def _facts(ready: Plan) -> dict[str, str]:
    folder = ready.discovery.folder.resolve()
    return {
        "discovery_folder": str(folder),
        "discovery_relative": os.path.relpath(folder, ready.output.resolve()),
    }


def _measure(ready: Plan, run: Run, parts: list[Path] | None) -> dict[str, str]:
    """Have everything measured, unless it was before, and the measurements here.

    Returns:
        The targets that failed, with their errors; the measurements are those of the others.
    """
    _prepare(ready, run)
    folder = run.folder.absolute() / "perturb_measure"
    try:
        _obtain(ready, run, folder, ready.options["target_layers"], parts)
    except RunError:
        if not _failed_in(folder) or not (folder / "measurements.csv").exists():
            raise
    failed = _failed_in(folder)
    run.update(failed_targets=failed)
    for target, error in failed.items():
        run.warn(f"{target} could not be measured: {error}")
    _accept(ready, run, folder, [layer for layer in ready.options["target_layers"] if layer not in failed])
    return failed


def _prepare(ready: Plan, run: Run) -> None:
    for warning in ready.warnings:
        run.warn(warning)
    if ready.discovery.fingerprint:  # beside the lists that are written here, for the instrument to compare
        write_fingerprint(run.folder, ready.discovery.fingerprint)
    if ready.single_weights is not None:
        write_table(run.folder / SINGLE_WEIGHTS, ready.single_weights, TOP_WEIGHTS)
        _copy(ready.discovery.folder / FILE, run.folder / FILE)


def _obtain(ready: Plan, run: Run, folder: Path, targets: Sequence[str], parts: list[Path] | None) -> None:
    """The measurements of some targets: made, or put together from parts."""
    if not _is_complete(folder):
        script = process.MERGE if parts else process.SCRIPT
        command = _merge_command(ready, parts) if parts else _command(ready, run, targets)
        command += [f"--output={folder.parent}", f"--experiment-id={folder.name.removeprefix('perturb_')}"]
        run.update(process=command)
        check = baseline_check(ready, folder, run.warn)
        process.measure(command, run.folder, run.folder / "perturb.log", folder, check, script)


def _accept(ready: Plan, run: Run, folder: Path, targets: Sequence[str]) -> None:
    """Check the measurements, and copy them here."""
    try:
        measurements = read_table(folder / "measurements.csv", MEASUREMENTS)
    except RequestError as error:
        raise RunError(
            f"the instrument left no usable measurements: {error}; see {run.folder / 'perturb.log'}"
        ) from None
    baseline_check(ready, folder, run.warn)()
    check_baseline(ready, baseline_of(measurements), folder)
    check_effects(ready, targets, measurements)
    check_single_weights(ready, measurements)
    _copy(folder / "measurements.csv", run.folder / "measurements.csv")


def _command(ready: Plan, run: Run, targets: Sequence[str]) -> list[str]:
    """The instrument's, started in the run's folder: paths as seen from there are the same for every shard."""
    words = list(ready.command)
    if targets:
        files = [os.path.relpath(path.resolve(), run.folder.resolve()) for path in ready.weights.values()]
        words += ["--target-layer", ",".join(targets), "--weights-csv", *files]
    return words + [f"--per-weight={SINGLE_WEIGHTS}"] * (ready.single_weights is not None)


def _failed_in(folder: Path) -> dict[str, str]:
    """The targets that the instrument could not measure, if that alone is why its last attempt failed."""
    manifest = read_manifest(folder) if (folder / "manifest.json").exists() else {}
    failed = manifest.get("failed_targets") or {}
    alone = manifest.get("status") == "failed" and all(error in manifest["error"] for error in failed.values())
    return failed if alone else {}


def _measure_shard(ready: Plan, options: Options) -> list[str]:
    """Measure one part of the whole, in a folder of its own."""
    number, of = ready.shard
    name = options.experiment_id and f"{options.experiment_id}_{number}_of_{of}"
    run = open_run(ready.output, PART, ready.identity | {"shard": options.shard}, name, _facts(ready))
    folder = run.folder.absolute() / f"shard_measure_{number}_of_{of}"
    with run.recorded():
        _prepare(ready, run)
        if not _is_complete(folder):
            command = _command(ready, run, ready.options["target_layers"])
            command += [f"--shard={number}/{of}", f"--output={folder.parent}", "--experiment-id=measure"]
            run.update(instrument=command)
            check = baseline_check(ready, folder, run.warn)
            process.measure(command, run.folder, run.folder / "perturb.log", folder, check)
        if not _is_complete(folder):
            raise RunError(f"the instrument left no {folder}; see {run.folder / 'perturb.log'}")
        baseline_check(ready, folder, run.warn)()
    return [
        f"shard {options.shard}: {run.folder}",
        f"when all {of} are measured, gather their folders in one and give the same command with --merge THAT_FOLDER "
        "instead of --shard",
    ]


def _parts(ready: Plan, places: Sequence[str]) -> list[Path]:
    """The finished parts of this request that lie in the folders of ``--merge``.

    Raises:
        RequestError: there is none.
    """
    found = [folder for place in places for folder in find_runs(Path(place), PART)]
    same = [f for f in found if {**read_manifest(f)["identity"], "shard": None} == {**ready.identity, "shard": None}]
    if not same:
        raise RequestError(
            f"--merge {', '.join(places)}: the {len(found)} parts there are of another request; give the flags of then"
        )
    return list(dict.fromkeys(folder.absolute() for folder in same))


def _merge_command(ready: Plan, parts: list[Path]) -> list[str]:
    if not process.MERGE.is_file():
        raise RequestError(f"{process.MERGE} is missing: this llm_perturb cannot put shards together")
    return [str(ready.python), str(process.MERGE), "--from", *map(str, parts)]


def _copy(source: Path, path: Path) -> None:
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def _is_complete(folder: Path) -> bool:
    return (folder / "manifest.json").exists() and read_manifest(folder).get("status") == "complete"
