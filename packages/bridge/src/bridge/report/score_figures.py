"""Figures of predicted against measured: the scores of layers, and of single weights, against their effects.

Each function draws one figure into ``path`` and returns it, or None if there is nothing to draw.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from bridge.analysis.claims import MEASURED, POPULATION, is_weighted
from bridge.analysis.components import decoder_part
from bridge.analysis.measured_sets import rows_where, single_layers
from bridge.exchange import layout
from bridge.report.evidence import Evidence
from bridge.report.figure_style import (
    EFFECT_LABEL,
    LIGHT,
    Theme,
    common_legend,
    drawn_in,
    error_bars,
    noise_level,
    panel_figure,
    plain,
    save,
    symlog,
)
from bridge.report.phrases import rho_of

FAMILIES = ("attention", "mlp", "other")


def predicted_and_measured(evidence: Evidence, path: Path, theme: Theme = LIGHT) -> Path | None:
    """For each metric, the score of every layer's perturbed weights against the measured effect."""
    perturbation, k = evidence.setting
    tops = single_layers(rows_where(evidence.top_sets, perturbation=perturbation, k=k))
    if tops.empty:
        return None
    metrics = evidence.baseline_last(tops["metric"])
    with drawn_in(theme):
        figure, panels = panel_figure(len(metrics), panel_height=3.3, margin=0.5, sharey=True)
        for axes, metric in zip(panels, metrics, strict=True):
            layers = rows_where(tops, metric=metric)
            _draw_layers(axes, layers, theme)
            if perturbation == "zero" and evidence.definitions[metric].estimates_loss_change:
                _draw_identity(axes, layers["score_sum"].min(), layers["score_sum"].max(), theme)
            rho = _rho_title(rows_where(evidence.correlations, unit="layers", metric=metric), perturbation, k)
            axes.set_title(f"{plain(metric)}\n{rho}")
        symlog(panels[0], "y", tops["delta_nll"].to_numpy(float), noise_level(evidence.top_against_random))
        figure.supylabel(EFFECT_LABEL, fontsize=9)
        figure.supxlabel("predicted: sum of the scores of the perturbed weights", fontsize=9)
        common_legend(figure, panels)
        return save(figure, path)


def _draw_layers(axes: Axes, layers: pd.DataFrame, theme: Theme) -> None:
    """One point a layer, by family of its component; an infinite effect at twice the largest finite one."""
    score = layers["score_sum"].to_numpy(float)
    effect = layers["delta_nll"].to_numpy(float)
    if (score > 0).all():
        axes.set_xscale("log")
    finite = np.isfinite(effect)
    ceiling = np.max(effect[finite], initial=1.0)
    height = np.where(finite, effect, 2 * ceiling)
    errors = error_bars(layers)
    families = np.array([_family(layer) for layer in layers["target_layer"]])
    for index, family in enumerate(FAMILIES):
        chosen = families == family
        if chosen.any():
            look = theme.look(index)
            axes.errorbar(
                score[chosen],
                height[chosen],
                errors[:, chosen],
                fmt=look.marker,
                color=look.colour,
                linestyle="none",
                markersize=4.5,
                elinewidth=0.8,
                label=family,
            )
    if not finite.all():
        axes.plot(score[~finite], height[~finite], "^", color=theme.ink, markersize=8, label="infinite")


def _family(layer: str) -> str:
    """The first word of a layer's component: attention or mlp; else other."""
    family = decoder_part(layer).component.split()[0]
    return family if family in FAMILIES else "other"


def single_weights(evidence: Evidence, path: Path, theme: Theme = LIGHT) -> Path | None:
    """For each metric, the score of every single weight against the size of its measured effect."""
    if evidence.weight_effects.empty:
        return None
    perturbation = evidence.weight_effects["perturbation"].iloc[0]
    effects = rows_where(evidence.weight_effects, perturbation=perturbation)
    metrics = evidence.baseline_last(evidence.sampled_metrics)
    with drawn_in(theme):
        figure, panels = panel_figure(len(metrics), panel_height=3.0, margin=0.5, sharey=True)
        for axes, metric in zip(panels, metrics, strict=True):
            score = _on_log_axis(effects[layout.score_column(metric)].to_numpy(float))
            size = _on_log_axis(effects["size"].to_numpy(float))
            _draw_weights(axes, score, size, effects["delta_nll"].to_numpy(float) > 0, theme)
            low, high = max(score.min(), size.min()), min(score.max(), size.max())
            if perturbation == "zero" and evidence.definitions[metric].estimates_loss_change and low < high:
                _draw_identity(axes, low, high, theme)
            rho = _rho_title(rows_where(evidence.correlations, unit="weights", metric=metric), perturbation, 1)
            axes.set_title(f"{plain(metric)}\n{rho}")
        figure.supylabel("size of the change of loss (nats per token)", fontsize=9)
        figure.supxlabel("predicted: score of the weight", fontsize=9)
        common_legend(figure, panels)
        return save(figure, path)


def _draw_weights(axes: Axes, score: np.ndarray, size: np.ndarray, loss_rose: np.ndarray, theme: Theme) -> None:
    """One point a weight, by whether perturbing it raised or lowered the loss. All arrays: (n,)."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for index, (label, chosen) in enumerate([("loss higher", loss_rose), ("loss lower", ~loss_rose)]):
        if chosen.any():
            look = theme.look(index)
            axes.plot(
                score[chosen],
                size[chosen],
                color=look.colour,
                marker=look.marker,
                markersize=4,
                linestyle="none",
                alpha=0.8,
                label=label,
            )


def _on_log_axis(sizes: np.ndarray) -> np.ndarray:
    """Sizes as a logarithmic axis can show them: zero as half of the smallest, infinity as twice the largest."""
    finite = sizes[np.isfinite(sizes) & (sizes > 0)]
    low, high = (finite.min(), finite.max()) if len(finite) else (1.0, 1.0)
    return np.where(sizes > 0, np.minimum(sizes, 2 * high), low / 2)


def _draw_identity(axes: Axes, low: float, high: float, theme: Theme) -> None:
    """The dashed line on which prediction and effect are equal, from ``low`` to ``high``."""
    line = np.geomspace(low, high, 50) if low > 0 else np.linspace(low, high, 50)
    axes.plot(line, line, color=theme.quiet, linestyle="--", linewidth=1, label="equal", zorder=1)


def _rho_title(correlations: pd.DataFrame, perturbation: str, k: int) -> str:
    """The rank correlation of a panel; ``correlations``: the rows of its unit and metric.

    That of its points; where these were chosen with different probabilities, first the estimate for all units.
    """
    rows = rows_where(correlations, perturbation=perturbation, k=k)
    if rows.empty or rows["spearman"].isna().all():
        return "no rank correlation"
    row = rows.iloc[0]
    if is_weighted(row):
        return f"ρ = {rho_of(row, POPULATION)} over all\n{rho_of(row, MEASURED)} over {row['n']} drawn"
    return f"ρ = {rho_of(row, MEASURED)}, n = {row['n']}"
