"""Figures of where the most critical weights sit: which component, how deep, in one model or in several."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from bridge.analysis.components import COMPONENTS, ModelComponents, decoder_part
from bridge.analysis.profiles import components_of_weights
from bridge.report.evidence import Evidence
from bridge.report.figure_style import LIGHT, WIDTH, Theme, drawn_in, plain, save

MAX_NUMBERED_LAYERS = 40  # of more, the counts are shown by colour alone
MAX_TICKS = 34
_NO_LAYER = -1


def where_top_weights_sit(evidence: Evidence, path: Path, theme: Theme = LIGHT) -> Path | None:
    """How many of each metric's global top-K weights lie in each component of each decoder layer.

    Fused projections are taken apart where the model's metadata tells how.
    """
    metrics = evidence.baseline_last(metric for metric, top in evidence.top_weights.items() if len(top))
    if not metrics:
        return None
    counts = {}
    for metric in metrics:
        counts[metric] = component_counts(evidence.top_weights[metric], evidence.summaries.get(metric), evidence.model)
    in_use = {component for table in counts.values() for component in table.index}
    components = [component for component in COMPONENTS if component in in_use]
    depths = sorted({int(depth) for table in counts.values() for depth in table.columns})
    largest = max(1.0, *(table.to_numpy().max() for table in counts.values()))
    without_frame = {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
    with drawn_in(theme, without_frame):
        figure = Figure(figsize=(WIDTH, (0.27 * len(components) + 0.75) * len(metrics) + 0.3), layout="constrained")
        panels = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
        for axes, metric in zip(panels, metrics, strict=True):
            grid = counts[metric].reindex(index=components, columns=depths, fill_value=0).to_numpy()
            _draw_counts(axes, grid, largest, theme)
            axes.set_title(f"top {len(evidence.top_weights[metric])} by {plain(metric)}")
            axes.set_yticks(range(len(components)), components)
            axes.tick_params(length=0)
        labels = ["none" if depth == _NO_LAYER else str(depth) for depth in depths]
        step = -(-len(depths) // MAX_TICKS)
        panels[-1].set_xticks(range(0, len(depths), step), labels[::step])
        panels[-1].set_xlabel("decoder layer (none: embedding, head, last norm)")
        return save(figure, path)


def component_counts(weights: pd.DataFrame, summary: pd.DataFrame | None, model: Mapping[str, Any]) -> pd.DataFrame:
    """How many weights lie in each component (rows) of each decoder layer (columns; -1 outside the layers).

    Args:
        weights: table TOP_WEIGHTS.
        summary: table LAYER_SUMMARY; the components of its parameters are counted even where they hold no weight.
        model: metadata of the model, by which fused projections are taken apart.
    """
    n_weights: dict[str, int] = {}
    if summary is not None:
        n_weights = dict(zip(summary["parameter"], summary["n_weights"], strict=True))
    components = ModelComponents(n_weights, model)
    rows = []
    for parameter in n_weights:
        rows += [(component, _depth(parameter), 0) for component in components.of_parameter(parameter)]
    for parameter, component in zip(weights["parameter"], components_of_weights(weights, components), strict=True):
        rows.append((component, _depth(parameter), 1))
    table = pd.DataFrame(rows, columns=["component", "depth", "count"])
    return table.groupby(["component", "depth"])["count"].sum().unstack(fill_value=0)


def _depth(parameter: str) -> int:
    depth = decoder_part(parameter).depth
    return _NO_LAYER if depth is None else depth


def _draw_counts(axes: Axes, grid: np.ndarray, largest: float, theme: Theme) -> None:
    """Counts, (components, depths), as shades of their square root, and as numbers where there is room."""
    shades = LinearSegmentedColormap.from_list("shades", [theme.paper, theme.series[0], theme.ink])
    axes.imshow(np.sqrt(grid), cmap=shades, aspect="auto", vmin=0, vmax=largest**0.5)
    if grid.shape[1] > MAX_NUMBERED_LAYERS:
        return
    for (row, column), count in np.ndenumerate(grid):
        if count:
            is_dark = count**0.5 / largest**0.5 > 0.35
            ink = theme.paper if is_dark else theme.ink
            axes.text(column, row, str(int(count)), ha="center", va="center", fontsize=7, color=ink)


def compared_profiles(profiles: dict[str, pd.DataFrame], metric: str, path: Path, theme: Theme = LIGHT) -> Path:
    """Share of each model's top-K by component and by relative depth.

    Args:
        profiles: by model its profile; see ``analysis.profiles.top_weight_profiles``.
        metric: whose top-K.
        path: of the figure.
        theme: its colours.
    """
    by_component = pd.DataFrame({name: profile.sum(axis=1) for name, profile in profiles.items()})
    by_component = by_component[(by_component > 0).any(axis=1)]
    by_depth = pd.DataFrame({name: profile.sum(axis=0) for name, profile in profiles.items()})
    with drawn_in(theme):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_shares(left, by_component, theme)
        left.set_title("by component")
        _draw_shares(right, by_depth, theme)
        right.set_title("by relative depth")
        figure.supxlabel(f"share of the top weights by {plain(metric)}", fontsize=9)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
        return save(figure, path)


def _draw_shares(axes: Axes, shares: pd.DataFrame, theme: Theme) -> None:
    """One row a category, one mark a model, a line from the smallest to the largest share."""
    rows = np.arange(len(shares))
    axes.hlines(rows, shares.min(axis=1), shares.max(axis=1), color=theme.quiet, linewidth=1.5)
    for index, name in enumerate(shares.columns):
        colour, marker = theme.look(index)
        axes.plot(shares[name], rows, marker, color=colour, markersize=6, alpha=0.85, clip_on=False, label=plain(name))
    axes.set_yticks(rows, shares.index)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlim(left=0)
