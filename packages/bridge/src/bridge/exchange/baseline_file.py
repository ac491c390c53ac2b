"""Compare the baseline of a discovery with a ``baseline.json`` that ``run_baseline.py`` measured separately."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.exchange.discovery_run import Discovery
from bridge.exchange.errors import RequestError
from bridge.exchange.file_content import checked
from bridge.exchange.fingerprint import MISSING, Fingerprint, difference, recorded_fingerprint
from bridge.exchange.json_file import read_json
from bridge.exchange.manifest import Baseline

TOLERANCE = 1e-4  # relative; another device or batch size changes the loss by less
SAME = ("model", "revision", "dtype", "corpus_sha256")


def check_same(path: str, discovery: Discovery) -> list[str]:
    """Refuse to validate a discovery whose model, texts or loss are not those of a ``baseline.json``.

    Returns:
        What could not be compared, as warnings.

    Raises:
        RequestError: no such file, not a baseline, or something differs; all differences are named.
    """
    separate = read(path)
    own = {
        "model": discovery.model["id"],
        "revision": discovery.model.get("revision"),
        "dtype": discovery.model.get("dtype"),
        "corpus_sha256": discovery.corpus.get("corpus_sha256"),
        "nll": discovery.baseline["nll"],
    }
    different = [key for key in SAME if separate[key] != own[key]]
    if not math.isclose(separate["nll"], discovery.baseline["nll"], rel_tol=TOLERANCE):
        different.append("nll")
    reasons = [f"{key} is {separate[key]} there and {own[key]} in the discovery" for key in different]
    changed, warnings = compare_models(separate, path, discovery.fingerprint)
    if changed:
        reasons.append(f"the models differ in {changed}")
    if reasons:
        raise RequestError(f"--baseline {path} is not of the setup of {discovery.folder}: {', '.join(reasons)}")
    return warnings


def compare_models(baseline: Mapping[str, object], path: str, discovered: Fingerprint | None) -> tuple[str, list[str]]:
    """Compare the model of a ``baseline.json`` with that of a discovery by their fingerprints.

    Args:
        baseline: the content of the file.
        path: of the file; ``fingerprint.json`` may lie beside it.
        discovered: the fingerprint of the discovery's model.

    Returns:
        What the models differ in, empty if in nothing; a warning where one of them has no fingerprint.
    """
    separate = recorded_fingerprint(baseline, Path(path).parent)
    if separate and discovered:
        return difference(separate, discovered), []
    which = "the discovery" if separate else f"--baseline {path}"
    return "", [f"{which} {MISSING}"]


def read(path: str) -> dict[str, Any]:
    """The content of a ``baseline.json``.

    Raises:
        RequestError: no such file, or not a baseline; the message names what is missing or of another type.
    """
    try:
        return dict(checked(read_json(Path(path)), Baseline, Path(path), "expected a baseline.json of run_baseline.py"))
    except FileNotFoundError:
        raise RequestError(f"--baseline {path} cannot be read: No such file or directory") from None
    except RequestError as error:
        raise RequestError(f"--baseline {error}") from None
