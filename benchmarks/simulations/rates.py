"""Rates, the bands that they must stay in, the claims that yield them, and their tables."""

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

ANY = (0.0, 1.0)  # the band of a rate of which nothing is claimed
COVERS = (0.93, 0.97)
FALSE = (0.0, 0.05)  # of a claim in a world where it is not true


class Rate(NamedTuple):
    """How often something happened.

    Attributes:
        world: what was simulated, a row of the table.
        setting: its size, a column of the table.
        happened: of each replication whether it did, bool (R,).
        band: smallest and largest share that the claim allows.
    """

    world: str
    setting: str
    happened: np.ndarray
    band: tuple[float, float] = ANY

    @property
    def share(self) -> float:
        """The share of replications; NaN of none."""
        return float(np.mean(self.happened)) if len(self.happened) else math.nan

    @property
    def outside(self) -> bool:
        """Whether the share is outside of the band by more than three standard errors of the simulation."""
        low, high = (3 * math.sqrt(end * (1 - end) / max(1, len(self.happened))) for end in self.band)
        return self.share < self.band[0] - low or self.share > self.band[1] + high


class Claim(NamedTuple):
    """A claim of the project.

    Attributes:
        title: what is claimed, the head of its table.
        note: what the worlds are.
        columns: what the settings are, for example ``texts``.
        rates: yields its rates for a number of replications.
        fast: arguments by which the fast form, which is a test, measures fewer cells; None where it measures none.
        cost: how much longer than the others a replication takes; so many fewer are made.
    """

    title: str
    note: str
    columns: str
    rates: Callable[..., Iterable[Rate]]
    fast: Mapping[str, Any] | None
    cost: int = 1

    def measure(self, replications: int) -> list[Rate]:
        """All rates."""
        return list(self.rates(max(1, replications // self.cost)))

    def measure_fast(self, replications: int) -> list[Rate]:
        """Those of the fast form."""
        return list(self.rates(max(1, replications // self.cost), **(self.fast or {})))


CLAIMS: dict[str, Claim] = {}
Rates = Callable[..., Iterable[Rate]]


def claim(
    columns: str, fast: Mapping[str, Any] | None = MappingProxyType({}), cost: int = 1
) -> Callable[[Rates], Rates]:
    """Register a function that yields rates; the first line of its docstring is the claim, the rest its note."""

    def register(rates: Rates) -> Rates:
        title, _, note = (rates.__doc__ or "").partition("\n")
        CLAIMS[rates.__name__] = Claim(title.rstrip("."), " ".join(note.split()), columns, rates, fast, cost)
        return rates

    return register


def generator(*key: object) -> np.random.Generator:
    """The random numbers of one cell of one table, whatever else is run."""
    return np.random.default_rng(list(" ".join(map(str, key)).encode()))


def markdown(chosen: Claim, rates: list[Rate]) -> str:
    """A claim's table: worlds down, settings across, shares in percent; bold where outside of the band."""
    settings = list(dict.fromkeys(rate.setting for rate in rates))
    rows: dict[str, dict[str, Rate]] = {}
    for rate in rates:
        rows.setdefault(rate.world, {})[rate.setting] = rate
    lines = [f"### {chosen.title}", "", f"| world \\ {chosen.columns} | {' | '.join(settings)} | band |"]
    lines.append("|---" * (len(settings) + 2) + "|")
    for world, cells in rows.items():
        texts = [_percent(cells[setting]) if setting in cells else "" for setting in settings]
        lines.append(f"| {world} | {' | '.join(texts)} | {_band(cells.values())} |")
    return "\n".join([*lines, "", chosen.note, ""])


def _percent(rate: Rate) -> str:
    if math.isnan(rate.share):
        return "–"
    text = f"{100 * rate.share:.1f}"
    return f"**{text}**" if rate.outside else text


def _band(cells: Iterable[Rate]) -> str:
    """The bands of a row's cells, apart from those of which nothing is claimed."""
    bands = dict.fromkeys(rate.band for rate in cells if rate.band != ANY)
    return ", ".join(_band_words(*band) for band in bands) or "none"


def _band_words(low: float, high: float) -> str:
    if high == 1:
        return f"at least {100 * low:g}"
    return f"at most {100 * high:.3g}" if low == 0 else f"{100 * low:g} to {100 * high:g}"
