"""The files that discovery and perturbation exchange, and the commands that join the two.

From Python: ``load_discovery``, ``load_validation``, ``correlate``. They are imported when they are first used, so that
importing ``bridge.exchange`` loads neither scipy nor matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.api import correlate, load_discovery, load_validation

__all__ = ["correlate", "load_discovery", "load_validation"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (an entry point, of whatever type)
    if name in __all__:
        return getattr(import_module("bridge.api"), name)
    raise AttributeError(f"module 'bridge' has no attribute '{name}'")
