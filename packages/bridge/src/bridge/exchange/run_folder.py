"""An open run folder: one manifest, one lock, one log of what is finished.

A run is identified by everything that its numbers depend on. The same command started again resumes its unfinished
folder; a finished folder is never written to again.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from bridge.exchange.atomic_file import write_json
from bridge.exchange.errors import RequestError
from bridge.exchange.existing_runs import SCHEMA_VERSION, find_unfinished_run, manifest_if_any
from bridge.exchange.fingerprint import Fingerprint, difference, recorded_fingerprint, write_fingerprint
from bridge.exchange.host import describe_host
from bridge.exchange.layout import MANIFEST_FILE, RESERVE_FILE, run_folder_name
from bridge.exchange.manifest import Manifest
from bridge.exchange.printable import escaped, say
from bridge.exchange.progress_log import append_record, read_records, remove_logs
from bridge.exchange.run_lock import lock_folder
from bridge.exchange.scratch import remove_temporary, scratch_folder

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
            remove_leftovers(self.folder)
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
        """Add one finished record to the log of a writer (each process is one); it is on disk when this returns."""
        append_record(self.folder, record, writer)

    def records(self, form: type[object]) -> list[dict[str, Any]]:
        """All finished records, of all writers; those that are damaged, or not of this form, are set aside."""
        return read_records(self.folder, self.warn, form)


def remove_leftovers(folder: Path) -> None:
    """Remove from the folder of a complete run what a process that was killed at its very end did not."""
    remove_logs(folder)
    remove_temporary(folder)


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
    entries = {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "status": "running",
        "argv": sys.argv,
        "identity": identity,
        "ended": None,
        "host": describe_host(),
        **(details or {}),
    }
    new = False
    if experiment_id is not None:
        if not experiment_id or Path(experiment_id).name != experiment_id or experiment_id in {".", ".."}:
            raise RequestError(
                f"--experiment-id '{experiment_id}' must be a plain name, it becomes part of a folder's name"
            )
        folder = output / run_folder_name(kind, experiment_id)
    else:
        unfinished = find_unfinished_run(output, kind, identity)
        new = unfinished is None
        folder = unfinished or _new_folder(output, kind, {**entries, "warnings": [], "started": _now()})
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; choose another --experiment-id")
    folder.mkdir(exist_ok=True)
    lock = lock_folder(folder)
    try:
        manifest = manifest_if_any(folder)
        _check_resumable(folder, manifest, identity, fingerprint)
        remove_temporary(folder)
    except RequestError:
        lock.release()
        raise
    content: dict[str, Any] = {"warnings": [], **(manifest or {})}
    run = Run(folder=folder, manifest=content, resumed=manifest is not None and not new, _lock=lock)
    with suppress(OSError):
        (folder / RESERVE_FILE).write_bytes(bytes(_RESERVE))
    run.update(started=content.get("started", _now()), **entries)
    if fingerprint:
        write_fingerprint(folder, fingerprint)
    return run


def _check_resumable(
    folder: Path, manifest: Manifest | None, identity: dict[str, Any], fingerprint: Fingerprint | None
) -> None:
    if manifest is None:
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise RequestError(f"{folder} holds files of something else; choose another --experiment-id")
        return
    if manifest.get("status") == "complete":
        remove_leftovers(folder)
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


def _new_folder(output: Path, kind: str, manifest: Mapping[str, Any]) -> Path:
    """A new folder, named by the time; it appears with its manifest, so that a kill leaves none that is no run's."""
    now = time.strftime("%Y%m%d_%H%M%S")
    with scratch_folder(output) as scratch:
        prepared = scratch / "run"
        prepared.mkdir()
        write_json(prepared / MANIFEST_FILE, manifest)
        for number in range(1, 1000):
            experiment_id = now if number == 1 else f"{now}_{number}"
            folder = output / run_folder_name(kind, experiment_id)
            if folder.exists():
                continue
            try:
                return prepared.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    raise RequestError(f"{output} already holds a thousand runs of this second")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
