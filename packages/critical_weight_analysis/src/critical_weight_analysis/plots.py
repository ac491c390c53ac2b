"""Pictures of rankings: where in the model the top weights sit, how fast the scores fall, how stable both are."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from bridge.exchange.atomic_file import atomic_path
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

OUTSIDE = "outside"  # the column of parameters that belong to no decoder layer
_LAYER_NUMBER = re.compile(r"^(.*?)\.(\d+)\.(.*)$")


def component_and_layer(parameter: str) -> tuple[str, int | None]:
    """A parameter's name within its decoder layer, and that layer's number.

    ``gpt_neox.layers.5.mlp.dense_h_to_4h.weight`` -> ``mlp.dense_h_to_4h.weight``, 5; a name without a number
    -> the name, None.
    """
    found = _LAYER_NUMBER.match(parameter)
    return (found.group(3), int(found.group(2))) if found else (parameter, None)


def count_grid(summary: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column of LAYER_SUMMARY by component (rows, in model order) and decoder layer (columns)."""
    places = [component_and_layer(parameter) for parameter in summary["parameter"]]
    layers = sorted({layer for _, layer in places if layer is not None})
    columns: list[int | str] = [*layers]
    if any(layer is None for _, layer in places):
        columns.insert(0, OUTSIDE)
    grid = pd.DataFrame(np.nan, index=list(dict.fromkeys(c for c, _ in places)), columns=columns)
    for (component, layer), count in zip(places, summary[column], strict=True):
        grid.loc[component, OUTSIDE if layer is None else layer] = count
    return grid


def plot_heat_map(summary: pd.DataFrame, k: int, metric: str, path: Path) -> None:
    """Draw how many of the top-K weights each component of each decoder layer holds.

    The colours are logarithmic, or one embedding with half of the weights would hide the rest; a cell is grey
    where a parameter holds none, and blank where there is no such parameter.
    """
    grid = count_grid(summary, f"in_top_{k}")
    counts = grid.to_numpy()
    figure = Figure(figsize=(3 + 0.32 * max(8, grid.shape[1]), 1.8 + 0.3 * len(grid)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.ma.masked_where(counts != 0, counts), aspect="auto", cmap=ListedColormap(["#e8e8e8"]))
    held = np.ma.masked_where(~(counts > 0), counts)
    image = axes.imshow(held, aspect="auto", cmap="viridis_r", norm=LogNorm(1, max(2, np.nanmax(counts))))
    axes.set_yticks(range(len(grid)), grid.index, fontsize=8)
    axes.set_xticks(range(grid.shape[1]), [str(c) for c in grid.columns], fontsize=7, rotation=90)
    axes.set(xlabel="decoder layer", ylabel="component", title=f"Where the top {k} weights by {metric} are")
    figure.colorbar(image, label=f"weights in the top {k}")
    _save(figure, path)


def plot_scores_by_rank(tops: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw score against rank, both logarithmic, one panel a metric; a score of 0 has no place on it."""
    figure = Figure(figsize=(4.2 * len(tops), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tops), squeeze=False)[0]
    for axes, (metric, top) in zip(panels, tops.items(), strict=True):
        positive = top[top["score"] > 0]
        axes.plot(positive["rank"], positive["score"], marker=".", markersize=3, linewidth=1)
        axes.set(xlabel="rank", ylabel="score", title=metric)
        if len(positive):
            axes.set(xscale="log", yscale="log")
    _save(figure, path)


def plot_stability(table: pd.DataFrame, path: Path) -> None:
    """Draw the Jaccard overlap of the top-K against K: of two halves of the corpus, of two splits, of two metrics.

    A point is one comparison, the line goes through the means; the dashed line is what the same weights share when
    their gradients are dealt out anew, grey what two random sets share.
    """
    kinds = {"halves": "two halves", "seeds": "first halves of two splits", "metrics": "two metrics, whole corpus"}
    shown = [kind for kind in kinds if (table["kind"] == kind).any()]
    figure = Figure(figsize=(4.2 * len(shown), 3.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown, strict=True):
        for (metric, other), rows in table[table["kind"] == kind].groupby(["metric", "other"], sort=False):
            (points,) = axes.plot(rows["k"], rows["jaccard"], ".", alpha=0.5)
            label = metric if metric == other else f"{metric}, {other}"
            axes.plot(rows.groupby("k")["jaccard"].mean(), color=points.get_color(), label=label)
            if rows["jaccard_null"].notna().any():
                null = rows.groupby("k")["jaccard_null"].mean()
                axes.plot(null, color=points.get_color(), linestyle="--", label=f"{label}, null")
        axes.plot(table.groupby("k")["jaccard_chance"].first(), color="grey", linestyle=":", label="chance")
        axes.set(xscale="log", xlabel="K", title=kinds[kind], ylim=(-0.03, 1.03))
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("Jaccard overlap of the top-K")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
