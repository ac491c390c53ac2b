"""A baseline measured on its own, by run_baseline.py, against the one that the discovery had."""

import json
import math
from pathlib import Path

from bridge.exchange.discovery_run import Discovery
from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import MISSING, Fingerprint, difference, recorded_fingerprint

TOLERANCE = 1e-4  # relative; another device or batch size changes the loss by less
SAME = ("model", "revision", "dtype", "corpus_sha256")


def check_same(path: str, discovery: Discovery) -> list[str]:
    """Refuse to validate a discovery whose model, texts or loss are not those of a ``baseline.json``.

    Returns:
        What could not be compared, as warnings.

    Raises:
        RequestError: no such file, not a baseline, or something differs; all differences are named.
    """
    expected = read(path)
    found = {**discovery.baseline, "model": discovery.model["id"]}
    found |= {key: discovery.model.get(key) for key in ("revision", "dtype")}
    found["corpus_sha256"] = discovery.corpus.get("corpus_sha256")
    different = [key for key in SAME if expected[key] != found[key]]
    if not math.isclose(expected["nll"], found["nll"], rel_tol=TOLERANCE):
        different.append("nll")
    words = [f"{key} is {expected[key]} there and {found[key]} in the discovery" for key in different]
    changed, warnings = compare_models(expected, path, discovery.fingerprint)
    if words or changed:
        words += [f"the models differ in {changed}"] * bool(changed)
        raise RequestError(f"--baseline {path} is not of the setup of {discovery.folder}: {', '.join(words)}")
    return warnings


def compare_models(expected: dict, path: str, here: Fingerprint | None) -> tuple[str, list[str]]:
    """The fingerprint that a ``baseline.json`` has, and the digests beside it, against that of the model here.

    Returns:
        What the models differ in, empty if in nothing; a warning where one of them has no fingerprint.
    """
    there = recorded_fingerprint(expected, Path(path).parent)
    if there and here:
        return difference(there, here), []
    which = "the discovery" if there else f"--baseline {path}"
    return "", [f"{which} {MISSING}"]


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
    missing = [key for key in (*SAME, "nll") if not isinstance(content, dict) or key not in content]
    if missing:
        raise RequestError(f"--baseline {path} lacks {', '.join(missing)}; expected a baseline.json of run_baseline.py")
    if not isinstance(content["nll"], (int, float)):
        raise RequestError(f"--baseline {path} has nll {content['nll']!r}, which is not a number")
    return content
