"""The report of a validation: one self-contained HTML file, the same in Markdown, and its figures.

Everything that comes from data is escaped, in the HTML by Jinja, in the Markdown by ``markdown_text``; in both an
unprintable character is shown as an escape.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bridge.exchange import layout
from bridge.exchange.atomic_file import write_text
from bridge.exchange.printable import escaped, is_printable
from bridge.exchange.validation_run import Validation
from bridge.report.caveats import caveats
from bridge.report.evidence import Evidence, evidence_of
from bridge.report.method import method, metric_definitions
from bridge.report.sections import write_sections
from bridge.report.sentences import answer, most_critical_weight, setup_items, summary_lines


def write_report(validation: Validation) -> list[str]:
    """Write report.html, report.md and the plots of a validation from its tables.

    Returns:
        The lines of ``sentences.summary_lines``.
    """
    return write_pages(validation.folder, evidence_of(validation))


def write_pages(folder: Path, evidence: Evidence) -> list[str]:
    """Write report.html, report.md and plots/*.png into an existing folder.

    Returns:
        Five plain lines: the setup, the most critical weight, the global top-K, the most damaging layer, the
        agreement of score and effect. Where single weights were perturbed, a sixth: the agreement there.
    """
    setup = setup_items(evidence)
    model = dict(setup)["Model"]
    content = {
        "title": f"Validation of critical weights: {model}",
        "answer": answer(evidence),
        "setup": setup,
        "most_critical_weight": most_critical_weight(evidence),
        "sections": write_sections(folder, evidence),
        "method": method(evidence),
        "metrics": metric_definitions(evidence),
        "caveats": caveats(evidence),
        "discovery_folder": str(evidence.discovery_folder),
        "manifests": {
            "validation": _json(evidence.validation_manifest),
            "discovery": _json(evidence.discovery_manifest),
        },
    }
    html = _environment(autoescape=True, finalize=_shown).get_template("report.html.j2").render(content)
    write_text(folder / layout.REPORT_HTML, html)
    markdown = _environment(autoescape=False, finalize=markdown_text).get_template("report.md.j2").render(content)
    write_text(folder / layout.REPORT_MD, _without_double_blank_lines(markdown))
    return summary_lines(evidence)


def _environment(**options: Any) -> jinja2.Environment:  # noqa: ANN401 (Jinja's options)
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


def _without_double_blank_lines(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


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
    return re.sub(r"(?i)\b(https?|ftp)://|\bwww\.", _without_link, text)


def _without_link(match: re.Match[str]) -> str:
    """The beginning of an address, written so that no reader turns it into a link."""
    return match[0].replace(":", "&#58;").replace(".", "&#46;")


def _json(manifest: dict[str, Any]) -> str:
    """A manifest as indented JSON: no line of it can close the Markdown fence that it stands in."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, default=str)
    return "".join(c if c == "\n" or is_printable(c) else json.dumps(c)[1:-1] for c in text)
