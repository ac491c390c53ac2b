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

from bridge.exchange import flags
from bridge.exchange.tables import write_text
from simulations import layers, random_sets, reports, single_weights, texts
from simulations.rates import CLAIMS, markdown

__all__ = ["CLAIMS", "layers", "random_sets", "reports", "single_weights", "texts"]  # importing them registers claims

PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
START, END = "<!-- calibration: begin -->", "<!-- calibration: end -->"


def main(*, only: list[str] | None = None, replications: int = 10_000, write: bool = False) -> None:
    """Measure the claims and print their tables.

    Args:
        only: names of claims; by default all.
        replications: simulated studies a cell; fewer for claims that take longer, as their notes say.
        write: whether to put the tables into docs/statistics.md, in place of those that are there.
    """
    parts = []
    for name in only or CLAIMS:
        start = time.process_time()
        rates = CLAIMS[name].measure(replications)
        parts.append(markdown(CLAIMS[name], rates))
        print(parts[-1])
        outside = [f"{rate.world} ({rate.setting})" for rate in rates if rate.outside]
        print(f"{name}: {time.process_time() - start:.1f} s; outside: {'; '.join(outside) or 'none'}\n", flush=True)
    if write:
        text = PAGE.read_text(encoding="utf-8")
        head, rest = text.split(START)
        caption = f"In percent of {replications:,} simulated studies."
        write_text(PAGE, "\n".join([head + START, caption, "", *parts, END]) + rest.split(END)[1])


if __name__ == "__main__":
    flags.run(main)
