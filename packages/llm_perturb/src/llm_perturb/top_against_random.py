"""Chosen weights against random ones of the same number in the same target.

A seeded perturbation (``gaussian_noise``) gives the chosen weights a new effect with every seed. Each of its draws is
then compared with the random set of the same seed: the mean over the seeds varies less than a single draw, so that
comparing it with single draws would find a difference where there is none.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from bridge.exchange import layout

from llm_perturb.intervals import (
    MIN_CLUSTERS,
    NO_INTERVAL,
    Interval,
    Spread,
    by_cluster,
    combined_spread,
    effective_number,
    interval_around,
    jackknife_spread,
    ratio_changes,
    spread_of,
)

MIN_DRAWS = 2
SIGNIFICANT = 0.05
SKEWNESS = 1.5  # assumed of the damage that random sets do: most do little, some do much
ASSUMED_DRAWS = 5  # as many draws as that assumption counts for
_GROUP_COLUMNS = ["target_layer", "parameter", "perturbation", "k"]
_NO_SEEDS = pd.Series(dtype="Int64")
_CONTROLS = {
    "top": [layout.RANDOM, "matched"],
    layout.ROW: [layout.RANDOM_ROW],
    layout.COL: [layout.RANDOM_COL],
}
COLUMNS = ["target_layer", "parameter", "selection", "perturbation", "k", "row", "col", "control", "n_draws"]
COLUMNS += ["delta_nll", "control_mean", "control_low", "control_high", "difference", "ci_low", "ci_high", "n_eff"]
COLUMNS += ["n_beaten", "p_value", "unbounded_share", "control_unbounded_share", "note"]
_WHOLE = {"k": "int64", "row": "Int64", "col": "Int64", "n_draws": "int64", "n_beaten": "int64"}


def compare(
    table: pd.DataFrame, differences: np.ndarray, n_tokens: np.ndarray, clusters: np.ndarray | None = None
) -> pd.DataFrame:
    """Each top set (row, column) against the random ones of its target, perturbation and k; empty where none is.

    Args:
        table: measurements.
        differences: d_i of each measurement, nats of sequence i after minus before, (rows, n).
        n_tokens: T_i, (n,).
        clusters: which text, document or file sequence i comes from, (n,); without, each sequence its own.

    Returns:
        ``COLUMNS``: the effect (of a seeded perturbation, the mean over its seeds), mean, smallest and largest effect
        of the draws, effect minus mean of the draws with its 95 % interval and the n_eff of that difference, how many
        draws it beat, the rank p-value where the draws are enough for one, and the shares of effects that are not
        finite. A loss that is not finite counts as the largest damage.
    """
    table = table.reset_index(drop=True)
    kinds = table["selection"].str.partition("_")[0]
    tops = table[kinds.isin(_CONTROLS)].groupby([*_GROUP_COLUMNS, "selection", "row", "col"], sort=False, dropna=False)
    draws = table[kinds.isin([layout.RANDOM, "matched"])].groupby([*_GROUP_COLUMNS, "selection"], sort=False)
    seeds = dict(iter(draws["seed"]))
    effects = table["delta_nll"].to_numpy(float)
    rows: list[dict[str, Any]] = []
    group_key: Any  # a tuple of the values of the columns
    for group_key, chosen in tops:
        *group, selection, row, col = group_key
        for control in _controls(selection):
            top, drawn = _pairs(chosen["seed"], seeds.get((*group, control), _NO_SEEDS))
            if drawn:
                names: dict[str, Any] = dict(zip(_GROUP_COLUMNS, group, strict=True))
                names |= {"selection": selection, "row": row, "col": col, "control": control}
                names |= _effects(effects[top], effects[drawn])
                rows.append(names | _sureness(differences[top], differences[drawn], n_tokens, clusters))
    n_clusters = len(by_cluster(n_tokens, clusters))
    rows = [row | {"note": _note(row, n_clusters)} for row in rows]
    return pd.DataFrame(rows, columns=COLUMNS).astype(_WHOLE)


def _controls(selection: str) -> list[str]:
    kind, _, metric = selection.partition("_")
    return [layout.matched_label(metric) if control == "matched" else control for control in _CONTROLS[kind]]


def _pairs(top: pd.Series, drawn: pd.Series) -> tuple[list[int], list[int]]:
    """Row numbers of top and control of each pair: the same seed, or every control if the top has no seed."""
    if top.isna().all():
        return list(top.index[:1]) * len(drawn), list(drawn.index)
    of_seed = dict(zip(drawn, drawn.index, strict=True))
    pairs = [(at, of_seed[seed]) for at, seed in top.items() if seed in of_seed]
    first: list[Any] = [at for at, _ in pairs]
    return first, [at for _, at in pairs]


def _effects(top: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Effects of the pairs, (B,) each; a mean with an unbounded effect in it is unbounded."""
    high, controls = unbounded(top), unbounded(drawn)
    effect, mean = high.mean(), controls.mean()
    return {
        "n_draws": len(drawn),
        "delta_nll": effect,
        "control_mean": mean,
        "control_low": controls.min(),
        "control_high": controls.max(),
        "difference": effect - mean if np.isfinite(mean) else math.nan,
        "n_beaten": int((high > controls).sum()),
        "p_value": rank_p_value(top, drawn) if can_reach(len(drawn)) else math.nan,
        "unbounded_share": float(np.isinf(high).mean()),
        "control_unbounded_share": float(np.isinf(controls).mean()),
    }


def _sureness(top: np.ndarray, drawn: np.ndarray, n_tokens: np.ndarray, clusters: np.ndarray | None) -> dict[str, Any]:
    interval = difference_interval(top, drawn, n_tokens, clusters)
    with np.errstate(invalid="ignore"):
        n_eff = effective_number((top - drawn).mean(0), clusters)
    return {"ci_low": interval.low, "ci_high": interval.high, "n_eff": n_eff}


def _note(row: dict[str, Any], n_clusters: int) -> str:
    notes = []
    if n_clusters < MIN_CLUSTERS:
        notes.append(f"{n_clusters} texts are too few for an interval (at least {MIN_CLUSTERS})")
    if row["n_draws"] < MIN_DRAWS:
        notes.append("one draw tells nothing of other draws")
    if row["unbounded_share"] or row["control_unbounded_share"]:
        notes.append("a loss is not finite")
    if not can_reach(row["n_draws"]):
        least, needed = smallest_p_value(row["n_draws"]), draws_needed()
        notes.append(f"no p: with {row['n_draws']} draws it cannot be below {least:.2g} ({needed} are needed)")
    return "; ".join(notes)


def unbounded(effects: np.ndarray) -> np.ndarray:
    """The effects, each that is not finite (an overflow, an undefined loss) as the largest damage, +inf."""
    return np.where(np.isfinite(effects), effects, np.inf)


def rank_p_value(top: np.ndarray, drawn: np.ndarray) -> float | np.ndarray:
    """(1 + r) / (B + 1), r of B random sets doing at least as much damage as the top set of the same seed.

    One-sided, for the null hypothesis that the chosen weights are one more random set. With the same effect of the
    top in every pair this is the rank of the top among B + 1 exchangeable sets, exact. Where the perturbation is
    seeded, let q be the probability that the top beats a draw. The damage's rank among all draws of its seed is
    uniform, and q is the mean of that rank over the noise, so by Jensen P(r = 0) = E q^B <= 1 / (B + 1): the smallest
    p-value is never too frequent, nor was any other in simulation; where noise outweighs the choice of the set all
    are rarer than they say.

    Args:
        top: effects of the chosen weights, (..., B), or (..., 1) where all pairs share one.
        drawn: effects of the random sets of the same seeds, (..., B); what is not finite is the largest.
    """
    drawn = unbounded(drawn)
    at_least = (drawn >= unbounded(top)).sum(-1)
    p: float | np.ndarray = (1 + at_least) / (1 + drawn.shape[-1])
    return p


def smallest_p_value(n_draws: int) -> float:
    """The smallest value that ``rank_p_value`` can take."""
    return 1 / (n_draws + 1)


def can_reach(n_draws: int, level: float = SIGNIFICANT) -> bool:
    """Whether so many draws can give a p-value of at most ``level``; where not, a p-value says nothing."""
    return n_draws >= draws_needed(level)


def draws_needed(level: float = SIGNIFICANT) -> int:
    """The fewest draws whose p-value can be at most ``level``: 19 for 0.05."""
    return math.ceil(round(1 / level, 9)) - 1


def difference_interval(
    top: np.ndarray, drawn: np.ndarray, n_tokens: np.ndarray, clusters: np.ndarray | None = None
) -> Interval:
    """The interval of the effect of the chosen weights minus the mean effect of all random sets like those drawn.

    Another experimenter would have taken other texts and other random sets. With x_b the difference in pair b, two
    variances add up:

        that of mean_b x_b over texts, by the jackknife,  +  s_B² / B,  s_B² = Σ_b (x_b - mean)² / (B - 1),

    with Satterthwaite's degrees of freedom. s_B² also holds the noise of the texts that a draw does not share with
    the others, which the first term has as well: it is counted twice, and the interval errs on the wide side.

    A few draws cannot show how skewed the damage of random sets is (the sample skewness of three is at most 0.71), and
    where those that do much are not among them the mean of all is underestimated. Each end is therefore the outer one
    of two: by the skewness that the draws show, and by one that is shrunk towards ``SKEWNESS`` (``shrunk_spread``).

    Args:
        top: d_i of the chosen weights, (..., B, n) or (..., 1, n).
        drawn: d_bi of B random sets, those of the same seeds where the top has seeds, (..., B, n).
        n_tokens: T_i, (..., n).
        clusters: as in ``intervals.ratio_interval``.

    Returns:
        NaN ends with fewer than ``MIN_CLUSTERS`` texts or ``MIN_DRAWS`` draws, or a difference that is not finite.
    """
    with np.errstate(invalid="ignore"):
        pairs = by_cluster(np.subtract(top, drawn), clusters)  # (..., B, C)
    tokens = by_cluster(n_tokens, clusters)  # (..., C)
    n_draws, n_clusters = pairs.shape[-2:]
    if n_draws < MIN_DRAWS:
        return NO_INTERVAL
    with np.errstate(invalid="ignore"):
        effects = pairs.sum(-1) / tokens.sum(-1)[..., None]  # (..., B)
        difference = effects.mean(-1)
        deviations = effects - difference[..., None]
    texts = jackknife_spread(ratio_changes(pairs.mean(-2), tokens), tokens)
    as_drawn = spread_of(deviations / math.sqrt(n_draws * (n_draws - 1)), n_draws - 1)
    ends = [
        interval_around(difference, combined_spread(texts, draws), n_clusters)
        for draws in (as_drawn, shrunk_spread(deviations))
    ]
    return Interval(np.minimum(ends[0].low, ends[1].low), np.maximum(ends[0].high, ends[1].high))


def shrunk_spread(deviations: np.ndarray) -> Spread:
    """The spread of mean_b x_b over random sets, its skewness shrunk towards that of a skewed law.

    The third central moment of x is B Σ dev³ / ((B-1) (B-2)), without bias, averaged with -``SKEWNESS`` s_B³ as if that
    were the moment of ``ASSUMED_DRAWS`` more draws (negative: x is the effect of the chosen weights minus that of a
    random set). The mean has the variance s_B² / B and the third moment of x / B².

    Args:
        deviations: x_b - mean, (..., B).
    """
    n = deviations.shape[-1]
    variance = (deviations**2).sum(-1) / (n - 1)
    third = n * (deviations**3).sum(-1) / ((n - 1) * max(1, n - 2))
    shrunk = (n * third - ASSUMED_DRAWS * SKEWNESS * variance**1.5) / (n + ASSUMED_DRAWS)
    return Spread(variance / n, shrunk / n**2, n - 1)
