"""The bridge from Python, for notebooks: read finished runs, and correlate predicted with measured effects.

``import bridge`` is enough: these functions are ``bridge.load_discovery``, ``bridge.load_validation`` and
``bridge.correlate``.
"""

from pathlib import Path

from bridge.analysis.correlation import correlate
from bridge.exchange.discovery_run import Discovery, choose_discovery
from bridge.exchange.validation_run import Validation, choose_validation

__all__ = ["correlate", "load_discovery", "load_validation"]


def load_discovery(folder: str | Path) -> Discovery:
    """The newest complete discovery run in a folder, or the run whose folder it is.

    >>> import bridge
    >>> discovery = bridge.load_discovery("outputs")
    >>> discovery.metrics()
    ['grad_x_weight', 'magnitude']
    >>> discovery.top_weights("grad_x_weight", k=5)["rank"].tolist()
    [1, 2, 3, 4, 5]

    Raises:
        RequestError: no complete run, or runs of different models to choose from.
    """
    return choose_discovery([str(folder)])


def load_validation(folder: str | Path) -> Validation:
    """The newest complete validation in a folder, or the validation whose folder it is.

    >>> import bridge
    >>> validation = bridge.load_validation("outputs")
    >>> validation.metrics
    ['grad_x_weight', 'magnitude']
    >>> table = bridge.correlate(validation.measurements(), targets=validation.targets())
    >>> table[["unit", "metric", "n"]]
         unit         metric  n
    0  layers  grad_x_weight  7
    1  layers      magnitude  7

    Raises:
        RequestError: no complete validation, or its discovery is no longer there.
    """
    return choose_validation([str(folder)])
