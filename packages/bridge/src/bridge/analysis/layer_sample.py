"""Which layers to measure so that they speak of all: drawn over every kind and the whole range of the score."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DEFAULT_LAYERS = 40  # within 7 kinds a true rho of 0.5 is then shown in about 84 %


class LayerSample(NamedTuple):
    """Layers drawn, as ascending positions, and the probability with which each was."""

    chosen: np.ndarray  # (n,)
    inclusion: np.ndarray  # (n,), 1 for a layer that was certain


def draw_layers(
    scores: np.ndarray, kinds: Sequence[str], n: int, rng: np.random.Generator, n_top: int = 0
) -> LayerSample:
    """``n_top`` layers of highest score, surely, and ``n`` of the others, each with the same probability.

    The others are put in order of kind, within kinds by score, up and down in turn, and every (N/n)-th is taken from
    a random start: systematic sampling with a fractional interval (Madow 1949), by which each kind and each part of
    its range is met in proportion. The probability is n/N, whatever the scores.

    Args:
        scores: of all layers, (N,); equal scores keep their order.
        kinds: of all layers.
        n: how many besides the top ones; all where there are no more.
        rng: gives the start.
        n_top: how many of highest score are certain.
    """
    scores, kinds = np.asarray(scores, dtype=float), np.asarray(kinds)
    by_score = np.argsort(-scores, kind="stable")
    top, others = by_score[:n_top], np.sort(by_score[n_top:])
    inclusion = np.ones(len(scores))
    chosen = top
    if n > 0 and len(others):
        share = min(1.0, n / len(others))
        inclusion[others] = share
        order = others[_serpentine(scores[others], kinds[others])]
        places = (rng.uniform() + np.arange(min(n, len(others)))) / share
        drawn = order[np.minimum(places.astype(int), len(order) - 1)]
        chosen = np.concatenate([top, drawn])
    chosen = np.sort(chosen)
    return LayerSample(chosen, inclusion[chosen])


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
