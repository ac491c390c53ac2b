"""Run folders: one manifest, one lock, one log of what is finished.

A run is identified by everything that its numbers depend on. The same command started again finds its
unfinished folder and goes on there; a finished folder is never written to again.
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO

from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import Fingerprint, difference, recorded_fingerprint, write_fingerprint
from bridge.exchange.printable import escaped, say
from bridge.exchange.tables import write_json

SCHEMA_VERSION = 1
_PACKAGES = (
    "bridge",
    "llm_perturb",
    "critical_weight_analysis",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "numpy",
    "pandas",
    "scipy",
)


def check_output(output: str) -> Path:
    """The output folder as a path, checked before anything is started; made if it does not exist.

    Raises:
        RequestError: it is a file, lies below a file, or cannot be written to.
    """
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--output {output} cannot be made a folder: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise RequestError(f"--output {output} is not writable")
    return path


@dataclass
class Run:
    """An open run folder. ``manifest`` is what manifest.json says; ``resumed`` tells whether it was there before."""

    folder: Path
    manifest: dict
    resumed: bool
    _lock: IO | None = field(repr=False, default=None)

    def update(self, **facts: object) -> None:
        """Add facts to the manifest and write it."""
        self.manifest.update(facts)
        write_json(self.folder / "manifest.json", self.manifest)

    def warn(self, message: str) -> None:
        """Say a warning on stderr and keep it in the manifest."""
        message = escaped(message)
        say(f"WARNING: {message}", stream=sys.stderr)
        if message not in self.manifest["warnings"]:
            self.update(warnings=[*self.manifest["warnings"], message])

    def finish(self, status: str, **facts: object) -> None:
        """Write the last manifest, 'complete' or 'failed', and let the folder go."""
        self.update(status=status, ended=_now(), **facts)
        if status == "complete":
            for log in self.folder.glob("progress-*.jsonl"):
                log.unlink()
        if self._lock:
            self._lock.close()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The work of the run: the manifest says 'complete' when the block ends, 'failed' and why when it raises."""
        try:
            yield
        except BaseException as error:
            self.finish("failed", error=f"{type(error).__name__}: {error}")
            raise
        self.finish("complete", error=None)

    def append(self, record: dict, writer: int = 0) -> None:
        """Add one finished record to the log; it is on the disk when this returns. One writer, one process."""
        with (self.folder / f"progress-{writer}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def records(self) -> list[dict]:
        """All finished records, of all writers; a line cut short by a kill is dropped from its log.

        Raises:
            RequestError: a whole line is not a JSON object.
        """
        found = []
        for log in sorted(self.folder.glob("progress-*.jsonl")):
            text = log.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                log.write_bytes(whole)
            found += [_record(line, f"{log}, line {n}") for n, line in enumerate(whole.splitlines(), start=1)]
        return found


def _record(line: bytes, place: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise RequestError(f"{place} is damaged: expected a JSON object; remove the log to measure its part again")
    return record


def open_run(
    output: Path,
    kind: str,
    identity: dict,
    experiment_id: str | None = None,
    facts: dict | None = None,
    fingerprint: Fingerprint | None = None,
) -> Run:
    """Open ``<output>/<kind>_<id>`` for this process alone, new or to be resumed.

    Without an id, the unfinished run of the same identity is resumed, if there is one; otherwise the id is
    the time. With an id, the folder must be new or an unfinished run of the same identity.

    Args:
        output: an existing folder.
        kind: what the folder's name begins with, such as ``perturb``.
        identity: all that the numbers depend on (JSON values): options, model, corpus.
        experiment_id: the id, or None.
        facts: more for the manifest, which a resumed run may change.
        fingerprint: of the model that the run measures: its totals become part of the identity, and it is written.

    Raises:
        RequestError: the id is taken by a finished run or by another model or other options, or another process is
            at work there.
    """
    identity = json.loads(json.dumps(identity))
    if fingerprint:
        identity["fingerprint"] = fingerprint.totals
    if experiment_id is not None:
        if not experiment_id or Path(experiment_id).name != experiment_id or experiment_id in {".", ".."}:
            raise RequestError(
                f"--experiment-id '{experiment_id}' must be a plain name, it becomes part of a folder's name"
            )
        folder = output / f"{kind}_{experiment_id}"
    else:
        folder = _unfinished(output, kind, identity) or _new_folder(output, kind)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; choose another --experiment-id")
    folder.mkdir(exist_ok=True)
    lock = _lock(folder)
    try:
        manifest = _read_manifest(folder)
        _check_resumable(folder, manifest, identity, fingerprint)
    except RequestError:
        lock.close()
        raise
    run = Run(folder, manifest or {"warnings": []}, manifest is not None, lock)
    run.update(
        schema=SCHEMA_VERSION,
        kind=kind,
        status="running",
        argv=sys.argv,
        identity=identity,
        started=run.manifest.get("started", _now()),
        ended=None,
        host=_host(),
        **(facts or {}),
    )
    if fingerprint:
        write_fingerprint(folder, fingerprint)
    return run


def read_manifest(folder: Path) -> dict:
    """The manifest of a run folder.

    Raises:
        RequestError: there is none, or it is not one of ours.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        raise RequestError(f"{folder} has no manifest.json; is it the folder of a run?")
    if manifest.get("schema") != SCHEMA_VERSION:
        raise RequestError(
            f"{folder}/manifest.json has schema {manifest.get('schema')}, this version reads {SCHEMA_VERSION}"
        )
    return manifest


def find_runs(place: Path, kind: str) -> list[Path]:
    """The complete runs of a kind in a folder, or the folder itself if it is one; oldest first.

    Raises:
        RequestError: there is none; the message says what is there instead.
    """
    if not place.is_dir():
        raise RequestError(f"{place}: no such folder")
    itself = _read_manifest(place)
    candidates = [place] if itself and itself.get("kind") == kind else sorted(place.glob(f"{kind}_*/"))
    complete = [folder for folder in candidates if (_read_manifest(folder) or {}).get("status") == "complete"]
    if not complete:
        unfinished = f" ({len(candidates)} unfinished)" if candidates else ""
        raise RequestError(f"{place} holds no complete {kind}_* run{unfinished}")
    return sorted(complete, key=lambda folder: read_manifest(folder)["ended"])


def _read_manifest(folder: Path) -> dict | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{folder}/manifest.json is damaged: {error}") from None
    if not isinstance(manifest, dict):
        raise RequestError(f"{folder}/manifest.json is damaged: not a JSON object")
    return manifest


def _check_resumable(folder: Path, manifest: dict | None, identity: dict, fingerprint: Fingerprint | None) -> None:
    if manifest is None:
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise RequestError(f"{folder} holds files of something else; choose another --experiment-id")
        return
    if manifest.get("status") == "complete":
        raise RequestError(f"{folder} is already complete; choose another --experiment-id, or remove the folder")
    before = manifest.get("identity") or {}
    different = _differences(before, identity)
    if different:
        begun = recorded_fingerprint(before.get("fingerprint") or {}, folder)
        what = difference(begun, fingerprint) if begun and fingerprint else ""
        detail = f" (the models differ in {what})" if what else ""
        raise RequestError(
            f"{folder} was begun with another {', '.join(different)}{detail}; "
            "choose another --experiment-id, or remove the folder"
        )


def _differences(before: dict, now: dict) -> list[str]:
    """The keys in which two identities differ; of the options, the option's name."""
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if "options" in different:
        different.remove("options")
        different += _differences(before.get("options") or {}, now.get("options") or {})
    return different


def _unfinished(output: Path, kind: str, identity: dict) -> Path | None:
    for folder in sorted(output.glob(f"{kind}_*/")):
        manifest = _read_manifest(folder)
        if manifest and manifest.get("status") != "complete" and manifest.get("identity") == identity:
            return folder
    return None


def _new_folder(output: Path, kind: str) -> Path:
    stem = f"{kind}_{time.strftime('%Y%m%d_%H%M%S')}"
    for suffix in ["", *(f"_{n}" for n in range(2, 1000))]:
        try:
            (output / (stem + suffix)).mkdir()
        except FileExistsError:
            continue
        return output / (stem + suffix)
    raise RequestError(f"{output} already holds a thousand runs of this second")


def is_locked(folder: Path) -> bool:
    """Whether a process is at work in a run folder, or just about to end there."""
    if not (folder / ".lock").exists():
        return False
    try:
        _lock(folder).close()
    except RequestError:
        return True
    return False


def _lock(folder: Path) -> IO:
    stream = (folder / ".lock").open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise RequestError(
            f"another process is at work in {folder}; wait for it, or choose another --experiment-id"
        ) from None
    return stream


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _host() -> dict:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
