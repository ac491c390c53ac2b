"""Rank agreement within kinds of matrix: does the score order the layers beyond what their kind and depth tell?

Scores and damage differ between kinds of matrix (query, value, down projection, ...) and along the depth of a model for
reasons of their own. Layers are therefore not exchangeable: two quantities that have nothing to do with each other
agree over all layers as soon as both differ by kind. Here kind and depth are taken out of both rankings first, and
chance is a shuffle among layers of one kind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bridge.analysis.bootstrap import BLOCK_SIZE, N_RESAMPLES
from bridge.analysis.weighted_rho import RhoInterval, WeightedRho, project, rho_interval, weighted_basis, weighted_rho

UNITS_PER_DEPTH_TERM = 7  # at most so many cosines; 30 depths of 7 kinds give 29, which is every depth on its own


class WithinKinds(NamedTuple):
    """Agreement of score and effect within kinds of matrix and given the depth.

    Attributes:
        result: Spearman's partial rho, NaN where kind and depth leave nothing; ``n_fitted`` counts one a kind and the
            cosines of depth.
        p_value: two-sided, by shuffling the effects among the units of a kind.
        interval: of rho, the units taken as drawn from others like them.
    """

    result: WeightedRho
    p_value: float
    interval: RhoInterval


def kind_and_depth(kinds: Sequence[str], depths: Sequence[float | None]) -> np.ndarray:
    """Columns that span every difference between kinds and a smooth course over depth, (n, c).

    An indicator of each kind, then cos(pi j (d + 1/2) / D) for j = 1, 2, ...: the slowest waves over D depths, as many
    as ``UNITS_PER_DEPTH_TERM`` allows, D - 1 at most (which with the constant spans any course over depth).

    Args:
        kinds: of each unit, such as ``bridge.analysis.components`` gives.
        depths: of each unit, from 0; None or NaN for units outside the decoder layers, which get no depth term.
    """
    kind, depth = np.asarray(kinds), np.array(depths, dtype=float)
    indicators: np.ndarray = (kind[:, None] == np.unique(kind)).astype(float)
    known = depth[~np.isnan(depth)]
    n_terms = min(len(kinds) // UNITS_PER_DEPTH_TERM - 1, len(np.unique(known)) - 1)
    if n_terms < 1:
        return indicators
    waves = np.cos(np.pi * np.arange(1, n_terms + 1) * (depth[:, None] + 0.5) / (known.max() + 1))
    return np.hstack([indicators, np.nan_to_num(waves)])


def within_kinds(
    x: np.ndarray,
    y: np.ndarray,
    kinds: Sequence[str],
    depths: Sequence[float | None],
    rng: np.random.Generator,
    weights: np.ndarray | None = None,
    n_resamples: int = N_RESAMPLES,
) -> WithinKinds:
    """Partial rho of x and y given kind and depth, and its p-value by shuffles inside kinds.

    Both rankings are replaced by their residuals after ``kind_and_depth``; the residuals of y are shuffled among the
    units of each kind and fitted anew (Freedman & Lane 1983, with the exchangeability blocks of Winkler et al. 2014).
    p is twice the smaller tail, (1 + r) / (B + 1) each (Phipson & Smyth 2010).

    Args:
        x: predictions, (n,), not NaN.
        y: effects, (n,); infinite ones tie as the largest.
        kinds: of each unit.
        depths: of each unit, or None.
        rng: draws the shuffles.
        weights: 1 / inclusion probability of the units, (n,); equal if None.
        n_resamples: B, how many shuffles.
    """
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=float)
    covariates = kind_and_depth(kinds, depths)
    result = weighted_rho(x, y, w, covariates)
    if np.isnan(result.rho):
        return WithinKinds(result, np.nan, rho_interval(result, w))
    basis = weighted_basis(covariates, w)
    members = [np.flatnonzero(np.asarray(kinds) == kind) for kind in np.unique(kinds)]
    scaled_x = w * result.x_residual / np.sqrt(w @ result.x_residual**2)
    at_least = at_most = 1
    for size in _blocks(n_resamples, len(x)):
        shuffled = _shuffled(result.y_residual, members, size, rng)  # (size, n)
        left = shuffled - project(shuffled, basis, w)
        norms = np.sqrt(left**2 @ w)
        rhos = np.divide(shuffled @ scaled_x, norms, out=np.zeros(size), where=norms > 1e-9)
        at_least += int((rhos >= result.rho - 1e-12).sum())
        at_most += int((rhos <= result.rho + 1e-12).sum())
    p_value = min(1.0, 2 * min(at_least, at_most) / (n_resamples + 1))
    return WithinKinds(result, p_value, rho_interval(result, w))


def _shuffled(values: np.ndarray, members: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """``size`` copies of the values, each with the units of every kind in a random order, (size, n)."""
    copies = np.tile(values, (size, 1))
    for units in members:
        copies[:, units] = rng.permuted(copies[:, units], axis=1)
    return copies


def _blocks(total: int, width: int) -> list[int]:
    size = max(1, BLOCK_SIZE // width)
    return [min(size, total - start) for start in range(0, total, size)]
