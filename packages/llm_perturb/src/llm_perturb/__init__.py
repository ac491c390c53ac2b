"""The measuring instrument: perturb chosen weights of a causal language model and measure the change of its loss.

From Python: ``load_model``, ``load_corpus``, ``perplexity`` and ``perturbed``. They are imported when they are first
used, so that importing a part of this package loads nothing else.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_perturb.notebook import load_corpus, load_model, perplexity, perturbed

__all__ = ["load_corpus", "load_model", "perplexity", "perturbed"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("llm_perturb.notebook"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
