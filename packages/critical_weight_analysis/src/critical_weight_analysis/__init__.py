"""Global discovery: score every weight of a causal language model, keep the exact top-K.

From Python: ``discover``. It is imported when it is first used, so that importing a part of this package loads nothing
else.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from critical_weight_analysis.notebook import discover

__all__ = ["discover"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("critical_weight_analysis.notebook"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
