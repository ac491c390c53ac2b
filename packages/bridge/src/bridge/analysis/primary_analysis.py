"""The primary analysis: the one comparison of prediction and effect that is named before anything is measured.

It keeps its p-value. All other rows of CORRELATIONS are exploratory and share one false-discovery family.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bridge.exchange.layout import ALL


class Primary(NamedTuple):
    """Which row of CORRELATIONS is the primary analysis.

    Attributes:
        unit: ``layers`` or ``weights``.
        metric: whose scores predict.
        perturbation: the kind, without its number (``scale`` of ``scale(0.5)``).
        k: how many weights are perturbed.
    """

    unit: str
    metric: str
    perturbation: str
    k: int

    def is_row(self, unit: str, metric: str, perturbation: str, k: int) -> bool:
        """Whether a row of CORRELATIONS is this analysis."""
        return (unit, metric, perturbation.split("(")[0], k) == self


def primary_analysis(options: Mapping[str, Any], baseline: str, metric: str | None = None) -> Primary:
    """The primary analysis of a validation: that of its manifest, or what follows from the order of its options.

    The first metric that is not the baseline, the first k, the first perturbation, over layers; over single weights
    where no layer is measured.

    >>> options = {"metrics": ["magnitude", "obd"], "k": [100], "perturbations": ["zero"], "target_layers": ["h.0"]}
    >>> primary_analysis(options, "magnitude")
    Primary(unit='layers', metric='obd', perturbation='zero', k=100)

    Args:
        options: of the validation, as its manifest holds them.
        baseline: the metric that every other must beat.
        metric: whose scores predict, if it was named.
    """
    if "primary" in options:
        return Primary(**options["primary"])
    metrics, has_layers = options["metrics"], bool(set(options["target_layers"]) - {ALL})
    return Primary(
        unit="layers" if has_layers else "weights",
        metric=metric or next((name for name in metrics if name != baseline), metrics[0]),
        perturbation=options["perturbations"][0],
        k=options["k"][0] if has_layers else 1,
    )
