"""Colours, type and saving of the figures: the same data give the same bytes.

The series' colours are those of Okabe and Ito, apart for the colour-blind; series differ in marker too, for
print.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bridge.exchange.tables import atomic_path

MARKERS = "os^DvPX*"
LONGEST_NAME = 56


@dataclass(frozen=True)
class Theme:
    """Paper, ink, quiet lines, and the series' colours."""

    paper: str
    ink: str
    quiet: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1f2328", "#b9bfc6", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"))
DARK = Theme("#16191d", "#dfe3e8", "#5b636d", ("#56b4e9", "#f0874c", "#2fbf95", "#e39cc6", "#e6b84a", "#f0e442"))


def style(theme: Theme) -> dict:
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


def metric_order(metrics: pd.Series) -> list[str]:
    """In the order of the table, the baseline last."""
    return sorted(dict.fromkeys(metrics), key=lambda metric: metric == "magnitude")


def symlog(axes: Axes, axis: str, values: np.ndarray, noise: float = 0.0) -> None:
    """A scale for effects over many orders of magnitude that may be zero or negative.

    It is linear below ``noise``, by default below the quarter of the values that are smallest.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(sizes) or sizes.max() / sizes.min() < 30:
        return
    threshold = 10 ** np.floor(np.log10(noise if 0 < noise < sizes.max() else np.quantile(sizes, 0.25)))
    set_scale = axes.set_xscale if axis == "x" else axes.set_yscale
    set_scale("symlog", linthresh=threshold, linscale=0.6)
