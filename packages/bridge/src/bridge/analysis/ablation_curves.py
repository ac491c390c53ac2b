"""Curves of the effect against the number K of perturbed weights, summed up as their mean height over log K."""

from typing import Any, cast

import numpy as np
import pandas as pd

from bridge.analysis.measured_sets import random_effects, single_layers, top_sets

COLUMNS = ["target_layer", "metric", "perturbation", "n_k", "k_low", "k_high", "area", "area_random", "area_excess"]


def mean_height(ks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Area under curves against ln K by the trapezoid rule, divided by the width: a height in the unit of the values.

    Args:
        ks: the numbers of weights, ascending, (m,), m at least 2.
        values: the curves, (n, m).

    Returns:
        (n,)
    """
    log_k = np.log(ks)
    middles = (values[:, 1:] + values[:, :-1]) / 2  # (n, m - 1)
    areas = (middles * np.diff(log_k)).sum(axis=1)  # (n,)
    heights: np.ndarray = areas / (log_k[-1] - log_k[0])
    return heights


def ablation_curves(measurements: pd.DataFrame) -> pd.DataFrame:
    """The curve of delta_nll against ln K of each target and metric, next to random weights.

    Only targets that were measured at several K.

    Args:
        measurements: a table of MEASUREMENTS.

    Returns:
        Columns: target_layer, metric, perturbation, n_k, k_low, k_high, area (the mean height of the curve, nats per
        token), area_random (of the mean of the random draws at the same K), area_excess = area - area_random; the
        last two are empty if a K lacks random draws.
    """
    random_means = {key: effects.mean() for key, effects in random_effects(measurements).items()}
    rows = []
    groups = top_sets(measurements).groupby(["target_layer", "metric", "perturbation"], sort=False)
    for key, points in groups:
        target, metric, perturbation = cast(tuple[str, str, str], key)
        curve = points.groupby("k")["delta_nll"].mean()  # ascending in k
        if len(curve) < 2:
            continue
        ks = curve.index.to_numpy(float)
        random = np.array([random_means.get((target, perturbation, k), np.nan) for k in curve.index])
        area, area_random = mean_height(ks, np.array([curve.to_numpy(float), random]))
        row: dict[str, Any] = {"target_layer": target, "metric": metric, "perturbation": perturbation}
        row |= {"n_k": len(curve), "k_low": curve.index[0], "k_high": curve.index[-1]}
        row |= {"area": area, "area_random": area_random}
        row["area_excess"] = area - area_random if np.isfinite(area_random) else np.nan
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def curves_of_layers(points: pd.DataFrame) -> tuple[pd.DataFrame, list[int]]:
    """For each layer, the mean heights of its predicted and of its measured curve.

    Args:
        points: the top sets of one metric under one perturbation (see ``top_sets``).

    Returns:
        ``score_sum`` and ``delta_nll`` of the layers that were measured at every K, and these K; no layers where
        there are fewer than two K.
    """
    means = single_layers(points).groupby(["target_layer", "k"])[["score_sum", "delta_nll"]].mean()
    scores, effects = means["score_sum"].unstack("k"), means["delta_nll"].unstack("k")  # k ascending
    complete = effects.notna().all(axis=1)
    ks = effects.columns.to_numpy(float)
    if len(ks) < 2 or not complete.any():
        return pd.DataFrame(), []
    heights = {
        "score_sum": mean_height(ks, scores[complete].to_numpy(float)),
        "delta_nll": mean_height(ks, effects[complete].to_numpy(float)),
    }
    return pd.DataFrame(heights, index=effects.index[complete]), [int(k) for k in effects.columns]
