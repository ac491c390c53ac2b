"""The figures of a validation's effects, as PNG files.

Each function draws one figure into ``path`` and returns it, or None if there is nothing to draw.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bridge.analysis.components import place_of
from bridge.analysis.correlation import ALL, top_against_random
from bridge.analysis.single_weights import sampled_metrics, weight_effects
from bridge.report.figure_style import LIGHT, MARKERS, Theme, metric_order, plain, save, style, symlog

NATS_METRICS = frozenset({"grad_x_weight", "obd", "taylor2"})  # their score estimates the change itself
MAX_ROWS = 40
MAX_CURVES = 6
_EFFECT = "measured change of loss (nats per token)"


def _single_setting(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first perturbation at its largest k."""
    frame = frame[frame["perturbation"] == frame["perturbation"].iloc[0]]
    return frame[frame["k"] == frame["k"].max()]


def _noise(table: pd.DataFrame) -> float:
    """The size of a typical random effect; below it an axis need not tell values apart. 0 if there is none."""
    sizes = table[["random_low", "random_high"]].abs().to_numpy(float)
    sizes = sizes[np.isfinite(sizes)]
    return float(np.median(sizes)) if len(sizes) else 0.0


def predicted_and_measured(
    measurements: pd.DataFrame, correlations: pd.DataFrame, path: Path, theme: Theme = LIGHT
) -> Path | None:
    """For each metric, the score of every layer's perturbed weights against the measured effect."""
    tops = measurements[measurements["selection"].str.startswith("top_") & (measurements["target_layer"] != ALL)]
    if tops.empty:
        return None
    tops = _single_setting(tops)
    metrics = metric_order(tops["selection"].str.removeprefix("top_"))
    with mpl.rc_context(style(theme)):
        columns = min(3, len(metrics))
        rows = -(-len(metrics) // columns)
        width = 8.4 if columns > 1 else 5.0
        figure = Figure(figsize=(width, 3.3 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axes, metric in zip(panels, metrics, strict=False):
            _scatter(axes, tops[tops["selection"] == f"top_{metric}"], metric, theme)
            rho = _rho_title(correlations, "layers", metric, tops["perturbation"].iloc[0], tops["k"].iloc[0])
            axes.set_title(f"{plain(metric)}\n{rho}")
        for axes in panels[len(metrics) :]:
            axes.set_visible(False)
        symlog(panels[0], "y", tops["delta_nll"].to_numpy(float), _noise(top_against_random(measurements)))
        figure.supylabel(_EFFECT, fontsize=9)
        figure.supxlabel("predicted: sum of the scores of the perturbed weights", fontsize=9)
        _legend(figure, panels[: len(metrics)])
        return save(figure, path)


def _errors(rows: pd.DataFrame) -> np.ndarray:
    """How far the interval reaches below and above the effect, (2, n); 0 where there is none."""
    ends, effect = rows[["ci_low", "ci_high"]].to_numpy(float).T, rows["delta_nll"].to_numpy(float)
    known = np.isfinite(ends) & np.isfinite(effect)
    return np.abs(np.where(known, ends, 0) - np.where(known, effect, 0))


def _legend(figure: Figure, panels: np.ndarray) -> None:
    """One legend for all panels, each label once."""
    pairs = [panel.get_legend_handles_labels() for panel in panels]
    entries = {label: handle for handles, labels in pairs for handle, label in zip(handles, labels, strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=6)


def _scatter(axes: Axes, points: pd.DataFrame, metric: str, theme: Theme) -> None:
    families = points["target_layer"].map(lambda layer: place_of(layer).component.split()[0])
    x, y = points["score_sum"].to_numpy(float), points["delta_nll"].to_numpy(float)
    if (x > 0).all():
        axes.set_xscale("log")
    ceiling = np.max(y[np.isfinite(y)], initial=1.0)
    finite = np.isfinite(y)
    drawn = np.where(finite, y, 2 * ceiling)
    errors = _errors(points)
    for index, family in enumerate(["attention", "mlp", "other"]):
        chosen = (families == family) if family != "other" else ~families.isin(["attention", "mlp"])
        look = {"color": theme.series[index], "markersize": 4.5, "elinewidth": 0.8, "label": family}
        if not chosen.any():
            continue
        axes.errorbar(x[chosen], drawn[chosen], errors[:, chosen], fmt=MARKERS[index], linestyle="none", **look)
    axes.plot(
        x[~finite], drawn[~finite], "^", color=theme.ink, markersize=8, label="infinite" if any(~finite) else None
    )
    if metric in NATS_METRICS and (points["perturbation"] == "zero").all() and len(x):
        line = np.geomspace(x.min(), x.max(), 50) if (x > 0).all() else np.linspace(x.min(), x.max(), 50)
        axes.plot(line, line, color=theme.quiet, linestyle="--", linewidth=1, label="equal", zorder=1)


def _rho_title(correlations: pd.DataFrame, unit: str, metric: str, perturbation: str, k: int) -> str:
    row = correlations[
        (correlations["unit"] == unit)
        & (correlations["metric"] == metric)
        & (correlations["perturbation"] == perturbation)
        & (correlations["k"] == k)
    ]
    if row.empty or row["spearman"].isna().all():
        return "no rank correlation"
    row = row.iloc[0]
    return f"ρ = {row['spearman']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}], n = {row['n']}".replace("-", "−")


def single_weights(
    measurements: pd.DataFrame,
    sampled: pd.DataFrame | None,
    correlations: pd.DataFrame,
    path: Path,
    theme: Theme = LIGHT,
) -> Path | None:
    """For each metric, the score of every single weight against the size of its measured effect."""
    effects = weight_effects(measurements, sampled)
    if effects.empty:
        return None
    perturbation = effects["perturbation"].iloc[0]
    effects = effects[effects["perturbation"] == perturbation]
    metrics = metric_order(pd.Series(sampled_metrics(sampled)))
    with mpl.rc_context(style(theme)):
        columns = min(3, len(metrics))
        rows = -(-len(metrics) // columns)
        figure = Figure(figsize=(8.4 if columns > 1 else 5.0, 3.0 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axes, metric in zip(panels, metrics, strict=False):
            _weight_scatter(axes, effects, metric, perturbation, theme)
            axes.set_title(f"{plain(metric)}\n{_rho_title(correlations, 'weights', metric, perturbation, 1)}")
        for axes in panels[len(metrics) :]:
            axes.set_visible(False)
        figure.supylabel("size of the change of loss (nats per token)", fontsize=9)
        figure.supxlabel("predicted: score of the weight", fontsize=9)
        _legend(figure, panels[: len(metrics)])
        return save(figure, path)


def _weight_scatter(axes: Axes, effects: pd.DataFrame, metric: str, perturbation: str, theme: Theme) -> None:
    x, y = _on_log_axis(effects[f"score_{metric}"]), _on_log_axis(effects["size"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    kinds = {"loss higher": effects["delta_nll"] > 0, "loss lower": effects["delta_nll"] <= 0}
    for index, (label, chosen) in enumerate(kinds.items()):
        look = {"color": theme.series[index], "marker": MARKERS[index], "markersize": 4, "label": label}
        if chosen.any():
            axes.plot(x[chosen], y[chosen], linestyle="none", alpha=0.8, **look)
    ends = max(x.min(), y.min()), min(x.max(), y.max())
    if metric in NATS_METRICS and perturbation == "zero" and ends[0] < ends[1]:
        line = np.geomspace(*ends, 50)
        axes.plot(line, line, color=theme.quiet, linestyle="--", linewidth=1, label="equal", zorder=1)


def _on_log_axis(values: pd.Series) -> np.ndarray:
    """Sizes as a logarithmic axis can show them: zero as half of the smallest, infinity as twice the largest."""
    sizes = values.to_numpy(float)
    shown = sizes[np.isfinite(sizes) & (sizes > 0)]
    low, high = (shown.min(), shown.max()) if len(shown) else (1.0, 1.0)
    return np.where(sizes > 0, np.minimum(sizes, 2 * high), low / 2)


def effect_by_layer(measurements: pd.DataFrame, path: Path, theme: Theme = LIGHT) -> Path | None:
    """Each layer's effect by metric, over the range of random sets of the same size; largest effects first."""
    table = top_against_random(measurements)
    table = table[table["target_layer"] != ALL]
    if table.empty:
        return None
    table = _single_setting(table)
    order = table.groupby("target_layer", sort=False)["delta_nll"].max().sort_values(ascending=False, kind="stable")
    layers = list(order.index[:MAX_ROWS])
    place = {layer: index for index, layer in enumerate(layers)}
    table = table[table["target_layer"].isin(place)]
    with mpl.rc_context(style(theme)):
        figure = Figure(figsize=(8.4, 0.21 * len(layers) + 1.3), layout="constrained")
        axes = figure.subplots()
        symlog(axes, "x", table[["delta_nll", "random_low", "random_high"]].to_numpy(float).ravel(), _noise(table))
        _random_ranges(axes, table, place, theme)
        metrics = metric_order(table["metric"])
        for index, metric in enumerate(metrics):
            rows = table[(table["metric"] == metric) & np.isfinite(table["delta_nll"])]
            height = rows["target_layer"].map(place) + 0.22 * (index - (len(metrics) - 1) / 2)
            colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
            look = {"color": colour, "markersize": 4, "elinewidth": 0.8, "label": f"top by {plain(metric)}"}
            axes.errorbar(rows["delta_nll"], height, xerr=_errors(rows), fmt=marker, linestyle="none", **look)
        axes.set_yticks(range(len(layers)), [plain(layer) for layer in layers], fontsize=7.5)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlabel(_EFFECT)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return save(figure, path)


def _random_ranges(axes: Axes, table: pd.DataFrame, place: dict[str, int], theme: Theme) -> None:
    rows = table.drop_duplicates("target_layer").dropna(subset=["random_low"])
    rows = rows[np.isfinite(rows["random_high"])]
    if rows.empty:
        return
    height = rows["target_layer"].map(place)
    axes.hlines(
        height, rows["random_low"], rows["random_high"], color=theme.quiet, linewidth=6, label="random, range of draws"
    )
    axes.plot(rows["random_mean"], height, "|", color=theme.ink, markersize=6)


def ablation(measurements: pd.DataFrame, path: Path, theme: Theme = LIGHT) -> Path | None:
    """The effect against k for the targets measured at several k: ALL first, then those of largest effect."""
    table = top_against_random(measurements)
    if not table.empty:
        table = table[table["perturbation"] == table["perturbation"].iloc[0]]
        table = table[table.groupby("target_layer")["k"].transform("nunique") > 1]
    if table.empty:
        return None
    largest = table.groupby("target_layer", sort=False)["delta_nll"].max().sort_values(ascending=False, kind="stable")
    targets = sorted(largest.index, key=lambda target: target != ALL)[:MAX_CURVES]
    columns = min(3, len(targets))
    with mpl.rc_context(style(theme)):
        rows = -(-len(targets) // columns)
        figure = Figure(figsize=(8.4 if columns > 1 else 5.0, 2.7 * rows + 0.6), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axes, target in zip(panels, targets, strict=False):
            _curves(axes, table[table["target_layer"] == target], metric_order(table["metric"]), theme)
            axes.set_title("all weights" if target == ALL else plain(target), fontsize=8)
        for axes in panels[len(targets) :]:
            axes.set_visible(False)
        figure.supxlabel("k, number of weights perturbed", fontsize=9)
        figure.supylabel(_EFFECT, fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return save(figure, path)


def _curves(axes: Axes, table: pd.DataFrame, metrics: list[str], theme: Theme) -> None:
    axes.set_xscale("log")
    symlog(axes, "y", table[["delta_nll", "random_low", "random_high"]].to_numpy(float).ravel(), _noise(table))
    for index, metric in enumerate(metrics):
        curve = table[(table["metric"] == metric) & np.isfinite(table["delta_nll"])].sort_values("k")
        colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
        axes.plot(curve["k"], curve["delta_nll"], marker=marker, color=colour, markersize=4, label=plain(metric))
        axes.fill_between(curve["k"], curve["ci_low"], curve["ci_high"], color=colour, alpha=0.15, linewidth=0)
    random = table.drop_duplicates("k").dropna(subset=["random_mean"]).sort_values("k")
    if len(random):
        axes.plot(random["k"], random["random_mean"], color=theme.ink, linestyle=":", label="random, mean and range")
        axes.fill_between(random["k"], random["random_low"], random["random_high"], color=theme.quiet, alpha=0.35)
