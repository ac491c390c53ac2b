"""The sections of a report: figures and tables in the order in which they are read."""

import base64
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bridge.exchange import layout
from bridge.report import effect_figures, effect_tables, placement_figures, score_figures, score_tables
from bridge.report.evidence import Evidence
from bridge.report.figure_style import DARK, LIGHT, Theme
from bridge.report.text_table import TextTable

Draw = Callable[[Evidence, Path, Theme], Path | None]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure's file, what it shows, and its light and dark pixels as data URIs."""

    file: str
    caption: str
    light: str
    dark: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with its figures and tables."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[TextTable] = field(default_factory=list)


def write_figure(folder: Path, evidence: Evidence, file: str, draw: Draw, caption: str) -> list[Figure]:
    """Draw a figure into the plots of ``folder``, and once more on a dark ground for the page alone.

    Returns:
        The figure; nothing if there is nothing to draw.
    """
    light = draw(evidence, folder / layout.PLOTS_FOLDER / file, LIGHT)
    if light is None:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        dark = Path(scratch) / file
        draw(evidence, dark, DARK)
        return [Figure(file=file, caption=caption, light=_data_uri(light), dark=_data_uri(dark))]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def write_sections(folder: Path, evidence: Evidence) -> list[Section]:
    """All sections, their figures drawn into ``plots`` of ``folder``; a section with nothing in it is left out."""
    (folder / layout.PLOTS_FOLDER).mkdir(exist_ok=True)
    sections = [
        Section(title="The whole model", tables=effect_tables.global_effects(evidence)),
        Section(
            title="Does the score predict the effect?",
            figures=write_figure(
                folder,
                evidence,
                layout.PREDICTED_AND_MEASURED_PLOT,
                score_figures.predicted_and_measured,
                "Each point is a layer: the summed score of its perturbed weights against the measured change "
                "of loss, with its 95 % interval. On the dashed line both are equal.",
            ),
            tables=score_tables.correlations(evidence),
        ),
        Section(
            title="Single weights",
            figures=write_figure(
                folder,
                evidence,
                layout.SINGLE_WEIGHTS_PLOT,
                score_figures.single_weights,
                "Each point is one weight, perturbed alone: its score against the size of the measured change of "
                "loss. On the dashed line both are equal. What is zero is drawn at the edge, half of the smallest.",
            ),
            tables=effect_tables.effects_of_weights(evidence),
        ),
        Section(
            title="Layer by layer",
            figures=write_figure(
                folder,
                evidence,
                layout.EFFECT_BY_LAYER_PLOT,
                effect_figures.effect_by_layer,
                "Change of loss by layer, largest first, with 95 % intervals; grey: the range of random weights "
                f"of the same layer. At most {effect_figures.MAX_LAYERS} layers are drawn.",
            ),
            tables=[*effect_tables.against_random(evidence), *effect_tables.layer_effects(evidence)],
        ),
        Section(
            title="More and more weights",
            figures=write_figure(
                folder,
                evidence,
                layout.ABLATION_PLOT,
                effect_figures.ablation,
                "Change of loss against the number of weights, with 95 % intervals; grey: random weights.",
            ),
            tables=effect_tables.curve_heights(evidence),
        ),
        Section(
            title="Where the most critical weights sit",
            figures=write_figure(
                folder,
                evidence,
                layout.TOP_WEIGHTS_PLOT,
                placement_figures.where_top_weights_sit,
                "How many of the global top-K lie in each component of each decoder layer.",
            ),
            tables=score_tables.top_weights(evidence),
        ),
    ]
    return [section for section in sections if section.figures or section.tables]
