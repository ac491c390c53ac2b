"""The record of a discovery while it runs: its state in the manifest, its log, its warnings."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bridge.exchange import run_folder
from bridge.exchange.layout import ANALYSIS_LOG

_log = logging.getLogger("critical_weight_analysis")


@contextmanager
def recorded(opened: run_folder.Run | None) -> Iterator[None]:
    """While open, the run is recorded and its log written, by the process that has opened it."""
    if opened is None:
        yield
        return
    with opened.recorded(), _logged(opened.folder):
        yield


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """While open, the log goes to ``analysis.log``."""
    handler = logging.FileHandler(folder / ANALYSIS_LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
        _log.info("complete")
    except BaseException as error:
        _log.error("failed: %s: %s", type(error).__name__, error)
        raise
    finally:
        _log.removeHandler(handler)
        handler.close()


def warn(warnings: Sequence[str], opened: run_folder.Run | None) -> None:
    """Warn in the log, and, by the process that has opened the run, on stderr and in the manifest."""
    for warning in warnings:
        _log.warning("%s", warning)
        if opened:
            opened.warn(warning)
