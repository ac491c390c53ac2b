"""The statistical claims hold in simulated worlds: the fast form of benchmarks/calibration.py."""

import sys
from pathlib import Path

import numpy as np
import pytest
from bridge.analysis import claims, within_kinds
from llm_perturb import intervals

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import calibration
from simulations import layers, rates

CLAIMS = calibration.CLAIMS
FAST = [name for name, claim in CLAIMS.items() if claim.fast is not None]
REPLICATIONS = 4000  # simulated studies a cell; fewer for claims that take longer


def outside(name, **cells):
    claim = CLAIMS[name]
    measured = claim.measure_fast(REPLICATIONS) if not cells else claim.rates(REPLICATIONS // claim.cost, **cells)
    return [f"{rate.world} ({rate.setting}): {rate.share:.3f} of {rate.band}" for rate in measured if rate.outside]


@pytest.mark.parametrize("name", FAST)
def test_every_rate_stays_in_its_band(name):
    assert outside(name) == []


def test_an_interval_that_says_95_and_means_90_is_noticed(monkeypatch):
    monkeypatch.setattr(intervals, "LEVEL", 0.9)
    assert any("light" in cell for cell in outside("delta_nll"))
    assert outside("windows")
    assert outside("top_minus_random")


def test_a_t_interval_without_its_correction_is_noticed(monkeypatch):
    monkeypatch.setattr(intervals, "_hall_inverse", lambda x, skewness: np.zeros_like(skewness))
    cells = outside("delta_nll")
    assert any("lognormal(1)" in cell for cell in cells)
    assert any("one token" in cell for cell in cells)


def test_shuffles_over_all_layers_are_noticed(monkeypatch):
    def of_all_layers(values, members, size, rng):
        return rng.permuted(np.tile(values, (size, 1)), axis=1)

    monkeypatch.setattr(within_kinds, "kind_and_depth", lambda kinds, depths: np.ones((len(kinds), 1)))
    monkeypatch.setattr(within_kinds, "_shuffled", of_all_layers)
    assert any("same kinds" in cell for cell in outside("permutations", cases=((40, "same kinds"),)))


def test_a_report_that_claims_what_is_not_significant_is_noticed(monkeypatch):
    monkeypatch.setattr(claims, "SIGNIFICANCE", 0.5)
    assert any("better than chance" in cell for cell in outside("noise", cases=((layers.World(), 20, 2),), longer={}))


def test_a_rate_is_outside_where_chance_does_not_explain_it():
    happened = np.arange(10_000) < 9200
    assert rates.Rate("", "", happened, (0.93, 0.97)).outside
    assert not rates.Rate("", "", happened, (0.92, 1)).outside
    assert not rates.Rate("", "", happened[:9600], (0.93, 0.965)).outside  # 0.958
    assert rates.Rate("", "", happened, (0, 0.9)).outside
    assert not rates.Rate("", "", happened[:0]).outside


def test_the_page_shows_every_claim():
    page = calibration.PAGE.read_text(encoding="utf-8")
    table = page.split(calibration.START)[1].split(calibration.END)[0]
    assert [f"### {claim.title}" for claim in CLAIMS.values()] == [
        line for line in table.splitlines() if line.startswith("###")
    ]
    assert "**" not in table  # no rate is outside of its band


def test_one_table_of_the_page_is_replaced():
    first, second, *_ = (claim.title for claim in CLAIMS.values())
    page = f"text\n{calibration.START}\nold\n\n### {second}\n\nb\n\n### gone\n\nc\n\n{calibration.END}\nmore"
    new = calibration.with_tables(page, {first: f"### {first}\n\na\n"}, "caption")
    tables = f"### {first}\n\na\n\n### {second}\n\nb\n"
    assert new == f"text\n{calibration.START}\ncaption\n\n{tables}\n{calibration.END}\nmore"


def test_the_table_marks_what_is_outside():
    claim = rates.Claim("A claim", "what the worlds are", "texts", lambda n: [], fast={})
    half = np.arange(1000) < 500
    measured = [rates.Rate("one", "12", half), rates.Rate("one", "20", half, (0.9, 1))]
    measured += [rates.Rate("two", "20", half, (0.4, 0.6))]
    assert rates.markdown(claim, measured).splitlines()[2:6] == [
        "| world \\ texts | 12 | 20 | band |",
        "|---|---|---|---|",
        "| one | 50.0 | **50.0** | at least 90 |",
        "| two |  | 50.0 | 40 to 60 |",
    ]
