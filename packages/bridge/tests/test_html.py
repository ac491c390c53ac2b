import base64
import html
import html.parser
import json
import os
import re
import shutil
import subprocess

import pytest
import synthetic
from bridge.analysis.correlation import correlate
from bridge.exchange.printable import is_printable
from bridge.report.html import markdown_text, write_pages

METRICS = ("grad_x_weight", "magnitude")
HOSTILE = "<script>alert(1)</script>|`x`\n# [a](javascript:b) $y$ _z_ http://evil.example \x1b[2J\x9b\u202e\U000e0041"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "source", "br", "link", "hr", "input"}


def write(folder, measurements, targets, manifest, weights, **choices):
    folder.mkdir(exist_ok=True)
    tables = {
        "discovery_manifest": manifest,
        "top_weights": dict.fromkeys(METRICS, weights),
        "summaries": dict.fromkeys(METRICS, synthetic.summary(4)),
    }
    return write_pages(folder, synthetic.evidence_of(measurements, chosen=targets, **(tables | choices)))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    measurements = synthetic.measurements(n=12, metrics=METRICS, ks=(1, 100))
    lines = write(folder, measurements, synthetic.targets(12, 4), synthetic.manifest(), synthetic.top_weights(4))
    return folder, lines


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Everything that names something is an attack."""
    folder = tmp_path_factory.mktemp("hostile")
    names = {"target_layer": {synthetic.layer_names()[0]: HOSTILE}}
    sampled = synthetic.sampled(8, metrics=(*METRICS, HOSTILE)).assign(layer=HOSTILE, parameter=HOSTILE)
    measurements = synthetic.measurements(n=4, metrics=METRICS).replace(names).assign(model=HOSTILE)
    measurements = synthetic.with_single_weights(measurements, sampled)
    manifest = synthetic.manifest(model=HOSTILE) | {"warnings": [HOSTILE], "argv": [HOSTILE, "`````"]}
    manifest["identity"]["corpus"]["source"] = HOSTILE
    weights = synthetic.top_weights(4).assign(parameter=HOSTILE, layer=HOSTILE)
    write(folder, measurements, synthetic.targets(4, 1).replace(names), manifest, weights, sampled=sampled)
    return folder


class Reader(html.parser.HTMLParser):
    """Tags that are open when they should not be, every tag seen, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_files_and_lines(report):
    folder, lines = report
    assert sorted(path.name for path in folder.iterdir()) == ["plots", "report.html", "report.md"]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "ablation.png",
        "effect_by_layer.png",
        "predicted_and_measured.png",
        "where_top_weights_sit.png",
    ]
    assert len(lines) == 5
    assert all(line and "\n" not in line for line in lines)


def test_html_is_well_formed_and_needs_nothing_else(report):
    page = Reader((report[0] / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    links = [value for name, value in page.attributes if name in {"src", "href", "srcset"}]
    assert len(links) == 8
    assert all(link.startswith("data:image/png;base64,") for link in links)
    light = base64.b64decode(links[1].partition(",")[2])
    assert light == (report[0] / "plots" / "predicted_and_measured.png").read_bytes()
    assert "script" not in page.tags
    styles = "".join(page.text)
    assert "prefers-color-scheme: dark" in styles
    assert "@media print" in styles
    assert "url(" not in styles


def test_the_answer_comes_first_in_both(report):
    folder, lines = report
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.index("takes perplexity from") < page.index("<h2>")
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert markdown.index("takes perplexity from") < markdown.index("\n## ")
    assert lines[0].split(" on ")[0].split(" (")[0] in markdown.splitlines()[0]


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_what_is_missing_is_never_nan(report, hostile, name):
    for folder in (report[0], hostile):
        words = re.sub(r"base64,[^\"]+", "", (folder / name).read_text(encoding="utf-8"))
        assert not re.search(r"\b(nan|None|NaN|<NA>|inf)\b", words.partition("Manifests")[0])


def test_every_layer_and_correlation_is_in_the_tables(report):
    text = "".join(Reader((report[0] / "report.html").read_text(encoding="utf-8")).text)
    markdown = (report[0] / "report.md").read_text(encoding="utf-8")
    row = correlate(synthetic.measurements(n=12, metrics=METRICS, ks=(1, 100))).iloc[0]
    for layer in synthetic.layer_names(12):
        assert layer in text
        assert f"| {layer} |" in markdown
    assert f"{row['spearman']:.2f} [{row['ci_low']:.2f},\u00a0{row['ci_high']:.2f}]" in text
    assert "the same texts" in text
    assert "|θ · ∂L/∂θ|" in text


def test_markdown_tables_have_equal_rows(report, hostile):
    for folder in (report[0], hostile):
        widths = {}
        block = 0
        for line in (folder / "report.md").read_text(encoding="utf-8").splitlines():
            if line.startswith("|"):
                widths.setdefault(block, set()).add(len(re.findall(r"(?<!\\)\|", line)))
            else:
                block += 1
        assert len(widths) > 4
        assert all(len(width) == 1 for width in widths.values())


def test_hostile_names_stay_text_in_html(hostile):
    source = (hostile / "report.html").read_text(encoding="utf-8")
    page = Reader(source)
    assert page.open == []
    assert page.tags.isdisjoint({"script", "a", "iframe"})
    assert "<script>alert(1)</script>" in "".join(page.text)
    assert "<script" not in source


def test_hostile_names_stay_text_in_markdown(hostile):
    text = (hostile / "report.md").read_text(encoding="utf-8")
    prose, fences = re.sub(r"`````json\n.*?\n`````\n", "", text, flags=re.DOTALL), text.count("\n`````json\n")
    assert fences == 2
    assert "<script" not in prose
    assert "](javascript" not in prose.replace("\\]", "")
    assert "http://" not in prose
    assert re.findall(r"(?<!\\)`", prose) == []
    assert [line for line in prose.splitlines() if line.startswith("# ")] == [prose.splitlines()[0]]


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_reports_hold_no_character_that_a_terminal_obeys(hostile, name):
    text = (hostile / name).read_text(encoding="utf-8")
    assert all(is_printable(line) for line in text.split("\n"))
    assert "\\x1b" in text


def test_manifests_in_markdown_are_still_json(hostile):
    text = (hostile / "report.md").read_text(encoding="utf-8")
    manifests = [json.loads(block) for block in re.findall(r"`````json\n(.*?)\n`````\n", text, flags=re.DOTALL)]
    assert manifests[1]["argv"] == [HOSTILE, "`````"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a|b", r"a\|b"),
        ("`code` *b* [l](u)", r"\`code\` \*b\* \[l\](u)"),
        ("<b> & c", "&lt;b&gt; &amp; c"),
        ("two\nlines\t x", "two lines x"),
        ("grad_x_weight", "grad_x_weight"),
        ("_emphasis_", r"\_emphasis\_"),
        ("back\\slash", r"back\\slash"),
        (3, "3"),
    ],
)
def test_markdown_text(value, text):
    assert markdown_text(value) == text


def test_a_report_of_next_to_nothing(tmp_path, blank_figures):
    measurements = synthetic.measurements(n=1, metrics=METRICS, seeds=(), with_all=False)
    measurements = measurements[measurements["selection"].str.startswith("top_")]
    lines = write(tmp_path, measurements, synthetic.targets(1, 0), {"identity": None}, synthetic.top_weights(4))
    assert "1 layers are too few" in lines[4]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Only 1 layer tested" in text
    assert "only 0 random draws" in text


def test_a_metric_is_explained_by_the_manifest_alone(tmp_path, blank_figures):
    """A metric that the bridge has never heard of, declared by the discovery as the one to beat."""
    measurements = synthetic.measurements(n=5, metrics=METRICS)
    measurements["selection"] = measurements["selection"].replace({"top_magnitude": "top_made_up"})
    entry = {"formula": "the weight's horoscope", "unit": "stars", "source": "Nobody 1901", "baseline": True}
    manifest = synthetic.manifest() | {"metrics": synthetic.DEFINITIONS | {"made_up": entry}}
    manifest["metrics"]["magnitude"] = {"formula": "|θ|", "baseline": False}
    write(tmp_path, measurements, synthetic.targets(5, 2), manifest, synthetic.top_weights(4))
    for name in ("report.html", "report.md"):
        text = html.unescape((tmp_path / name).read_text(encoding="utf-8"))
        assert "the weight's horoscope (Nobody 1901); unit: stars" in text
        assert "ρ minus made_up's" in text
        assert "ρ minus magnitude" not in text


def test_a_metric_without_a_definition_is_left_to_the_manifest(tmp_path, blank_figures):
    manifest = synthetic.manifest()
    del manifest["metrics"]
    measurements = synthetic.measurements(n=1, metrics=METRICS)
    write(tmp_path, measurements, synthetic.targets(1, 0), manifest, synthetic.top_weights(4))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- Metric grad_x_weight: see the discovery's manifest" in text


def test_single_weights_have_a_section_of_their_own(report, tmp_path, blank_figures):
    sampled = synthetic.sampled(metrics=METRICS)
    table = synthetic.with_single_weights(synthetic.measurements(n=5, metrics=METRICS), sampled)
    lines = write(
        tmp_path, table, synthetic.targets(5, 2), synthetic.manifest(), synthetic.top_weights(4), sampled=sampled
    )
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert lines[5] in text
    assert "Zeroing one weight: the 20 of largest effect among 40" in text
    assert "absolute change of loss" in text
    assert "absolute change of loss" not in (report[0] / "report.html").read_text(encoding="utf-8")
    links = [value for name, value in page.attributes if name in {"src", "href", "srcset"}]
    assert all(link.startswith("data:image/png;base64,") for link in links)
    drawn = (tmp_path / "plots" / "single_weights.png").read_bytes()
    assert drawn in [base64.b64decode(link.partition(",")[2]) for link in links]
    assert "](plots/single_weights.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; install it to see that a browser renders the report")
def test_a_browser_renders_the_report(report, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path}/profile"]
    page = (report[0] / "report.html").resolve().as_uri()
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [CHROMIUM, *flags, "--virtual-time-budget=2000", "--dump-dom", page],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rendered = Reader(done.stdout)
    assert rendered.open == []
    assert "Does the score predict the effect?" in "".join(rendered.text)
