"""Runs that exist: the manifest of a run folder, and the runs of a kind, complete or unfinished."""

import sys
from pathlib import Path
from typing import Any

from bridge.exchange.errors import RequestError
from bridge.exchange.file_content import checked
from bridge.exchange.json_file import read_json
from bridge.exchange.layout import MANIFEST_FILE, run_folder_name
from bridge.exchange.manifest import Manifest
from bridge.exchange.printable import say

SCHEMA_VERSION = 1


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder.

    Raises:
        RequestError: there is none, it is damaged, or another version wrote it.
    """
    manifest = manifest_if_any(folder)
    if manifest is None:
        raise RequestError(f"{folder} has no {MANIFEST_FILE}; is it the folder of a run?")
    if manifest.get("schema") != SCHEMA_VERSION:
        raise RequestError(
            f"{folder}/{MANIFEST_FILE} has schema {manifest.get('schema')}, this version reads {SCHEMA_VERSION}"
        )
    return manifest


def manifest_if_any(folder: Path) -> Manifest | None:
    """The manifest of a folder, of any version; None where there is no such file.

    Raises:
        RequestError: it is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        return checked(read_json(path), Manifest, path)
    except FileNotFoundError:
        return None


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
    own_manifest = manifest_if_any(parent)
    if own_manifest and own_manifest.get("kind") == kind:
        candidates = [parent]
    else:
        candidates = sorted(parent.glob(f"{run_folder_name(kind, '*')}/"))
    complete = [folder for folder in candidates if is_complete(folder)]
    if not complete:
        unfinished = f" ({len(candidates)} unfinished)" if candidates else ""
        raise RequestError(f"{parent} holds no complete {run_folder_name(kind, '*')} run{unfinished}")
    return sorted(complete, key=lambda folder: read_manifest(folder).get("ended") or "")


def find_unfinished_run(parent: Path, kind: str, identity: dict[str, Any]) -> Path | None:
    """The first unfinished run of a kind and identity in a folder, None where there is none."""
    for folder in sorted(parent.glob(f"{run_folder_name(kind, '*')}/")):
        manifest = _readable_manifest(folder)
        if manifest and manifest.get("status") != "complete" and manifest.get("identity") == identity:
            return folder
    return None


def _readable_manifest(folder: Path) -> Manifest | None:
    """The manifest of one of several folders; None with a warning where it cannot be read."""
    try:
        return manifest_if_any(folder)
    except RequestError as error:
        say(f"WARNING: {error}; {folder.name} is passed over", stream=sys.stderr)
        return None
