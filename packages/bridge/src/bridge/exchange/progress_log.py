"""The log of a run's finished work: records that survive a kill, each line with its checksum.

Each process of a run writes a log of its own. A line is the checksum of the record, a space, and the record as JSON.
"""

import errno
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from bridge.exchange.atomic_file import write_bytes
from bridge.exchange.json_file import parse_json
from bridge.exchange.layout import PROGRESS_FILES, path_aside, progress_file


def append_record(folder: Path, record: dict[str, Any], writer: int) -> None:
    """Add one finished record to the log of a writer; it is on disk when this returns.

    A line that cannot be written whole is taken back.
    """
    text = json.dumps(record).encode()
    line = b"%08x %s\n" % (zlib.crc32(text), text)
    with (folder / progress_file(writer)).open("ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            if stream.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), stream.name)
            os.fsync(stream.fileno())
        except OSError:
            os.ftruncate(stream.fileno(), before)
            raise


def read_records(folder: Path, warn: Callable[[str], None], form: type[object]) -> list[dict[str, Any]]:
    """All finished records, of all writers.

    A line cut short by a kill is dropped from its log. A damaged one is set aside with a warning, so that what it
    held is measured again.

    Args:
        folder: of the run.
        warn: what to do with a warning.
        form: the entries and types of a record; entries that it does not name are tolerated.
    """
    records: list[dict[str, Any]] = []
    for log in sorted(folder.glob(PROGRESS_FILES)):
        if not log.is_file():  # a folder, or a link that leads nowhere
            aside = log.rename(path_aside(log))
            warn(f"{log} is no file; it is now {aside.name}, and what it held is measured again")
            continue
        whole, damaged = [], []
        lines = log.read_bytes().split(b"\n")
        for line in lines[:-1]:
            record = _record(line, form)
            if record is None:
                damaged.append(line)
            else:
                records.append(record)
                whole.append(line)
        if damaged or lines[-1]:
            write_bytes(log, b"".join(line + b"\n" for line in whole))
        if damaged:
            aside = path_aside(log)
            write_bytes(aside, b"".join(line + b"\n" for line in damaged))
            lines_are = f"{len(damaged)} lines of {log} are damaged"
            warn(f"{lines_are}; they are now in {aside.name}, and what they held is measured again")
    return records


def remove_logs(folder: Path) -> None:
    """Remove the logs of all writers, once the run's tables are written."""
    for log in folder.glob(PROGRESS_FILES):
        log.unlink(missing_ok=True)


def _record(line: bytes, form: type[object]) -> dict[str, Any] | None:
    """The record of a line of a log; None where the line is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        record = parse_json(text)
        msgspec.convert(record, form)
    except ValueError:  # of which msgspec's is one
        return None
    return cast(dict[str, Any], record)
