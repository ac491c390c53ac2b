"""Whatever stands in a file that a command reads, the command keeps its promise; the damage is made by hypothesis.

``nox -s fuzz`` tries hundreds of times as many examples as are tried otherwise, and other ones each time.
"""

import shutil
from pathlib import Path

import pytest
from conftest import examples
from damage import damages
from finished_runs import DISCOVERY, PER_LAYER, RANKING, SUMMARY, VALIDATE, VALIDATION, run, surroundings
from hypothesis import given
from hypothesis import strategies as st
from promise import kept

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch)
        patch.setattr("matplotlib.figure.Figure.savefig", _save_nothing)
        yield


def _save_nothing(figure, path, **options):
    Path(path).write_bytes(b"\x89PNG")


@pytest.fixture(scope="module")
def spoilt(finished, tmp_path_factory):
    """Makes a fresh copy of all runs, model and texts in the same place each time."""
    folder = tmp_path_factory.mktemp("fuzz") / "spoilt"

    def copy() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder, symlinks=True)
        return folder

    return copy


def check(folder, file, damage, written, command, *words):
    """Damage a file, run a command, and see that it keeps its promise."""
    marker = folder.parent / "marker"
    marker.unlink(missing_ok=True)
    damage.apply(folder / file, marker)
    return kept(lambda: run(command, *words), folder, written, marker)


def any_damage(*files):
    """One of the files, and damage to it."""
    return st.sampled_from(files).flatmap(lambda file: st.tuples(st.just(file), damages(Path(file))))


DISCOVERED = [f"out/{DISCOVERY}/{name}" for name in ("manifest.json", RANKING, SUMMARY)]
TABLES = ["measurements.csv", "targets.csv", "sampled_weights.csv", "single_weights.csv", "comparisons.csv"]
VALIDATED = [f"out/{VALIDATION}/{name}" for name in ("manifest.json", *TABLES)]


@examples(40)
@given(any_damage(*DISCOVERED))
def test_targets(spoilt, case):
    folder = spoilt()
    check(folder, *case, "nothing", "targets", "--from", folder / "out")


@examples(40)
@given(any_damage(*VALIDATED, *DISCOVERED))
def test_correlate(spoilt, case):
    folder = spoilt()
    check(folder, *case, f"out/{VALIDATION}/correlations.csv", "correlate", "--from", folder / "out" / VALIDATION)


@examples(40)
@given(any_damage(*VALIDATED, f"out/{VALIDATION}/correlations.csv", *DISCOVERED, f"out/{DISCOVERY}/baseline.json"))
def test_report(spoilt, case):
    folder = spoilt()
    written = f"out/{VALIDATION}/(report|plots/)"
    check(folder, *case, written, "report", "--from", folder / "out" / VALIDATION)


SEPARATE = ["out/baseline_x/baseline.json", "out/baseline_x/fingerprint.json"]
PLANNED = [*DISCOVERED, *(f"out/{DISCOVERY}/{name}" for name in (PER_LAYER, "sampled_weights.csv"))]
PLANNED += [f"out/{DISCOVERY}/{name}" for name in ("baseline.json", "fingerprint.json")]


@examples(40)
@given(any_damage(*PLANNED, *SEPARATE, f"out/{VALIDATION}/manifest.json"))
def test_plan_of_a_validation(spoilt, case):
    folder = spoilt()
    (folder / "out" / VALIDATION / "perturb_measure" / "manifest.json").unlink()
    words = ["--from", folder / "out", *VALIDATE, "--baseline", folder / SEPARATE[0]]
    check(folder, *case, "nothing", "validate", *words)
