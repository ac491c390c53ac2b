"""What zeroing the global top weights does to a model's perplexity, comparable between models."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from bridge.analysis.measured_sets import infinite_where_undefined, rows_where
from bridge.exchange import layout


class AblationRatios(NamedTuple):
    """Perplexity after over perplexity before, when the global top-K was zeroed.

    Attributes:
        ablation_k: K, the largest that was measured.
        ppl_ratio: the ratio.
        ppl_ratio_low: lower end of its 95 % interval, that of delta_nll exponentiated.
        ppl_ratio_high: upper end.
        random_ppl_ratio: the largest ratio of the random sets of K weights; NaN without any.
        random_unbounded_share: share of these whose loss is infinite or undefined, which is the largest ratio.
    """

    ablation_k: int
    ppl_ratio: float
    ppl_ratio_low: float
    ppl_ratio_high: float
    random_ppl_ratio: float
    random_unbounded_share: float


def zeroed_top_sets(measurements: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The measurements of a metric's zeroed global top sets, K ascending (table MEASUREMENTS).

    The effect of a loss that overflowed, to infinity or to NaN, is infinite.
    """
    rows = rows_where(measurements, target_layer=layout.ALL, perturbation="zero", selection=layout.top_label(metric))
    rows = rows.assign(delta_nll=infinite_where_undefined(rows["delta_nll"]))
    return rows.sort_values("k").reset_index(drop=True)


def ablation_ratios(measurements: pd.DataFrame, metric: str) -> AblationRatios | None:
    """What zeroing the largest global top set of a metric did; None if none was measured."""
    top = zeroed_top_sets(measurements, metric)
    if top.empty:
        return None
    largest = top.iloc[-1]
    random = rows_where(
        measurements, target_layer=layout.ALL, perturbation="zero", selection=layout.RANDOM, k=largest["k"]
    )
    draws = infinite_where_undefined(random["delta_nll"])
    with np.errstate(over="ignore"):
        return AblationRatios(
            ablation_k=int(largest["k"]),
            ppl_ratio=float(np.exp(largest["delta_nll"])),
            ppl_ratio_low=float(np.exp(largest["ci_low"])),
            ppl_ratio_high=float(np.exp(largest["ci_high"])),
            random_ppl_ratio=float(np.exp(draws.max())),
            random_unbounded_share=float(np.isinf(draws).mean()) if len(draws) else np.nan,
        )


def ratios_at_equal_fraction(
    curves: dict[str, pd.DataFrame], n_weights: dict[str, int]
) -> tuple[float, dict[str, float]]:
    """The perplexity ratio of each model when the same fraction of its weights is zeroed.

    The fraction is the largest that every model was measured up to. ``delta_nll`` is interpolated linearly in log K
    between the K that were measured.

    Args:
        curves: by model, ``k`` and ``delta_nll`` of its zeroed global top sets.
        n_weights: by model, how many weights were ranked.

    Returns:
        The fraction, and by model the ratio; NaN where its smallest set was larger than that.
    """
    fraction = min(curve["k"].max() / n_weights[name] for name, curve in curves.items())
    ratios = {}
    for name, curve in curves.items():
        ascending = curve.sort_values("k")
        ks = ascending["k"].to_numpy(float)
        k = fraction * n_weights[name]
        if k * (1 + 1e-9) < ks[0]:
            ratios[name] = float("nan")
            continue
        delta_nll = np.interp(np.log(k), np.log(ks), ascending["delta_nll"].to_numpy(float))
        with np.errstate(over="ignore"):
            ratios[name] = float(np.exp(delta_nll))
    return float(fraction), ratios
