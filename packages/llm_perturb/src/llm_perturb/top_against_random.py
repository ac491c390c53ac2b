"""Chosen weights against random ones of the same number in the same target."""

import math

import numpy as np
import pandas as pd
from bridge.analysis.rank_agreement import rank_p_value

from llm_perturb.intervals import MIN_SEQUENCES, Interval

MIN_DRAWS = 2
_CONTROLS = {"top": ["random", "matched"], "row": ["random_row"], "col": ["random_col"]}
COLUMNS = ["target_layer", "parameter", "selection", "perturbation", "k", "seed", "row", "col", "control", "n_draws"]
COLUMNS += ["delta_nll", "control_mean", "control_low", "control_high", "difference", "ci_low", "ci_high", "p_value"]
COLUMNS += ["note"]


def compare(table: pd.DataFrame, differences: np.ndarray, n_tokens: np.ndarray) -> pd.DataFrame:
    """Each top set (row, column) against the random ones of its target, perturbation and k; empty where none is.

    Args:
        table: measurements.
        differences: d_i of each measurement, nats of sequence i after minus before, (rows, n).
        n_tokens: T_i, (n,).

    Returns:
        ``COLUMNS``: the effect, mean, smallest and largest effect of the draws, effect minus mean of the draws
        with its 95 % interval, and the rank p-value (1 + r) / (B + 1), r of B draws doing at least as much
        damage. A loss that is not finite counts as the largest damage.
    """
    places = ["target_layer", "parameter", "perturbation", "k"]
    groups = {key: list(rows) for key, rows in table.reset_index(drop=True).groupby(places, sort=False).indices.items()}
    found = []
    for at, row in enumerate(table.to_dict("records")):
        kind, _, metric = row["selection"].partition("_")
        for control in _CONTROLS.get(kind, []):
            label = f"matched_{metric}" if control == "matched" else control
            same = groups[tuple(row[name] for name in places)]
            drawn = [j for j in same if table["selection"].iloc[j] == label]
            if drawn:
                effects = _unbounded(table["delta_nll"].iloc[[at, *drawn]].to_numpy(float))
                interval = difference_interval(differences[at], differences[drawn], n_tokens)
                found.append(_row(row, label, effects[0], effects[1:], interval, len(n_tokens)))
    return pd.DataFrame(found, columns=COLUMNS).astype({"seed": "Int64", "row": "Int64", "col": "Int64"})


def _row(row: dict, control: str, effect: float, drawn: np.ndarray, interval: Interval, n: int) -> dict:
    mean = drawn.mean()
    notes = [f"{n} sequences are too few for an interval"] * (n < MIN_SEQUENCES)
    notes += ["one draw tells nothing of other draws"] * (len(drawn) < MIN_DRAWS)
    notes += ["a loss is not finite"] * (not np.isfinite([effect, mean]).all())
    return {name: row[name] for name in COLUMNS if name in row and name not in ("ci_low", "ci_high")} | {
        "control": control,
        "n_draws": len(drawn),
        "delta_nll": effect,
        "control_mean": mean,
        "control_low": drawn.min(),
        "control_high": drawn.max(),
        "difference": effect - mean if np.isfinite(mean) else math.nan,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "p_value": rank_p_value(effect, drawn),
        "note": "; ".join(notes),
    }


def _unbounded(effects: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(effects), effects, np.inf)


def difference_interval(
    effect: np.ndarray, drawn: np.ndarray, n_tokens: np.ndarray, n_resamples: int = 2000
) -> Interval:
    """Bootstrap of (Σ d_i - mean over draws of Σ d_bi) / Σ T_i over sequences and, independently, over draws.

    Whole sequences are drawn with replacement, the same for both sides of the difference, and so are the
    random sets: another experimenter would have taken other texts and other random weights. Percentile
    interval, 95 %, always the same resamples for the same numbers of sequences and draws.

    Args:
        effect: d_i of the chosen weights, (n,).
        drawn: d_bi of B random sets, (B, n).
        n_tokens: T_i, (n,).
        n_resamples: how often.

    Returns:
        NaN ends with fewer than ``MIN_SEQUENCES`` sequences or ``MIN_DRAWS`` draws, or a difference that is not finite.
    """
    n, n_draws = len(effect), len(drawn)
    finite = np.isfinite(effect).all() and np.isfinite(drawn).all()
    if n < MIN_SEQUENCES or n_draws < MIN_DRAWS or not finite:
        return Interval(math.nan, math.nan)
    rng = np.random.default_rng(0)
    texts = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)  # how often each sequence is drawn, (R, n)
    sets = rng.multinomial(n_draws, np.full(n_draws, 1 / n_draws), size=n_resamples) / n_draws  # (R, B)
    controls = ((sets @ drawn) * texts).sum(1)
    ratios = (texts @ effect - controls) / (texts @ n_tokens)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(low), float(high))
