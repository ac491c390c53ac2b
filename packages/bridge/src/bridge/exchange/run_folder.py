"""Run folders: one manifest, one lock, one log of what is finished.

A run is identified by everything that its numbers depend on. The same command started again resumes its unfinished
folder; a finished folder is never written to again.
"""

import errno
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bridge.exchange.errors import RequestError
from bridge.exchange.file_content import checked
from bridge.exchange.fingerprint import Fingerprint, difference, recorded_fingerprint, write_fingerprint
from bridge.exchange.host import describe_host
from bridge.exchange.json_file import parse_json, read_json
from bridge.exchange.layout import (
    LOCK_FILE,
    MANIFEST_FILE,
    PROGRESS_FILES,
    RESERVE_FILE,
    progress_file,
    run_folder_name,
)
from bridge.exchange.manifest import Manifest
from bridge.exchange.printable import escaped, say
from bridge.exchange.tables import write_bytes, write_json

SCHEMA_VERSION = 1
_RESERVE = 1 << 16  # bytes, enough for a manifest


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run folder.

    Attributes:
        output: the folder that the run's folder is made in.
        experiment_id: names the run's folder; by default the time, or the unfinished run of the same request.
    """

    output: str = "outputs/"
    experiment_id: str | None = None


def check_output(output: str) -> Path:
    """The output folder as a path, checked before anything is started; created if it does not exist.

    Raises:
        RequestError: it is a file, lies below a file, or cannot be written to.
    """
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--output {output} cannot be created: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise RequestError(f"--output {output} is not writable")
    return path


@dataclass
class Run:
    """An open run folder. The process that opened it holds the lock; of several processes, the others only ``append``.

    Attributes:
        folder: its path.
        manifest: the content of ``manifest.json``.
        resumed: whether an earlier process began the run.
    """

    folder: Path
    manifest: dict[str, Any]
    resumed: bool
    _lock: FileLock | None = field(repr=False, default=None)

    def update(self, **entries: object) -> None:
        """Set entries of the manifest and write it."""
        self.manifest.update(entries)
        write_json(self.folder / MANIFEST_FILE, self.manifest)

    def warn(self, message: str) -> None:
        """Print a warning on stderr and add it to the manifest."""
        message = escaped(message)
        say(f"WARNING: {message}", stream=sys.stderr)
        if message not in self.manifest["warnings"]:
            with suppress(OSError):  # a warning that cannot be recorded was said
                self.update(warnings=[*self.manifest["warnings"], message])

    def finish(self, status: str, **entries: object) -> None:
        """Write the last manifest, with the status 'complete' or 'failed', and release the folder."""
        (self.folder / RESERVE_FILE).unlink(missing_ok=True)  # room for the manifest where the disk is full
        self.update(status=status, ended=_now(), **entries)
        if status == "complete":
            for log in self.folder.glob(PROGRESS_FILES):
                log.unlink()
        self.release()

    def release(self) -> None:
        """Release the folder, so that another process may work in it."""
        if self._lock:
            self._lock.release()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Do the work of the run in the block: 'complete' when it ends, 'failed' with the error when it raises."""
        try:
            yield
        except BaseException as error:
            error.run_folder = self.folder  # type: ignore[attr-defined] # where its traceback is written
            with suppress(OSError):  # the first error counts
                self.finish("failed", error=f"{type(error).__name__}: {error}")
            self.release()
            raise
        self.finish("complete", error=None)

    def append(self, record: dict[str, Any], writer: int = 0) -> None:
        """Add one finished record to the log of a writer (each process is one); it is on disk when this returns.

        A line is the checksum of the record, a space, and the record as JSON. One that cannot be written whole is
        taken back.
        """
        text = json.dumps(record).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        with (self.folder / progress_file(writer)).open("ab", buffering=0) as stream:
            before = stream.seek(0, os.SEEK_END)
            try:
                if stream.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), stream.name)
                os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), before)
                raise

    def records(self) -> list[dict[str, Any]]:
        """All finished records, of all writers.

        A line cut short by a kill is dropped from its log. A damaged one is set aside with a warning, so that what it
        held is measured again.
        """
        records = []
        for log in sorted(self.folder.glob(PROGRESS_FILES)):
            whole, damaged = [], []
            lines = log.read_bytes().split(b"\n")
            for line in lines[:-1]:
                record = _record(line)
                if record is None:
                    damaged.append(line)
                else:
                    records.append(record)
                    whole.append(line)
            if damaged or lines[-1]:
                write_bytes(log, b"".join(line + b"\n" for line in whole))
            if damaged:
                aside = log.with_name(f"{log.name}.damaged")
                write_bytes(aside, b"".join(line + b"\n" for line in damaged))
                lines_are = f"{len(damaged)} lines of {log} are damaged"
                self.warn(f"{lines_are}; they are now in {aside.name}, and what they held is measured again")
        return records


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line of a log; None where the line is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        record = parse_json(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def open_run(
    output: Path,
    kind: str,
    identity: dict[str, Any],
    experiment_id: str | None = None,
    details: Mapping[str, Any] | None = None,
    fingerprint: Fingerprint | None = None,
) -> Run:
    """Open ``<output>/<kind>_<id>`` for this process alone, new or to be resumed.

    Without an id, the unfinished run of the same identity is resumed, if there is one; otherwise the id is
    the time. With an id, the folder must be new or an unfinished run of the same identity.

    Args:
        output: an existing folder.
        kind: what the folder's name begins with, such as ``perturb``.
        identity: all that the numbers depend on (JSON values): options, model, corpus.
        experiment_id: names the folder.
        details: further entries of the manifest, in which a resumed run may differ.
        fingerprint: of the model that the run measures: its totals become part of the identity, and it is written.

    Raises:
        RequestError: the id is taken by a finished run or by another model or other options, or another process is
            at work there.
    """
    identity = json.loads(json.dumps(identity))  # as it will be read again: tuples are lists
    if fingerprint:
        identity["fingerprint"] = fingerprint.totals
    if experiment_id is not None:
        if not experiment_id or Path(experiment_id).name != experiment_id or experiment_id in {".", ".."}:
            raise RequestError(
                f"--experiment-id '{experiment_id}' must be a plain name, it becomes part of a folder's name"
            )
        folder = output / run_folder_name(kind, experiment_id)
    else:
        folder = _unfinished(output, kind, identity) or _new_folder(output, kind)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; choose another --experiment-id")
    folder.mkdir(exist_ok=True)
    lock = _lock(folder)
    try:
        manifest = _manifest(folder)
        _check_resumable(folder, manifest, identity, fingerprint)
    except RequestError:
        lock.release()
        raise
    content: dict[str, Any] = {"warnings": [], **(manifest or {})}
    run = Run(folder=folder, manifest=content, resumed=manifest is not None, _lock=lock)
    with suppress(OSError):
        (folder / RESERVE_FILE).write_bytes(bytes(_RESERVE))
    run.update(
        schema=SCHEMA_VERSION,
        kind=kind,
        status="running",
        argv=sys.argv,
        identity=identity,
        started=content.get("started", _now()),
        ended=None,
        host=describe_host(),
        **(details or {}),
    )
    if fingerprint:
        write_fingerprint(folder, fingerprint)
    return run


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder.

    Raises:
        RequestError: there is none, it is damaged, or another version wrote it.
    """
    manifest = _manifest(folder)
    if manifest is None:
        raise RequestError(f"{folder} has no {MANIFEST_FILE}; is it the folder of a run?")
    if manifest.get("schema") != SCHEMA_VERSION:
        raise RequestError(
            f"{folder}/{MANIFEST_FILE} has schema {manifest.get('schema')}, this version reads {SCHEMA_VERSION}"
        )
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a run that ended well."""
    manifest = _readable_manifest(folder)
    return manifest is not None and manifest.get("status") == "complete"


def find_runs(parent: Path, kind: str) -> list[Path]:
    """The complete runs of a kind in a folder, or the folder itself if it is one; oldest first.

    Raises:
        RequestError: there is none; the message says what is there instead.
    """
    if not parent.is_dir():
        raise RequestError(f"{parent}: no such folder")
    own_manifest = _manifest(parent)
    if own_manifest and own_manifest.get("kind") == kind:
        candidates = [parent]
    else:
        candidates = sorted(parent.glob(f"{run_folder_name(kind, '*')}/"))
    complete = [folder for folder in candidates if is_complete(folder)]
    if not complete:
        unfinished = f" ({len(candidates)} unfinished)" if candidates else ""
        raise RequestError(f"{parent} holds no complete {run_folder_name(kind, '*')} run{unfinished}")
    return sorted(complete, key=lambda folder: read_manifest(folder).get("ended") or "")


def _manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None where there is no such file."""
    path = folder / MANIFEST_FILE
    try:
        return checked(read_json(path), Manifest, path)
    except FileNotFoundError:
        return None


def _readable_manifest(folder: Path) -> Manifest | None:
    """The manifest of one of several folders; None with a warning where it cannot be read."""
    try:
        return _manifest(folder)
    except RequestError as error:
        say(f"WARNING: {error}; {folder.name} is passed over", stream=sys.stderr)
        return None


def _check_resumable(
    folder: Path, manifest: Manifest | None, identity: dict[str, Any], fingerprint: Fingerprint | None
) -> None:
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
        changed = difference(begun, fingerprint) if begun and fingerprint else ""
        detail = f" (the models differ in {changed})" if changed else ""
        raise RequestError(
            f"{folder} was begun with another {', '.join(different)}{detail}; "
            "choose another --experiment-id, or remove the folder"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ; where the options do, the names of those options."""
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if "options" in different:
        different.remove("options")
        different += _differences(before.get("options") or {}, now.get("options") or {})
    return different


def _unfinished(output: Path, kind: str, identity: dict[str, Any]) -> Path | None:
    for folder in sorted(output.glob(f"{run_folder_name(kind, '*')}/")):
        manifest = _readable_manifest(folder)
        if manifest and manifest.get("status") != "complete" and manifest.get("identity") == identity:
            return folder
    return None


def _new_folder(output: Path, kind: str) -> Path:
    now = time.strftime("%Y%m%d_%H%M%S")
    for number in range(1, 1000):
        experiment_id = now if number == 1 else f"{now}_{number}"
        folder = output / run_folder_name(kind, experiment_id)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise RequestError(f"{output} already holds a thousand runs of this second")


def is_locked(folder: Path) -> bool:
    """Whether a process is at work in a run folder, or just about to end there."""
    if not (folder / LOCK_FILE).exists():
        return False
    try:
        _lock(folder).release()
    except RequestError:
        return True
    return False


def _lock(folder: Path) -> FileLock:
    """The lock of a run folder, held by this process until it is released or the process ends."""
    lock = FileLock(folder / LOCK_FILE, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RequestError(
            f"another process is at work in {folder}; wait for it, or choose another --experiment-id"
        ) from None
    return lock


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
