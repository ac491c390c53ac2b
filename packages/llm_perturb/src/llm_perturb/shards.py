"""The same measurements split over machines that know nothing of each other, and put together again."""

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import MISSING, Fingerprint, difference, recorded_fingerprint
from bridge.exchange.run_folder import check_output, find_runs, open_run, read_manifest
from bridge.exchange.tables import atomic_path, write_text

from llm_perturb.measurements_table import write_comparisons

KIND = "shard"
FILES = ("measurements.csv", "sequence_losses.parquet", "baseline.json")


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``of``, from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def read_shard(text: str) -> Shard:
    """``2/4``.

    Raises:
        RequestError: not two whole numbers, or the first is not one of 1 to the second.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise RequestError(f"--shard '{text}' must be i/n, such as 2/4, with i from 1 to n")
    return Shard(int(found[1]), int(found[2]))


def merge(places: list[str], output: str, experiment_id: str | None) -> Path:
    """Put the tables of all shards of a request together: the files of a run that was never split.

    Args:
        places: folders of finished shards, or folders that hold them.
        output: where the run's folder is made.
        experiment_id: its name; default the time.

    Raises:
        RequestError: shards of different requests or baselines, one missing or given twice, rows that overlap.
    """
    place = check_output(output)
    folders = list(dict.fromkeys(f.resolve() for name in places for f in find_runs(Path(name), KIND)))
    manifests = [read_manifest(folder) for folder in folders]
    measured = [_fingerprint(folder, manifest) for folder, manifest in zip(folders, manifests, strict=True)]
    identity = _check(folders, manifests, measured)
    facts = {"merged": [str(folder) for folder in folders]}
    run = open_run(place, "perturb", identity, experiment_id, facts, measured[0])
    with run.recorded():
        if measured[0] is None:
            run.warn(f"{folders[0]} {MISSING}")
        for manifest in manifests:
            for warning in manifest["warnings"]:
                run.warn(warning)
        _write(run.folder, folders, [manifest["rows"] for manifest in manifests])
        write_comparisons(run.folder)
    return run.folder


def _fingerprint(folder: Path, manifest: dict) -> Fingerprint | None:
    return recorded_fingerprint(manifest["identity"].get("fingerprint") or {}, folder)


def _check(folders: list[Path], manifests: list[dict], measured: list[Fingerprint | None]) -> dict:
    """The identity that all shards share."""
    identities = [dict(manifest["identity"]) for manifest in manifests]
    shards = [read_shard(identity.pop("shard")) for identity in identities]
    for folder, identity, shard, own in zip(folders, identities, shards, measured, strict=True):
        if identity != identities[0] or shard.of != shards[0].of:
            what = difference(measured[0], own) if own and measured[0] else ""
            detail = f" (the models differ in {what})" if what else ""
            raise RequestError(f"{folder} and {folders[0]} are shards of different requests{detail}")
        for name in FILES:
            if not (folder / name).is_file():
                raise RequestError(f"{folder} lacks {name}")
        if (folder / "baseline.json").read_bytes() != (folders[0] / "baseline.json").read_bytes():
            raise RequestError(
                f"{folder} and {folders[0]} have different baselines: the arithmetic rounds otherwise there (another "
                "device or number of threads); measure all shards on the same kind of machine"
            )
    numbers = [shard.number for shard in shards]
    for number in range(1, shards[0].of + 1):
        if numbers.count(number) != 1:
            what = "is missing, or not complete" if number not in numbers else "is given twice"
            raise RequestError(f"shard {number}/{shards[0].of} {what}")
    rows = sorted(row for manifest in manifests for row in manifest["rows"])
    if rows != list(range(manifests[0]["n_rows"])):
        raise RequestError("the shards overlap or leave rows out; were they made by different versions?")
    return identities[0]


def _write(folder: Path, shards: list[Path], rows: list[list[int]]) -> None:
    """The rows in the order of the request, as they are written in the shards."""
    lines: dict[int, str] = {}
    losses: dict[int, pd.DataFrame] = {}
    header = ""
    for shard, places in zip(shards, rows, strict=True):
        try:
            header, *own = (shard / "measurements.csv").read_text(encoding="utf-8").splitlines(keepends=True)
            frame = pd.read_parquet(shard / "sequence_losses.parquet")
        except (OSError, ValueError) as error:
            raise RequestError(f"{shard} is damaged: {error}; measure it again") from None
        if len(own) != len(places) or len(frame) % max(1, len(own)):
            raise RequestError(f"{shard} holds {len(own)} rows, and its manifest speaks of {len(places)}")
        lines |= dict(zip(places, own, strict=True))
        n = len(frame) // max(1, len(own))
        losses |= {place: frame.iloc[at * n : (at + 1) * n] for at, place in enumerate(places)}
    write_text(folder / "measurements.csv", header + "".join(lines[place] for place in sorted(lines)))
    with atomic_path(folder / "sequence_losses.parquet") as temporary:
        pd.concat([losses[place] for place in sorted(losses)], ignore_index=True).to_parquet(temporary)
    write_text(folder / "baseline.json", (shards[0] / "baseline.json").read_text(encoding="utf-8"))
