"""A baseline measured elsewhere, compared with this run's: the same evaluation setup, or an error."""

import json
import math
from pathlib import Path

from bridge.errors import RequestError
from llm_perturb.corpus import Corpus
from llm_perturb.models import LoadedModel
from llm_perturb.perplexity import summarize
from torch import Tensor

NLL_TOLERANCE = 1e-4  # relative: other batches and devices round differently
_SAME = ("model", "revision", "dtype", "corpus_sha256")


def setup(loaded: LoadedModel, corpus: Corpus) -> dict:
    """What must be the same for two baselines to be comparable."""
    facts = {
        key: loaded.facts[source] for key, source in [("model", "id"), ("revision", "revision"), ("dtype", "dtype")]
    }
    return facts | {"corpus_sha256": corpus.facts["corpus_sha256"]}


def measured(loaded: LoadedModel, corpus: Corpus, losses: Tensor) -> dict:
    """The content of ``baseline.json``: the setup, and the loss and perplexity over it."""
    return setup(loaded, corpus) | summarize(losses, corpus).as_dict()


def read(path: str) -> dict:
    """The content of a ``baseline.json``.

    Raises:
        RequestError: no such file, or not a baseline.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"--baseline {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"--baseline {path} is not JSON: {error}") from None
    missing = [key for key in (*_SAME, "nll") if not isinstance(content, dict) or key not in content]
    if missing:
        raise RequestError(f"--baseline {path} lacks {', '.join(missing)}; expected a baseline.json of run_baseline.py")
    if not isinstance(content["nll"], (int, float)):
        raise RequestError(f"--baseline {path} has nll {content['nll']!r}, which is not a number")
    return content


def check_same(expected: dict, found: dict, path: str) -> None:
    """Compare a baseline with this run's setup, and with its loss once ``found`` has it.

    Raises:
        RequestError: something differs; the message has the first difference.
    """
    for key in _SAME:
        if expected[key] != found[key]:
            raise RequestError(f"--baseline {path} has {key} {expected[key]}, this run has {found[key]}")
    if "nll" in found and not math.isclose(expected["nll"], found["nll"], rel_tol=NLL_TOLERANCE):
        raise RequestError(
            f"--baseline {path} has nll {expected['nll']}, this run measured {found['nll']} on the same tokens "
            f"(more than {NLL_TOLERANCE:g} apart, relative)"
        )
