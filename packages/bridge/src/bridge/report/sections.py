"""The sections of a report: figures and tables in the order in which they are read."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bridge.exchange import layout
from bridge.exchange.scratch import scratch_folder
from bridge.report import effect_figures, effect_tables, placement_figures, score_figures, score_tables
from bridge.report.evidence import Evidence
from bridge.report.figure_style import DARK, LIGHT, Theme
from bridge.report.phrases import measured_on
from bridge.report.text_table import TextTable


@dataclass(frozen=True, kw_only=True)
class FigurePlan:
    """How a figure is drawn.

    Attributes:
        file: its name in the folder of plots.
        draw: draws it into a path and returns that, or None if there is nothing to draw.
        caption: what it shows.
    """

    file: str
    draw: Callable[[Evidence, Path, Theme], Path | None]
    caption: str


@dataclass(frozen=True, kw_only=True)
class SectionPlan:
    """What a section holds: at most one figure, and the tables that each of some functions makes.

    ``effects`` says whether they show measured effects; then each says which texts these were measured on.
    """

    title: str
    figure: FigurePlan | None = None
    effects: bool = True
    tables: Sequence[Callable[[Evidence], list[TextTable]]]


SECTIONS = (
    SectionPlan(title="The whole model", tables=[effect_tables.global_effects]),
    SectionPlan(
        title="Does the score predict the effect?",
        figure=FigurePlan(
            file=layout.PREDICTED_AND_MEASURED_PLOT,
            draw=score_figures.predicted_and_measured,
            caption="Each point is a layer: the summed score of its perturbed weights against the measured change "
            "of loss, with its 95 % interval. On the dashed line both are equal.",
        ),
        tables=[score_tables.correlations, score_tables.estimates_for_all],
    ),
    SectionPlan(
        title="Single weights",
        figure=FigurePlan(
            file=layout.SINGLE_WEIGHTS_PLOT,
            draw=score_figures.single_weights,
            caption="Each point is one weight, perturbed alone: its score against the size of the measured change of "
            "loss. On the dashed line both are equal. What is zero is drawn at the edge, half of the smallest.",
        ),
        tables=[effect_tables.effects_of_weights],
    ),
    SectionPlan(
        title="Layer by layer",
        figure=FigurePlan(
            file=layout.EFFECT_BY_LAYER_PLOT,
            draw=effect_figures.effect_by_layer,
            caption="Change of loss by layer, largest first, with 95 % intervals; grey: the range of random weights "
            f"of the same layer. At most {effect_figures.MAX_LAYERS} layers are drawn.",
        ),
        tables=[effect_tables.against_random, effect_tables.layer_effects],
    ),
    SectionPlan(
        title="More and more weights",
        figure=FigurePlan(
            file=layout.ABLATION_PLOT,
            draw=effect_figures.ablation,
            caption="Change of loss against the number of weights, with 95 % intervals; grey: random weights.",
        ),
        tables=[effect_tables.curve_heights],
    ),
    SectionPlan(
        title="Where the most critical weights sit",
        effects=False,
        figure=FigurePlan(
            file=layout.TOP_WEIGHTS_PLOT,
            draw=placement_figures.where_top_weights_sit,
            caption="How many of the global top-K lie in each component of each decoder layer.",
        ),
        tables=[score_tables.top_weights],
    ),
)


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
    figures: list[Figure]
    tables: list[TextTable]


def write_sections(folder: Path, evidence: Evidence) -> list[Section]:
    """All sections, their figures drawn into ``plots`` of ``folder``; a section with nothing in it is left out."""
    plots = folder / layout.PLOTS_FOLDER
    plots.mkdir(exist_ok=True)
    sections = []
    for plan in SECTIONS:
        figure = write_figure(plots, evidence, plan.figure) if plan.figure else None
        figures = [figure] if figure else []
        tables = [table for make_tables in plan.tables for table in make_tables(evidence)]
        if plan.effects:
            where = measured_on(evidence)
            figures = [replace(each, caption=f"{each.caption} {where[0].upper() + where[1:]}.") for each in figures]
            tables = [replace(each, title=f"{each.title}, {where}") for each in tables]
        if figures or tables:
            sections.append(Section(title=plan.title, figures=figures, tables=tables))
    return sections


def write_figure(plots: Path, evidence: Evidence, plan: FigurePlan) -> Figure | None:
    """Draw a figure into the folder ``plots``, and once more on a dark ground for the page alone.

    Returns:
        None if there is nothing to draw.
    """
    light = plan.draw(evidence, plots / plan.file, LIGHT)
    if light is None:
        return None
    with scratch_folder() as scratch:
        dark = scratch / plan.file
        plan.draw(evidence, dark, DARK)
        return Figure(file=plan.file, caption=plan.caption, light=_data_uri(light), dark=_data_uri(dark))


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
