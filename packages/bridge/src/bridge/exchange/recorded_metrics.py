"""What a discovery's manifest says of its metrics: the definitions that the discovery has written there.

The bridge knows no metric itself. A manifest without definitions (of an older version) says nothing about its metrics
but their names; its baseline is then the metric called ``magnitude``.
"""

from dataclasses import dataclass
from typing import Any

DEFAULT_BASELINE = "magnitude"
LOSS_UNIT = "nats per token"


@dataclass(frozen=True, kw_only=True)
class MetricDefinition:
    """One metric as the entry ``metrics`` of a discovery's manifest declares it.

    Attributes:
        formula: the score as text, with what it means.
        unit: of the score; ``LOSS_UNIT`` if the score estimates the change of loss itself.
        source: the publication, if there is one.
        is_baseline: whether this is the metric that every other metric must beat.
    """

    formula: str
    unit: str = ""
    source: str = ""
    is_baseline: bool = False

    @property
    def estimates_loss_change(self) -> bool:
        """Whether a score is an estimate of the change of loss, so that both can be compared in size."""
        return self.unit == LOSS_UNIT

    @property
    def text(self) -> str:
        """The definition in one line: formula, source and unit."""
        text = self.formula
        if self.source:
            text += f" ({self.source})"
        if self.unit:
            text += f"; unit: {self.unit}"
        return text


UNKNOWN_METRIC = MetricDefinition(formula="see the discovery's manifest")


class MetricDefinitions(dict[str, MetricDefinition]):
    """The definitions of a discovery's metrics by name; a metric without one has ``UNKNOWN_METRIC``."""

    def __missing__(self, metric: str) -> MetricDefinition:
        return UNKNOWN_METRIC

    @property
    def baseline(self) -> str:
        """The name of the baseline metric; ``DEFAULT_BASELINE`` if no definition says which one it is."""
        names = (metric for metric, definition in self.items() if definition.is_baseline)
        return next(names, DEFAULT_BASELINE)


def read_metric_definitions(manifest: dict[str, Any]) -> MetricDefinitions:
    """The definitions in a discovery's manifest: ``metrics: {name: {formula, unit, source, baseline}}``.

    >>> manifest = {"metrics": {"obd": {"formula": "½ θ² h", "source": "LeCun et al. 1990"}}}
    >>> definitions = read_metric_definitions(manifest)
    >>> definitions["obd"].text, definitions["wanda"].text, definitions.baseline
    ('½ θ² h (LeCun et al. 1990)', "see the discovery's manifest", 'magnitude')
    """
    definitions = MetricDefinitions()
    for metric, entry in (manifest.get("metrics") or {}).items():
        definitions[metric] = MetricDefinition(
            formula=entry.get("formula") or UNKNOWN_METRIC.formula,
            unit=entry.get("unit") or "",
            source=entry.get("source") or "",
            is_baseline=bool(entry.get("baseline")),
        )
    return definitions
