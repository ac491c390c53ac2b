"""The report of a validation: one self-contained HTML file, the same in Markdown, and its figures.

Everything that comes from data is escaped, in the HTML by Jinja, in the Markdown by ``markdown_text``; in both an
unprintable character is shown as an escape.
"""

import base64
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from bridge.exchange.printable import escaped, is_printable
from bridge.exchange.tables import write_text
from bridge.report import effect_figures, placement_figures, tables
from bridge.report.caveats import limits
from bridge.report.figure_style import DARK
from bridge.report.sentences import Evidence, answer, identity, setup_facts, summary_lines
from bridge.report.tables import TextTable

DEFINITIONS = {
    "grad_x_weight": "|θ · ∂L/∂θ|: first-order estimate of the change of loss at θ = 0 (Molchanov et al. 2019)",
    "grad_squared": "mean over sequences of (∂L_i/∂θ)²: diagonal of the empirical Fisher (SqueezeLLM, Kim et al. 2024)",
    "grad_squared_batch": "(∂L/∂θ)²: the square of the mean gradient, the corpus taken as one batch",
    "grad_squared_token": "mean over predicted tokens of the squared contribution of each position to ∂S_i/∂θ",
    "obd": "½ θ² h, h the per-token empirical Fisher: second-order estimate of the same change (LeCun et al. 1990)",
    "taylor2": "|−θ ∂L/∂θ + ½ θ² h|: both terms of the Taylor series",
    "magnitude": "|θ|: the baseline that a metric must beat",
    "wanda": "|θ| times the norm of its input feature (Sun et al. 2024)",
    "hutchinson_diag": "|diagonal of the Hessian|, estimated with Rademacher vectors (Hutchinson 1990)",
}
METHOD = [
    (
        "Loss",
        "L = mean of −log p(token | the tokens before it) over all predicted tokens, in nats; perplexity = exp(L).",
    ),
    ("Effect", "loss after minus loss before, on the same tokens; 95 % interval by bootstrap over sequences."),
    ("Score of a set", "the scores of its weights added."),
    ("Control", "as many random weights of the same target, outside every top set; one draw a seed."),
    (
        "Agreement",
        "Spearman's ρ between score and effect over layers; interval by bootstrap over layers, p by permutation.",
    ),
]
SINGLE_WEIGHTS = (
    "Single weights",
    "each perturbed alone, all metrics on the same ones; they are spread over every order of magnitude of rank by each "
    "metric. A score is the size of a change, and taking one weight away may as well lower "
    "the loss: the agreement is that of the score with the absolute change of loss.",
)


@dataclass(frozen=True)
class Figure:
    """A figure's file, what it shows, and its light and dark pixels as data URIs."""

    file: str
    caption: str
    light: str
    dark: str


@dataclass(frozen=True)
class Section:
    """A heading with its figures and tables."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[TextTable] = field(default_factory=list)


def write_report(
    folder: Path,
    *,
    validation_manifest: dict,
    discovery_manifest: dict,
    discovery_folder: Path,
    measurements: pd.DataFrame,
    targets: pd.DataFrame,
    correlations: pd.DataFrame,
    top_weights: dict[str, pd.DataFrame],
    summaries: dict[str, pd.DataFrame],
    sampled: pd.DataFrame | None = None,
    stability: pd.DataFrame | None = None,
) -> list[str]:
    """Write report.html, report.md and plots/*.png into ``folder``.

    Args:
        folder: an existing folder.
        validation_manifest: manifest of the validation run.
        discovery_manifest: manifest of the discovery run whose ranking was tested.
        discovery_folder: where that run lies; only named in the report.
        measurements: table MEASUREMENTS, at least one row.
        targets: table TARGETS.
        correlations: table CORRELATIONS.
        top_weights: for each metric its global top-K (table TOP_WEIGHTS).
        summaries: for each metric its table LAYER_SUMMARY.
        sampled: table SAMPLED_WEIGHTS, where single weights were perturbed.
        stability: table STABILITY, where the discovery measured it.

    Returns:
        Five plain lines: the setup, the most critical weight, the global top-K, the most damaging layer, the
        agreement of score and effect. Where single weights were perturbed, a sixth: the agreement there.
    """
    found = Evidence(
        validation_manifest,
        discovery_manifest,
        measurements,
        targets,
        correlations,
        top_weights,
        summaries,
        sampled,
        stability,
    )
    lines = summary_lines(found)
    content = {
        "title": f"Validation of critical weights: {setup_facts(found)[0][1]}",
        "answer": answer(found),
        "facts": setup_facts(found),
        "weight": lines[1],
        "sections": _sections(found, folder),
        "method": METHOD + [SINGLE_WEIGHTS] * (len(found.weight_correlations()) > 0),
        "metrics": _definitions(found),
        "limits": limits(found),
        "discovery_folder": str(discovery_folder),
        "manifests": [("validation", _json(validation_manifest)), ("discovery", _json(discovery_manifest))],
    }
    page = _environment(autoescape=True, finalize=_shown).get_template("report.html.j2").render(content)
    write_text(folder / "report.html", page)
    markdown = _environment(autoescape=False, finalize=markdown_text).get_template("report.md.j2").render(content)
    write_text(folder / "report.md", re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n")
    return lines


def _environment(**options: object) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bridge.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters["raw"] = Markup
    return environment


def _shown(value: object) -> str:
    """A value for the HTML, line breaks kept; Jinja escapes it afterwards."""
    return "\n".join(map(escaped, str(value).split("\n")))


def markdown_text(value: object) -> str:
    """A value as Markdown that shows it literally: no markup, no HTML, no new table cell, on one line.

    What is ``Markup`` already passes as it is.
    """
    if isinstance(value, Markup):
        return str(value)
    text = escaped(" ".join(str(value).split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~#!$])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(
        r"(?i)\b(https?|ftp)://|\bwww\.", lambda match: match[0].replace(":", "&#58;").replace(".", "&#46;"), text
    )


def _json(manifest: dict) -> str:
    """A manifest as indented JSON: no line of it can close the Markdown fence that it stands in."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, default=str)
    return "".join(c if c == "\n" or is_printable(c) else json.dumps(c)[1:-1] for c in text)


def _definitions(found: Evidence) -> list[tuple[str, str]]:
    names = dict.fromkeys([*found.metrics(), *found.top_weights])
    return [(name, DEFINITIONS.get(name, "see the discovery's manifest")) for name in names]


def _sections(found: Evidence, folder: Path) -> list[Section]:
    """Figures and tables in the order in which they are read; what has neither is left out."""
    measurements = found.measurements
    (folder / "plots").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:

        def figure(file: str, caption: str, draw: Callable[..., Path | None], *data: object) -> list[Figure]:
            light = draw(*data, folder / "plots" / file)
            if light is None:
                return []
            dark = draw(*data, Path(scratch) / file, DARK)
            return [Figure(file, caption, _data_uri(light), _data_uri(dark))]

        sections = [
            Section("The whole model", [], tables.global_effects(found)),
            Section(
                "Does the score predict the effect?",
                figure(
                    "predicted_and_measured.png",
                    "Each point is a layer: the summed score of its perturbed weights against the measured change "
                    "of loss, with its 95 % interval. On the dashed line both are equal.",
                    effect_figures.predicted_and_measured,
                    measurements,
                    found.correlations,
                ),
                tables.correlations(found),
            ),
            Section(
                "Single weights",
                figure(
                    "single_weights.png",
                    "Each point is one weight, perturbed alone: its score against the size of the measured change of "
                    "loss. On the dashed line both are equal. What is zero is drawn at the edge, half of the smallest.",
                    effect_figures.single_weights,
                    measurements,
                    found.sampled,
                    found.correlations,
                ),
                tables.effects_of_weights(found),
            ),
            Section(
                "Layer by layer",
                figure(
                    "effect_by_layer.png",
                    "Change of loss by layer, largest first, with 95 % intervals; grey: the range of random weights "
                    f"of the same layer. At most {effect_figures.MAX_ROWS} layers are drawn.",
                    effect_figures.effect_by_layer,
                    measurements,
                ),
                [*tables.against_random(found), *tables.layer_effects(found)],
            ),
            Section(
                "More and more weights",
                figure(
                    "ablation.png",
                    "Change of loss against the number of weights, with 95 % intervals; grey: random weights.",
                    effect_figures.ablation,
                    measurements,
                ),
                tables.curves(found),
            ),
            Section(
                "Where the most critical weights sit",
                figure(
                    "where_top_weights_sit.png",
                    "How many of the global top-K lie in each component of each decoder layer.",
                    placement_figures.where_top_weights_sit,
                    found.top_weights,
                    found.summaries,
                    identity(found.discovery_manifest, "model"),
                ),
                tables.single_weights(found),
            ),
        ]
    return [section for section in sections if section.figures or section.tables]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
