"""A model's critical weights as a profile: their share in each component and at each relative depth.

Models differ in depth and in how they fuse projections. Depth is therefore relative, in bins, and where one
model keeps query, key and value in one tensor that cannot be told apart, they are one component for all.
"""

import numpy as np
import pandas as pd

from bridge.analysis.components import (
    COMPONENTS,
    FUSED_QUERY_KEY_VALUE,
    QUERY_KEY_VALUE,
    Layout,
    place_of,
    relative_depth,
)
from bridge.analysis.rank_agreement import MIN_POINTS, spearman_rho

DEPTH_BINS = 5
OUTSIDE = "outside"  # embedding, head, last norm: at no depth
DEPTHS = (*(f"depth {bin + 1} of {DEPTH_BINS}" for bin in range(DEPTH_BINS)), OUTSIDE)


def profiles_of(
    tops: list[pd.DataFrame], summaries: list[pd.DataFrame], models: list[dict] | None = None
) -> list[pd.DataFrame]:
    """Profiles of several models that can be compared cell by cell.

    Args:
        tops: for each model a table of TOP_WEIGHTS.
        summaries: for each model its LAYER_SUMMARY, which says how deep the model is.
        models: for each the facts of its discovery's manifest, by which fused projections are taken apart.

    Returns:
        For each model the share of its weights in each component (rows) and depth (columns); they sum to 1.
    """
    models = models or [{}] * len(tops)
    placed = [_placed(*each) for each in zip(tops, summaries, models, strict=True)]
    return [_profile(places) for places in _place_alike(placed)]


def _placed(top: pd.DataFrame, summary: pd.DataFrame, model: dict) -> pd.DataFrame:
    """Component and depth bin of each top weight."""
    n_layers = _n_layers(summary)
    layout = Layout(dict(zip(summary["parameter"], map(int, summary["n_weights"]), strict=True)), model)
    rows = [
        (
            layout.component(w.parameter, int(w.row), None if pd.isna(w.col) else int(w.col)),
            _depth_bin(place_of(w.parameter).depth, n_layers),
        )
        for w in top.itertuples()
    ]
    return pd.DataFrame(rows, columns=["component", "depth"])


def _n_layers(summary: pd.DataFrame) -> int:
    depths = [place_of(name).depth for name in summary["parameter"]]
    return 1 + max((depth for depth in depths if depth is not None), default=-1)


def _depth_bin(depth: int | None, n_layers: int) -> str:
    return OUTSIDE if depth is None else DEPTHS[int(relative_depth(depth, n_layers) * DEPTH_BINS)]


def _place_alike(placed: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Query, key and value as one component for all, if they are one for any."""
    if not any((places["component"] == FUSED_QUERY_KEY_VALUE).any() for places in placed):
        return placed
    fused = dict.fromkeys(QUERY_KEY_VALUE, FUSED_QUERY_KEY_VALUE)
    return [places.assign(component=places["component"].replace(fused)) for places in placed]


def _profile(places: pd.DataFrame) -> pd.DataFrame:
    """Share of the top-K in each component and depth bin; sums to 1."""
    counts = pd.crosstab(places["component"], places["depth"]).reindex(index=COMPONENTS, columns=DEPTHS, fill_value=0)
    return counts / max(1, len(places))


def shares(profile: pd.DataFrame) -> dict:
    """The profile's margins, as ``share <component>`` and ``share <depth>``."""
    parts = pd.concat([profile.sum(axis=1), profile.sum(axis=0)])
    return {f"share {name}": share for name, share in parts.items()}


def score_profiles(summaries: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """The share of all score, not of the top-K alone, in each component and depth; empty where a model has nothing."""
    placed = []
    for summary in summaries:
        n_layers = _n_layers(summary)
        total = summary["score_sum"].sum()
        places = [place_of(name) for name in summary["parameter"]]
        placed.append(
            pd.DataFrame(
                {
                    "component": [place.component for place in places],
                    "depth": [_depth_bin(place.depth, n_layers) for place in places],
                    "score": summary["score_sum"].to_numpy(float) / (total if total > 0 else np.nan),
                }
            )
        )
    return [
        places.pivot_table(index="component", columns="depth", values="score", aggfunc="sum").reindex(
            index=COMPONENTS, columns=DEPTHS
        )
        for places in _place_alike(placed)
    ]


def cosine(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Cosine of two profiles: 0 if the top weights share no cell, 1 if their shares are equal."""
    x, y = first.to_numpy().ravel(), second.to_numpy().ravel()
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm else float("nan")


def rank_agreement(first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, int]:
    """Spearman's rho of two score profiles over the cells that both models have, and how many those are."""
    x, y = first.to_numpy().ravel(), second.to_numpy().ravel()
    both = ~np.isnan(x) & ~np.isnan(y)
    x, y = x[both], y[both]
    if len(x) < MIN_POINTS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), len(x)
    return spearman_rho(x, y), len(x)


def gini(values: np.ndarray) -> float:
    """Gini coefficient sum_i (2 i - n - 1) x_i / (n sum x) of non-negative values, sorted upwards (Gini 1912).

    0 when all are equal, (n - 1) / n when one holds everything; NaN when all are 0.
    """
    x = np.sort(np.asarray(values, dtype=float))
    n = len(x)
    assert n and x[0] >= 0, "expected at least one value, none of them negative"
    return float(((2 * np.arange(1, n + 1) - n - 1) * x).sum() / (n * x.sum())) if x.sum() > 0 else float("nan")
