"""Figures of where the most critical weights sit: which component, how deep, in one model or in several."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from bridge.analysis.components import COMPONENTS, Layout, place_of
from bridge.report.figure_style import LIGHT, MARKERS, Theme, metric_order, plain, save, style


def where_top_weights_sit(
    top_weights: dict[str, pd.DataFrame],
    summaries: dict[str, pd.DataFrame],
    model: dict,
    path: Path,
    theme: Theme = LIGHT,
) -> Path | None:
    """How many of each metric's global top-K weights lie in each component of each decoder layer.

    Fused projections are taken apart where ``model``, the facts of the discovery's manifest, tells how.
    """
    metrics = [m for m in metric_order(pd.Series(list(top_weights), dtype=str)) if len(top_weights[m])]
    if not metrics:
        return None
    counts = {metric: _place_counts(top_weights[metric], summaries.get(metric), model) for metric in metrics}
    rows = [component for component in COMPONENTS if any(component in table.index for table in counts.values())]
    columns = sorted({depth for table in counts.values() for depth in table.columns})
    largest = max(table.to_numpy().max() for table in counts.values())
    with mpl.rc_context(style(theme) | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(8.4, (0.27 * len(rows) + 0.75) * len(metrics) + 0.3), layout="constrained")
        shades = LinearSegmentedColormap.from_list("shades", [theme.paper, theme.series[0], theme.ink])
        for axes, metric in zip(
            figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0], metrics, strict=True
        ):
            grid = counts[metric].reindex(index=rows, columns=columns, fill_value=0).to_numpy()
            image = axes.imshow(np.sqrt(grid), cmap=shades, aspect="auto", vmin=0, vmax=max(1.0, largest) ** 0.5)
            _write_counts(axes, grid, image, theme)
            axes.set_title(f"top {len(top_weights[metric])} by {plain(metric)}")
            axes.set_yticks(range(len(rows)), rows)
            axes.tick_params(length=0)
        labels = ["none" if depth < 0 else str(depth) for depth in columns]
        step = -(-len(columns) // 34)
        axes.set_xticks(range(0, len(columns), step), labels[::step])
        axes.set_xlabel("decoder layer (none: embedding, head, last norm)")
        return save(figure, path)


def _place_counts(weights: pd.DataFrame, summary: pd.DataFrame | None, model: dict) -> pd.DataFrame:
    """Counts, (component, depth); depth -1 outside the layers. Empty places of the model are counted as 0."""
    sizes = {} if summary is None else dict(zip(summary["parameter"], map(int, summary["n_weights"]), strict=True))
    layout = Layout(sizes, model)
    known = [(component, place_of(name).depth, 0) for name in sizes for component in layout.components(name)]
    held = [
        (
            layout.component(w.parameter, int(w.row), None if pd.isna(w.col) else int(w.col)),
            place_of(w.parameter).depth,
            1,
        )
        for w in weights.itertuples()
    ]
    frame = pd.DataFrame([*known, *held], columns=["component", "depth", "count"])
    frame["depth"] = frame["depth"].fillna(-1).astype(int)
    return frame.groupby(["component", "depth"])["count"].sum().unstack(fill_value=0)


def _write_counts(axes: Axes, grid: np.ndarray, image: object, theme: Theme) -> None:
    if grid.shape[1] > 40:
        return
    for (row, column), count in np.ndenumerate(grid):
        if count:
            deep = image.norm(count**0.5) > 0.35
            axes.text(
                column, row, int(count), ha="center", va="center", fontsize=7, color=theme.paper if deep else theme.ink
            )


def compared_profiles(profiles: dict[str, pd.DataFrame], metric: str, path: Path, theme: Theme = LIGHT) -> Path:
    """Share of each model's top-K by component and by relative depth; profiles as ``bridge.profiles`` makes them."""
    parts = [("component", 1), ("relative depth", 0)]
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (title, axis) in zip(panels, parts, strict=True):
            shares = pd.DataFrame({name: profile.sum(axis=axis) for name, profile in profiles.items()})
            shares = shares[(shares > 0).any(axis=1)] if axis else shares
            _dots(axes, shares, theme)
            axes.set_title(f"by {title}")
        figure.supxlabel(f"share of the top weights by {plain(metric)}", fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
        return save(figure, path)


def _dots(axes: Axes, shares: pd.DataFrame, theme: Theme) -> None:
    """One row a category, one mark a model, a line from the smallest to the largest share."""
    rows = np.arange(len(shares))
    axes.hlines(rows, shares.min(axis=1), shares.max(axis=1), color=theme.quiet, linewidth=1.5)
    for index, name in enumerate(shares.columns):
        colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
        axes.plot(shares[name], rows, marker, color=colour, markersize=6, alpha=0.85, clip_on=False, label=plain(name))
    axes.set_yticks(rows, shares.index)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlim(left=0)
