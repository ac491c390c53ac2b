"""A baseline measured elsewhere, compared with this run's: the same evaluation setup, or an error."""

import math
from collections.abc import Mapping
from typing import Any

from bridge.exchange.baseline_file import SAME, TOLERANCE, compare_models, read
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.models import LoadedModel
from llm_perturb.evaluation.perplexity import summarize
from torch import Tensor

__all__ = ["check_model", "check_same", "measured", "read", "setup"]


def setup(loaded: LoadedModel, corpus: Corpus) -> dict[str, Any]:
    """What must be the same for two baselines to be comparable."""
    metadata = {
        key: loaded.metadata[source] for key, source in [("model", "id"), ("revision", "revision"), ("dtype", "dtype")]
    }
    return metadata | {"corpus_sha256": corpus.metadata["corpus_sha256"]}


def measured(loaded: LoadedModel, corpus: Corpus, losses: Tensor) -> dict[str, Any]:
    """The content of ``baseline.json``: the setup, the model's fingerprint, and the loss and perplexity over it."""
    return setup(loaded, corpus) | loaded.fingerprint.totals | summarize(losses, corpus).as_dict()


def check_model(expected: Mapping[str, Any], loaded: LoadedModel, path: str) -> list[str]:
    """Compare the values of all parameters, and the tokenizer, with those that a baseline was measured with.

    Returns:
        Warnings: that a baseline of an earlier version has no fingerprint to compare.

    Raises:
        RequestError: they differ; names the first parameters.
    """
    what, warnings = compare_models(expected, path, loaded.fingerprint)
    if what:
        raise RequestError(f"--baseline {path} is of another model than this run: they differ in {what}")
    return warnings


def check_same(expected: Mapping[str, Any], actual: Mapping[str, Any], path: str) -> None:
    """Compare a baseline with this run's setup, and with its loss once ``actual`` has it.

    Raises:
        RequestError: something differs; the message has the first difference.
    """
    for key in SAME:
        if expected[key] != actual[key]:
            raise RequestError(f"--baseline {path} has {key} {expected[key]}, this run has {actual[key]}")
    if "nll" in actual and not math.isclose(expected["nll"], actual["nll"], rel_tol=TOLERANCE):
        raise RequestError(
            f"--baseline {path} has nll {expected['nll']}, this run measured {actual['nll']} on the same tokens "
            f"(more than {TOLERANCE:g} apart, relative)"
        )
