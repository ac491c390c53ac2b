"""Merge the shards of a request, measured on machines that know nothing of each other, into one run."""

import csv
from pathlib import Path
from typing import Any

import pandas as pd
from bridge.exchange import layout
from bridge.exchange.atomic_file import atomic_path, write_text
from bridge.exchange.errors import RequestError
from bridge.exchange.existing_runs import find_runs, read_manifest
from bridge.exchange.file_content import checked
from bridge.exchange.fingerprint import MISSING, Fingerprint, difference, recorded_fingerprint
from bridge.exchange.manifest import ShardManifest
from bridge.exchange.run_folder import RunOptions, check_output, open_run
from bridge.exchange.tables import MEASUREMENTS, read_table

from llm_perturb.measurements_table import write_comparisons

FILES = (layout.MEASUREMENTS_FILE, layout.SEQUENCE_LOSSES_FILE, layout.BASELINE_FILE)


def merge(parents: list[str], run_options: RunOptions) -> Path:
    """Merge the tables of all shards of a request: the files are those of a run that was never split.

    Args:
        parents: folders of finished shards, or folders that hold them.
        run_options: the run folder.

    Returns:
        The run folder.

    Raises:
        RequestError: shards of different requests or baselines, one missing or given twice, rows that overlap,
            tables of other columns.
    """
    output = check_output(run_options.output)
    runs = [folder.resolve() for parent in parents for folder in find_runs(Path(parent), layout.SHARD)]
    folders = list(dict.fromkeys(runs))
    manifests = [checked(read_manifest(folder), ShardManifest, folder / layout.MANIFEST_FILE) for folder in folders]
    fingerprints = [
        recorded_fingerprint(manifest["identity"].get("fingerprint") or {}, folder)
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    identity = _common_identity(folders, manifests, fingerprints)
    _check_rows(manifests)
    _check_columns(folders)
    details = {"merged": [str(folder) for folder in folders]}
    run = open_run(output, layout.PERTURBATION, identity, run_options.experiment_id, details, fingerprints[0])
    with run.recorded():
        if fingerprints[0] is None:
            run.warn(f"{folders[0]} {MISSING}")
        for manifest in manifests:
            for warning in manifest.get("warnings", []):
                run.warn(warning)
        _write(run.folder, folders, [manifest["rows"] for manifest in manifests])
        write_comparisons(run.folder)
    return run.folder


def _common_identity(
    folders: list[Path], manifests: list[ShardManifest], fingerprints: list[Fingerprint | None]
) -> dict[str, Any]:
    """The identity that all shards share.

    Raises:
        RequestError: they share none, a file or a shard is missing, or one is given twice.
    """
    identities: list[dict[str, Any]] = [{**manifest["identity"]} for manifest in manifests]
    shards = [layout.parse_shard(identity.pop("shard")) for identity in identities]
    for folder, identity, shard, fingerprint in zip(folders, identities, shards, fingerprints, strict=True):
        if identity != identities[0] or shard.of != shards[0].of:
            changed = difference(fingerprints[0], fingerprint) if fingerprint and fingerprints[0] else ""
            detail = f" (the models differ in {changed})" if changed else ""
            raise RequestError(f"{folder} and {folders[0]} are shards of different requests{detail}")
        for name in FILES:
            if not (folder / name).is_file():
                raise RequestError(f"{folder} lacks {name}")
        if (folder / layout.BASELINE_FILE).read_bytes() != (folders[0] / layout.BASELINE_FILE).read_bytes():
            raise RequestError(
                f"{folder} and {folders[0]} have different baselines: the arithmetic rounds otherwise there (another "
                "device or number of threads); measure all shards on the same kind of machine"
            )
    numbers = [shard.number for shard in shards]
    for number in range(1, shards[0].of + 1):
        if number not in numbers:
            raise RequestError(f"shard {number}/{shards[0].of} is missing, or not complete")
        if numbers.count(number) > 1:
            raise RequestError(f"shard {number}/{shards[0].of} is given twice")
    return identities[0]


def _check_rows(manifests: list[ShardManifest]) -> None:
    """See that the shards have each row of the request once."""
    rows = sorted(row for manifest in manifests for row in manifest["rows"])
    if rows != list(range(manifests[0]["n_rows"])):
        raise RequestError("the shards overlap or leave rows out; were they made by different versions?")


def _check_columns(folders: list[Path]) -> None:
    """See that each table has the same columns, in the same order, in all shards.

    Raises:
        RequestError: one has others, or cannot be read.
    """
    for name, read in ((layout.MEASUREMENTS_FILE, _header_of), (layout.SEQUENCE_LOSSES_FILE, _columns_of_parquet)):
        first = read(folders[0] / name)
        for folder in folders[1:]:
            own = read(folder / name)
            if own != first:
                more = [f"it alone has {column}" for column in own if column not in first]
                less = [f"it lacks {column}" for column in first if column not in own]
                how = ", ".join(more + less) or "they are in another order"
                raise RequestError(
                    f"{folder / name} has other columns than that of {folders[0]} ({how}): the shards are of "
                    "different versions; measure them with one"
                )


def _header_of(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return next(csv.reader(stream), [])
    except (OSError, ValueError, csv.Error) as error:
        raise RequestError(f"{path} is damaged: {error}; measure the shard again") from None


def _columns_of_parquet(path: Path) -> list[str]:
    from pyarrow import parquet  # slow to import

    try:
        names: list[str] = parquet.read_schema(path).names
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is damaged: {error}; measure the shard again") from None
    return names


def _write(folder: Path, shards: list[Path], rows: list[list[int]]) -> None:
    """Write the tables of all shards, their rows in the order of the request.

    Args:
        folder: of the merged run.
        shards: the folders of the shards.
        rows: for each shard, which rows of the request it holds.
    """
    lines: dict[int, str] = {}  # row of the request -> its line, unchanged
    losses: dict[int, pd.DataFrame] = {}  # row of the request -> the losses of its n sequences
    header = ""
    for shard, own_rows in zip(shards, rows, strict=True):
        read_table(shard / layout.MEASUREMENTS_FILE, MEASUREMENTS)  # refuses what is no number
        try:
            table = (shard / layout.MEASUREMENTS_FILE).read_text(encoding="utf-8")
            header, *own_lines = table.splitlines(keepends=True)
            frame = pd.read_parquet(shard / layout.SEQUENCE_LOSSES_FILE)
        except (OSError, ValueError) as error:
            raise RequestError(f"{shard} is damaged: {error}; measure it again") from None
        if len(own_lines) != len(own_rows) or len(frame) % max(1, len(own_lines)):
            raise RequestError(f"{shard} holds {len(own_lines)} rows, and its manifest lists {len(own_rows)}")
        n = len(frame) // max(1, len(own_lines))
        for at, (row, line) in enumerate(zip(own_rows, own_lines, strict=True)):
            lines[row] = line
            losses[row] = frame.iloc[at * n : (at + 1) * n]
    write_text(folder / layout.MEASUREMENTS_FILE, header + "".join(lines[row] for row in sorted(lines)))
    with atomic_path(folder / layout.SEQUENCE_LOSSES_FILE) as temporary:
        pd.concat([losses[row] for row in sorted(losses)], ignore_index=True).to_parquet(temporary)
    write_text(folder / layout.BASELINE_FILE, (shards[0] / layout.BASELINE_FILE).read_text(encoding="utf-8"))
