"""Colours, type, panels, scales and saving of the figures: the same data give the same bytes.

The series' colours are those of Okabe and Ito, which the colour-blind tell apart; series differ in marker too, for
print.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bridge.exchange.atomic_file import atomic_path

WIDTH = 8.4  # of a figure, in inches
NARROW_WIDTH = 5.0  # of a figure with one panel
MARKERS = "os^DvPX*"
LONGEST_NAME = 56
EFFECT_LABEL = "measured change of loss (nats per token)"


class SeriesLook(NamedTuple):
    """By what a series is told apart."""

    colour: str
    marker: str


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Paper, ink, quiet lines, and the series' colours."""

    paper: str
    ink: str
    quiet: str
    series: tuple[str, ...]

    def look(self, index: int) -> SeriesLook:
        """Colour and marker of a figure's series ``index``, from 0."""
        return SeriesLook(colour=self.series[index % len(self.series)], marker=MARKERS[index % len(MARKERS)])


LIGHT = Theme(
    paper="#ffffff",
    ink="#1f2328",
    quiet="#b9bfc6",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)
DARK = Theme(
    paper="#16191d",
    ink="#dfe3e8",
    quiet="#5b636d",
    series=("#56b4e9", "#f0874c", "#2fbf95", "#e39cc6", "#e6b84a", "#f0e442"),
)


def drawn_in(theme: Theme, changed: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """Matplotlib's settings while a figure is drawn: those of the theme, some of them changed."""
    settings = _settings(theme) | dict(changed or {})
    return mpl.rc_context(cast(Any, settings))  # the declared type lists every name that matplotlib knows


def _settings(theme: Theme) -> dict[str, Any]:
    """Matplotlib's settings for a theme."""
    names = ["figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"]
    inks = ["text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"]
    quiet = ["axes.edgecolor", "xtick.color", "ytick.color", "grid.color"]
    colours = dict.fromkeys(names, theme.paper) | dict.fromkeys(inks, theme.ink) | dict.fromkeys(quiet, theme.quiet)
    return colours | {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.5,
        "grid.alpha": 0.45,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "figure.dpi": 150,
        "savefig.dpi": 150,
    }


def plain(name: str) -> str:
    """A name as it is, without matplotlib's mathematics; a very long one without its middle."""
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}…{name[-LONGEST_NAME // 2 :]}"
    return name.replace("$", r"\$")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    for axes in figure.axes:
        axes.minorticks_off()
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def panel_figure(
    n_panels: int, panel_height: float, margin: float, *, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, at most three a row. Heights in inches; ``margin`` is the height for its legend."""
    n_columns = min(3, n_panels)
    n_rows = -(-n_panels // n_columns)
    size = (WIDTH if n_columns > 1 else NARROW_WIDTH, panel_height * n_rows + margin)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=sharex, sharey=sharey).ravel().tolist()
    for unused in panels[n_panels:]:
        unused.set_visible(False)
    return figure, panels[:n_panels]


def common_legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend above all panels, each label once."""
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= zip(labels, handles, strict=True)
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=6)


def error_bars(effects: pd.DataFrame) -> np.ndarray:
    """How far the interval reaches below and above each effect, (2, n); 0 where there is none.

    Args:
        effects: columns delta_nll, ci_low and ci_high, n rows.
    """
    ends = effects[["ci_low", "ci_high"]].to_numpy(float).T  # (2, n)
    effect = effects["delta_nll"].to_numpy(float)
    known = np.isfinite(ends) & np.isfinite(effect)
    lengths: np.ndarray = np.abs(np.where(known, ends, 0) - np.where(known, effect, 0))
    return lengths


def noise_level(against_random: pd.DataFrame) -> float:
    """The size of a typical random effect, below which an axis need not tell values apart; 0 if there is none.

    Args:
        against_random: a table of ``analysis.top_against_random``.
    """
    sizes = against_random[["random_low", "random_high"]].abs().to_numpy(float)
    sizes = sizes[np.isfinite(sizes)]
    return float(np.median(sizes)) if len(sizes) else 0.0


def symlog(axes: Axes, axis: str, values: np.ndarray, noise: float = 0.0) -> None:
    """A scale for effects over many orders of magnitude that may be zero or negative.

    It is linear below ``noise``, by default below the quarter of the values that are smallest. Values that span
    little more than an order of magnitude keep their linear scale.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(sizes) or sizes.max() / sizes.min() < 30:
        return
    smallest_shown = noise if 0 < noise < sizes.max() else np.quantile(sizes, 0.25)
    threshold = 10 ** np.floor(np.log10(smallest_shown))
    set_scale = axes.set_xscale if axis == "x" else axes.set_yscale
    set_scale("symlog", linthresh=threshold, linscale=0.6)
