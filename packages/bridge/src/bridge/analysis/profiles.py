"""A model's critical weights as a profile: their shares by component and by relative depth, and how alike two are.

Models differ in depth and in how they fuse projections. Depth is therefore relative, in bins, and where one
model keeps query, key and value in one tensor that cannot be told apart, they are one component for all.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bridge.analysis.components import (
    COMPONENTS,
    FUSED_QUERY_KEY_VALUE,
    QUERY_KEY_VALUE,
    ModelComponents,
    decoder_part,
)
from bridge.analysis.rank_agreement import MIN_UNITS
from bridge.analysis.spearman import spearman_rho

DEPTH_BINS = 5
OUTSIDE = "outside"  # embedding, head, last norm: at no depth
DEPTHS = (*(f"depth {number} of {DEPTH_BINS}" for number in range(1, DEPTH_BINS + 1)), OUTSIDE)


class CellCorrelation(NamedTuple):
    """Spearman's rho of two profiles over the cells that both have; NaN where these are too few or all equal."""

    rho: float
    n_cells: int


def top_weight_profiles(
    top_weights: Sequence[pd.DataFrame], summaries: Sequence[pd.DataFrame], models: Sequence[Mapping[str, Any]]
) -> list[pd.DataFrame]:
    """Profiles of the top-K of several models that can be compared cell by cell.

    Args:
        top_weights: for each model a table of TOP_WEIGHTS.
        summaries: for each model its LAYER_SUMMARY, which says how deep the model is.
        models: for each model its metadata in the discovery's manifest, by which fused projections are taken apart.

    Returns:
        For each model the share of its weights in each component (rows) and depth (columns); they sum to 1.
    """
    cells = []
    for weights, summary, model in zip(top_weights, summaries, models, strict=True):
        n_layers = _n_layers(summary)
        components = ModelComponents(dict(zip(summary["parameter"], summary["n_weights"], strict=True)), model)
        cells.append(
            pd.DataFrame(
                {
                    "component": components_of_weights(weights, components),
                    "depth": [_depth_bin(name, n_layers) for name in weights["parameter"]],
                }
            )
        )
    profiles = []
    for cell in _fuse_alike(cells):
        counts = pd.crosstab(cell["component"], cell["depth"])
        counts = counts.reindex(index=COMPONENTS, columns=DEPTHS, fill_value=0)
        profiles.append(counts / max(1, len(cell)))
    return profiles


def components_of_weights(weights: pd.DataFrame, components: ModelComponents) -> list[str]:
    """The component of each weight of a table of TOP_WEIGHTS."""
    cols = [None if pd.isna(col) else int(col) for col in weights["col"]]
    keys = zip(weights["parameter"], weights["row"], cols, strict=True)
    return [components.of_weight(parameter, int(row), col) for parameter, row, col in keys]


def score_profiles(summaries: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Profiles of the share of all score, not of the top-K alone.

    Args:
        summaries: for each model its LAYER_SUMMARY.

    Returns:
        For each model the share of the score in each component (rows) and depth (columns); empty where the model has
        no parameter.
    """
    cells = []
    for summary in summaries:
        n_layers = _n_layers(summary)
        total = summary["score_sum"].sum()
        cells.append(
            pd.DataFrame(
                {
                    "component": [decoder_part(name).component for name in summary["parameter"]],
                    "depth": [_depth_bin(name, n_layers) for name in summary["parameter"]],
                    "score": summary["score_sum"].to_numpy(float) / (total if total > 0 else np.nan),
                }
            )
        )
    profiles = []
    for cell in _fuse_alike(cells):
        sums = cell.pivot_table(index="component", columns="depth", values="score", aggfunc="sum")
        profiles.append(sums.reindex(index=COMPONENTS, columns=DEPTHS))
    return profiles


def _n_layers(summary: pd.DataFrame) -> int:
    """How many decoder layers a model has, by the names of its parameters."""
    depths = [decoder_part(name).depth for name in summary["parameter"]]
    return 1 + max((depth for depth in depths if depth is not None), default=-1)


def _depth_bin(parameter: str, n_layers: int) -> str:
    depth = decoder_part(parameter).depth
    if depth is None:
        return OUTSIDE
    return DEPTHS[int(relative_depth(depth, n_layers) * DEPTH_BINS)]


def relative_depth(depth: int, n_layers: int) -> float:
    """The middle of decoder layer ``depth`` of ``n_layers`` as a share of the whole depth, between 0 and 1."""
    assert 0 <= depth < n_layers, f"layer {depth} of {n_layers}"
    return (depth + 0.5) / n_layers


def _fuse_alike(cells: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Query, key and value as one component for all models, if they are one for any of them."""
    if not any((cell["component"] == FUSED_QUERY_KEY_VALUE).any() for cell in cells):
        return cells
    fused = dict.fromkeys(QUERY_KEY_VALUE, FUSED_QUERY_KEY_VALUE)
    return [cell.assign(component=cell["component"].replace(fused)) for cell in cells]


def profile_margins(profile: pd.DataFrame) -> dict[str, float]:
    """The share of each component and of each depth, as ``share <component>`` and ``share <depth>``."""
    margins = pd.concat([profile.sum(axis=1), profile.sum(axis=0)])
    return {f"share {name}": share for name, share in margins.items()}


def profile_cosine(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Cosine of two profiles: 0 if the top weights share no cell, 1 if their shares are equal."""
    x, y = first.to_numpy().ravel(), second.to_numpy().ravel()
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norms) if norms else float("nan")


def profile_correlation(first: pd.DataFrame, second: pd.DataFrame) -> CellCorrelation:
    """Spearman's rho of two score profiles over the cells that both models have."""
    x, y = first.to_numpy().ravel(), second.to_numpy().ravel()
    in_both = ~np.isnan(x) & ~np.isnan(y)
    x, y = x[in_both], y[in_both]
    if len(x) < MIN_UNITS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return CellCorrelation(rho=float("nan"), n_cells=len(x))
    return CellCorrelation(rho=spearman_rho(x, y), n_cells=len(x))
