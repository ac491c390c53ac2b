"""The pages: links lead somewhere, the README stays short, and the guide names every flag."""

import re
import subprocess

import pytest
from conftest import PACKAGES, ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]*)(#[^)]*)?\)")
COMMANDS = {
    "phase1_runner": ("critical_weight_analysis", ["python", "phase1_runner.py"]),
    "run_topk_perturb": ("llm_perturb", ["python", "scripts/run_topk_perturb.py"]),
    "bridge targets": ("bridge", ["bridge", "targets"]),
    "bridge validate": ("bridge", ["bridge", "validate"]),
    "bridge compare": ("bridge", ["bridge", "compare"]),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = [match[1] for match in LINK.finditer(page.read_text()) if match[1] and "://" not in match[1]]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_architecture_names_every_module_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = re.split(r"^### `([\w/]+)`$", page.partition("\n## Reasons")[0], flags=re.MULTILINE)[1:]
    named = {f"{room}/{module}" for room, text in zip(rooms[::2], rooms[1::2], strict=True)
             for module in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)}  # fmt: skip
    sources = [(source, path) for source in PACKAGES.glob("*/src") for path in source.rglob("*.py")]
    modules = {path.relative_to(source).with_suffix("").as_posix() for source, path in sources}
    assert named == {module for module in modules if not module.endswith("__init__")}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_guide_names_every_flag(name):
    package, (program, *words) = COMMANDS[name]
    folder = PACKAGES / package
    help_page = subprocess.run(
        [str(folder / ".venv" / "bin" / program), *words, "--help"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    flags = set(re.findall(r"^\W*(--[a-z][a-z-]*)", help_page, re.MULTILINE))
    guide = "".join((ROOT / "docs" / page).read_text() for page in ("guide.md", "scaling.md"))
    assert len(flags) >= 3
    assert {flag for flag in flags if flag not in guide and f"--no-{flag[2:]}" not in guide} == set()
