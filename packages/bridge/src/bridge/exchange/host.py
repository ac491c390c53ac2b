"""Where and with what a run was made, for its manifest."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

# Import name and distribution of each package whose version a manifest records.
_PACKAGES = {
    "bridge": "critical-weights-bridge",
    "llm_perturb": "critical-weights-perturb",
    "critical_weight_analysis": "critical-weights-discovery",
} | {name: name for name in ("torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "scipy")}


def describe_host() -> dict[str, Any]:
    """Python, platform, the versions of the packages, and the commit of this source tree."""
    versions = {}
    for package, distribution in _PACKAGES.items():
        try:
            versions[package] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
