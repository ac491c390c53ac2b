"""How often each statistical claim holds, in simulated worlds whose truth is known.

    packages/critical_weight_analysis/.venv/bin/python benchmarks/calibration.py           # prints the tables
    packages/critical_weight_analysis/.venv/bin/python benchmarks/calibration.py --write   # into docs/statistics.md
    nox -s benchmark -- calibration

The functions that are tried are those that the packages use. A claim (in ``simulations``) is a function that yields the
rates measured in its worlds, each with the band that it must stay in; ``@claim`` registers it. A test runs the claims
with few replications and fails where a rate has left its band by more than the simulation's own error.
"""

import time
from pathlib import Path

from bridge.exchange.atomic_file import write_text
from bridge.exchange.command_line import flags
from simulations import layers, random_sets, rates, reports, single_weights, texts
from simulations.rates import markdown

PARTS = (texts, random_sets, layers, single_weights, reports)  # importing them registers their claims
CLAIMS = {
    name: claim for part in PARTS for name, claim in rates.CLAIMS.items() if claim.rates.__module__ == part.__name__
}
PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
START, END = "<!-- calibration: begin -->", "<!-- calibration: end -->"


def main(*, only: list[str] | None = None, replications: int = 10_000, write: bool = False) -> None:
    """Measure the claims and print their tables.

    Args:
        only: names of claims; by default all.
        replications: simulated studies a cell; fewer for claims that take longer, as their notes say.
        write: whether to put the tables into docs/statistics.md, each in place of the one that is there.
    """
    tables = {}
    for name in only or CLAIMS:
        start = time.process_time()
        measured = CLAIMS[name].measure(replications)
        tables[CLAIMS[name].title] = markdown(CLAIMS[name], measured)
        print(tables[CLAIMS[name].title])
        outside = [f"{rate.world} ({rate.setting})" for rate in measured if rate.outside]
        print(f"{name}: {time.process_time() - start:.1f} s; outside: {'; '.join(outside) or 'none'}\n", flush=True)
    if write:
        caption = f"In percent of {replications:,} simulated studies, or of fewer where a note says so."
        write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), tables, caption))


def with_tables(page: str, tables: dict[str, str], caption: str) -> str:
    """The page with new tables by their titles, those of other claims as they are, in the order of ``CLAIMS``."""
    head, rest = page.split(START)
    old, tail = rest.split(END)
    parts = {part.partition("\n")[0]: f"### {part}" for part in old.split("### ")[1:]} | tables
    shown = [parts[claim.title].rstrip() + "\n" for claim in CLAIMS.values() if claim.title in parts]
    return "\n".join([head + START, caption, "", *shown, END]) + tail


if __name__ == "__main__":
    flags.run(main)
