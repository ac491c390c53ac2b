"""How much of a model's score, and of its robustness, hangs on how few of its weights."""

import numpy as np
import pandas as pd

from bridge.analysis.correlation import ALL

FRACTION = 1e-4  # of all weights, whose share of the score is compared across models


def top_score_share(
    top: pd.DataFrame, sampled: pd.DataFrame | None, metric: str, total: float, n_weights: int
) -> float:
    """The share of all score that the highest ``FRACTION`` of the weights hold.

    The scores of the ranks within the exact top-K are added. Beyond, log score is interpolated linearly in log
    rank between the sampled weights, whose rank is known (``share_<metric>``), and the ranks' scores are added.

    Args:
        top: the global top-K, table TOP_WEIGHTS.
        sampled: table SAMPLED_WEIGHTS; without it, or without its shares, only the top-K is known.
        metric: whose scores.
        total: the score of all weights.
        n_weights: how many there are.

    Returns:
        Between 0 and 1; NaN where the scores are not known so far down, or their total is 0.
    """
    m = max(1, round(FRACTION * n_weights))
    scores = np.sort(top["score"].to_numpy(float))[::-1]
    known = scores[:m].sum()
    if total <= 0 or (m > len(scores) and (sampled is None or f"share_{metric}" not in sampled)):
        return float("nan")
    if m > len(scores):
        ranks, values = (sampled[f"{column}_{metric}"].to_numpy(float) for column in ("share", "score"))
        beyond = (ranks * n_weights > len(scores)) & (values > 0)
        ranks = np.sort(np.r_[len(scores), ranks[beyond] * n_weights])
        values = np.sort(np.r_[scores[-1], values[beyond]])[::-1]
        if scores[-1] <= 0 or ranks[-1] < m:
            return float("nan")
        known += _sum_between(ranks, values, len(scores), m)
    return float(min(1.0, known / total))


def _sum_between(ranks: np.ndarray, values: np.ndarray, first: int, last: int) -> float:
    """The sum of the interpolated scores over the ranks first + 1 to last."""
    edges = np.unique(np.geomspace(first, last, 2000).round())  # (m,): every rank is in one piece
    middles = np.exp(np.interp(np.log((edges[1:] + edges[:-1] + 1) / 2), np.log(ranks), np.log(values)))
    return float((middles * np.diff(edges)).sum())


def at_equal_fraction(curves: dict[str, pd.DataFrame], n_weights: dict[str, int]) -> tuple[float, dict[str, float]]:
    """The perplexity ratio of each model when the same fraction of its weights is ablated.

    The fraction is the largest that every model was measured up to. ``delta_nll`` is interpolated linearly in log k
    between the sizes that were measured.

    Args:
        curves: by model, ``k`` and ``delta_nll`` of its global top sets.
        n_weights: by model, how many weights were ranked.

    Returns:
        The fraction, and by model the ratio; NaN where its smallest set was larger than that.
    """
    fraction = min(curve["k"].max() / n_weights[name] for name, curve in curves.items())
    ratios = {}
    for name, curve in curves.items():
        curve, k = curve.sort_values("k"), fraction * n_weights[name]
        inside = curve["k"].iloc[0] <= k * (1 + 1e-9)
        effect = np.interp(np.log(k), np.log(curve["k"].to_numpy(float)), curve["delta_nll"].to_numpy(float))
        with np.errstate(over="ignore"):
            ratios[name] = float(np.exp(effect)) if inside else float("nan")
    return float(fraction), ratios


def global_curve(measurements: pd.DataFrame, metric: str) -> pd.DataFrame:
    """``k`` and ``delta_nll`` of the zeroed global top sets of a metric (table MEASUREMENTS), k ascending."""
    rows = measurements[(measurements["target_layer"] == ALL) & (measurements["perturbation"] == "zero")]
    rows = rows[rows["selection"] == f"top_{metric}"]
    return rows[["k", "delta_nll"]].sort_values("k").reset_index(drop=True)
