"""Which layers to measure so that they speak of all: drawn over every kind and the whole range of the score."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DEFAULT_LAYERS = 40  # a rho of 0.5 within 7 kinds is then shown in 85 % (benchmarks/sampled_populations.py)


class LayerSample(NamedTuple):
    """Layers drawn, as ascending positions, and the probability with which each was."""

    chosen: np.ndarray  # (n,)
    inclusion: np.ndarray  # (n,)


def draw_layers(scores: np.ndarray, kinds: Sequence[str], n: int, rng: np.random.Generator) -> LayerSample:
    """``n`` of N layers, each with the same probability n/N, whatever its score.

    The layers are put in order of kind, within kinds by score, up and down in turn, and every (N/n)-th is taken from
    a random start: systematic sampling with a fractional interval (Madow 1949), by which each kind and each part of
    its range is met in proportion.

    Args:
        scores: of all layers, (N,); equal scores keep their order.
        kinds: of all layers.
        n: how many; all where there are no more.
        rng: gives the start.
    """
    n_layers = len(scores)
    if n >= n_layers:
        return LayerSample(np.arange(n_layers), np.ones(n_layers))
    order = _serpentine(np.asarray(scores, dtype=float), np.asarray(kinds))
    places = (rng.uniform() + np.arange(n)) * n_layers / n
    # rounding may put the last place at n_layers itself
    chosen = np.sort(order[np.minimum(places.astype(int), n_layers - 1)])
    return LayerSample(chosen, np.full(n, n / n_layers))


def _serpentine(scores: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Positions by kind, and by score within each kind, ascending in every other kind and descending in the rest.

    Neighbours are then alike, also where one kind ends and the next begins.
    """
    parts = []
    for number, kind in enumerate(np.unique(kinds)):
        members = np.flatnonzero(kinds == kind)
        ascending = members[np.argsort(scores[members], kind="stable")]
        parts.append(ascending if number % 2 == 0 else ascending[::-1])
    return np.concatenate(parts)
