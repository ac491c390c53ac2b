"""The statistical claims hold in simulated worlds: the fast form of benchmarks/calibration.py."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from llm_perturb import intervals

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("calibration", ROOT / "benchmarks" / "calibration.py")
calibration = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(calibration)

FAST = [name for name, claim in calibration.CLAIMS.items() if claim.fast]


def outside(name, replications):
    rates = calibration.CLAIMS[name].rates(replications)
    return [f"{rate.world} ({rate.setting}): {rate.share:.3f} of {rate.band}" for rate in rates if rate.outside]


@pytest.mark.parametrize("name", FAST)
def test_every_rate_stays_in_its_band(name):
    assert outside(name, 4000) == []


def test_an_interval_that_says_95_and_means_90_is_noticed(monkeypatch):
    monkeypatch.setattr(intervals, "LEVEL", 0.9)
    assert any("light" in cell for cell in outside("delta_nll", 4000))
    assert outside("windows", 4000)
    assert outside("top_minus_random", 4000)


def test_a_t_interval_without_its_correction_is_noticed(monkeypatch):
    monkeypatch.setattr(intervals, "_hall_inverse", lambda x, skewness: np.zeros_like(skewness))
    cells = outside("delta_nll", 4000)
    assert any("lognormal(1)" in cell for cell in cells)
    assert any("one token" in cell for cell in cells)


def test_a_rate_is_outside_where_chance_does_not_explain_it():
    happened = np.arange(10_000) < 9200
    assert calibration.Rate("", "", happened, (0.93, 0.97)).outside
    assert not calibration.Rate("", "", happened, (0.92, 1)).outside
    assert not calibration.Rate("", "", happened[:9600], (0.93, 0.965)).outside  # 0.958
    assert calibration.Rate("", "", happened, (0, 0.9)).outside
    assert not calibration.Rate("", "", happened[:0]).outside


def test_the_page_shows_every_claim():
    page = calibration.PAGE.read_text(encoding="utf-8")
    table = page.split(calibration.START)[1].split(calibration.END)[0]
    assert [f"### {claim.title}" for claim in calibration.CLAIMS.values()] == [
        line for line in table.splitlines() if line.startswith("###")
    ]
    assert "**" not in table  # no rate is outside of its band


def test_the_table_marks_what_is_outside():
    claim = calibration.Claim("A claim", "what the worlds are", "texts", lambda n: [], fast=True)
    half = np.arange(1000) < 500
    rates = [calibration.Rate("one", "12", half), calibration.Rate("one", "20", half, (0.9, 1))]
    rates += [calibration.Rate("two", "20", half, (0.4, 0.6))]
    assert calibration.markdown(claim, rates).splitlines()[2:6] == [
        "| world \\ texts | 12 | 20 | band |",
        "|---|---|---|---|",
        "| one | 50.0 | **50.0** | at least 90 |",
        "| two |  | 50.0 | 40 to 60 |",
    ]
