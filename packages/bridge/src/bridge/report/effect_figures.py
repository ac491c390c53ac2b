"""Figures of measured effects next to those of random weights: layer by layer, and against the number of weights.

Each function draws one figure into ``path`` and returns it, or None if there is nothing to draw.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bridge.analysis.measured_sets import rows_where
from bridge.exchange import layout
from bridge.report.evidence import Evidence
from bridge.report.figure_style import (
    EFFECT_LABEL,
    LIGHT,
    WIDTH,
    Theme,
    drawn_in,
    error_bars,
    noise_level,
    panel_figure,
    plain,
    save,
    symlog,
)

MAX_LAYERS = 40
MAX_CURVES = 6


def effect_by_layer(evidence: Evidence, path: Path, theme: Theme = LIGHT) -> Path | None:
    """Each layer's effect by metric, over the range of random sets of the same size; largest effects first."""
    effects = evidence.layer_effects
    if effects.empty:
        return None
    largest = effects.groupby("target_layer", sort=False)["delta_nll"].max()
    layers = largest.sort_values(ascending=False, kind="stable").index[:MAX_LAYERS].tolist()
    effects = effects[effects["target_layer"].isin(layers)]
    effects = effects.assign(height=effects["target_layer"].map({layer: row for row, layer in enumerate(layers)}))
    metrics = evidence.baseline_last(effects["metric"])
    with drawn_in(theme):
        figure = Figure(figsize=(WIDTH, 0.21 * len(layers) + 1.3), layout="constrained")
        axes = figure.subplots()
        symlog(axes, "x", _effects_and_draws(effects), noise_level(effects))
        _draw_random_ranges(axes, effects, theme)
        for index, metric in enumerate(metrics):
            from_middle = 0.22 * (index - (len(metrics) - 1) / 2)
            _draw_effects(axes, rows_where(effects, metric=metric), index, from_middle, theme)
        axes.set_yticks(range(len(layers)), [plain(layer) for layer in layers], fontsize=7.5)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlabel(EFFECT_LABEL)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return save(figure, path)


def _effects_and_draws(against_random: pd.DataFrame) -> np.ndarray:
    """All effects that an axis must show, (3 n,)."""
    values: np.ndarray = against_random[["delta_nll", "random_low", "random_high"]].to_numpy(float)
    return values.ravel()


def _draw_random_ranges(axes: Axes, effects: pd.DataFrame, theme: Theme) -> None:
    """A bar from the smallest to the largest random draw of each layer, with a mark at their mean."""
    rows = effects.drop_duplicates("target_layer")  # the draws are the same for every metric
    rows = rows[np.isfinite(rows["random_low"]) & np.isfinite(rows["random_high"])]
    if rows.empty:
        return
    axes.hlines(
        rows["height"],
        rows["random_low"],
        rows["random_high"],
        color=theme.quiet,
        linewidth=6,
        label="random, range of draws",
    )
    axes.plot(rows["random_mean"], rows["height"], "|", color=theme.ink, markersize=6)


def _draw_effects(axes: Axes, effects: pd.DataFrame, index: int, from_middle: float, theme: Theme) -> None:
    """The finite effects of one metric, the figure's series ``index``, at ``from_middle`` of their layers' heights."""
    rows = effects[np.isfinite(effects["delta_nll"])]
    look = theme.look(index)
    metric = effects["metric"].iloc[0]
    axes.errorbar(
        rows["delta_nll"],
        rows["height"] + from_middle,
        xerr=error_bars(rows),
        fmt=look.marker,
        color=look.colour,
        linestyle="none",
        markersize=4,
        elinewidth=0.8,
        label=f"top by {plain(metric)}",
    )


def ablation(evidence: Evidence, path: Path, theme: Theme = LIGHT) -> Path | None:
    """The effect against k for the targets measured at several k: ALL first, then those of largest effect."""
    effects = evidence.top_against_random
    if effects.empty:
        return None
    effects = rows_where(effects, perturbation=effects["perturbation"].iloc[0])
    effects = effects[effects.groupby("target_layer")["k"].transform("nunique") > 1]
    if effects.empty:
        return None
    largest = effects.groupby("target_layer", sort=False)["delta_nll"].max()
    by_effect = largest.sort_values(ascending=False, kind="stable").index
    targets = sorted(by_effect, key=lambda target: target != layout.ALL)[:MAX_CURVES]
    metrics = evidence.baseline_last(effects["metric"])
    with drawn_in(theme):
        figure, panels = panel_figure(len(targets), panel_height=2.7, margin=0.6, sharex=True)
        for axes, target in zip(panels, targets, strict=True):
            _draw_curves(axes, rows_where(effects, target_layer=target), metrics, theme)
            axes.set_title("all weights" if target == layout.ALL else plain(target), fontsize=8)
        figure.supxlabel("k, number of weights perturbed", fontsize=9)
        figure.supylabel(EFFECT_LABEL, fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return save(figure, path)


def _draw_curves(axes: Axes, effects: pd.DataFrame, metrics: list[str], theme: Theme) -> None:
    """One target's curve by each metric with its intervals, and the mean and range of its random draws."""
    axes.set_xscale("log")
    symlog(axes, "y", _effects_and_draws(effects), noise_level(effects))
    for index, metric in enumerate(metrics):
        curve = rows_where(effects, metric=metric).sort_values("k")
        curve = curve[np.isfinite(curve["delta_nll"])]
        colour, marker = theme.look(index)
        axes.plot(curve["k"], curve["delta_nll"], marker=marker, color=colour, markersize=4, label=plain(metric))
        axes.fill_between(curve["k"], curve["ci_low"], curve["ci_high"], color=colour, alpha=0.15, linewidth=0)
    random = effects.drop_duplicates("k").dropna(subset=["random_mean"]).sort_values("k")
    if len(random):
        axes.plot(random["k"], random["random_mean"], color=theme.ink, linestyle=":", label="random, mean and range")
        axes.fill_between(random["k"], random["random_low"], random["random_high"], color=theme.quiet, alpha=0.35)
