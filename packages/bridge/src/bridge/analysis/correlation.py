"""Does the predicted criticality agree with the measured effect? Tables from the measurements table.

The unit is named in each row: ``layers`` (the score of a layer's perturbed weights against what perturbing
them did), ``weights`` (single weights, all metrics on the same ones), ``ablation_curve`` (layers again, over all k
at once).
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from bridge.analysis.rank_agreement import MIN_POINTS, agreement, rank_p_value, rho_difference_interval
from bridge.analysis.single_weights import sampled_metrics, weight_effects
from bridge.exchange.tables import CORRELATIONS

ALL = "ALL"
BASELINE = "magnitude"  # the metric that every other must beat
RANGE_NOTE = "only the top-ranked layers were tested: the range is restricted and rho is biased"
_KEYS = ["metric", "perturbation", "k"]


def correlate(
    measurements: pd.DataFrame,
    seed: int = 0,
    targets: pd.DataFrame | None = None,
    sampled: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Rank agreement of prediction and effect, one row per unit, metric, perturbation and k.

    For layers the prediction is ``score_sum``, the effect ``delta_nll`` (the mean over seeds where a
    perturbation is random). The target ALL is no layer and is left out. For single weights the prediction is
    the score of that weight by each metric, the effect abs(``delta_nll``): a score is the size of a change, and
    taking one weight away may as well lower the loss. ``p_adjusted`` controls the false discovery rate over
    the metrics that share unit, perturbation and k (Benjamini & Hochberg 1995). ``above_magnitude`` is rho minus that
    of the weights' magnitude over the same units, with the paired bootstrap interval.

    Args:
        measurements: a table of MEASUREMENTS.
        seed: of the bootstrap and the permutations.
        targets: a table of TARGETS; where they restrict the range, the note says so.
        sampled: a table of SAMPLED_WEIGHTS; without it there are no rows of the unit weights.

    Returns:
        A table of CORRELATIONS; an estimate that cannot be had is empty, and its note says why.
    """
    restricted = targets is not None and is_restricted(targets)
    rows = []
    comparisons = list(_comparisons(measurements, sampled))
    baselines = {(unit, *key[1:]): points for unit, key, points in comparisons if key[0] == BASELINE}
    for unit, key, points in comparisons:
        purpose = "/".join(["correlation", unit, *map(str, key)])
        rng = np.random.default_rng([seed, *purpose.encode()])
        found = agreement(
            points["score_sum"].to_numpy(float),
            points["delta_nll"].to_numpy(float),
            rng,
            "weights" if unit == "weights" else "layers",
        )
        notes = [found.note, points.attrs.get("note", ""), RANGE_NOTE if restricted and unit != "weights" else ""]
        rows.append(
            {"unit": unit, **dict(zip(_KEYS, key, strict=True))}
            | found._asdict()
            | _above(points, baselines.get((unit, *key[1:])), [seed, *f"difference/{purpose}".encode()])
            | {"note": "; ".join(filter(None, notes))}
        )
    return _with_adjusted_p(pd.DataFrame(rows, columns=list(CORRELATIONS.columns)))


def is_restricted(targets: pd.DataFrame) -> bool:
    """Whether only the highest layers of more are among the targets (table TARGETS)."""
    return "control" not in set(targets["role"]) and bool((targets["n_layers"] > len(targets)).any())


def _comparisons(measurements: pd.DataFrame, sampled: pd.DataFrame | None) -> Iterator[tuple[str, tuple, pd.DataFrame]]:
    """Unit, (metric, perturbation, k), and the points as ``score_sum`` and ``delta_nll``."""
    tops = _tops(measurements)
    for key, points in tops.groupby(_KEYS, sort=False):
        yield "layers", key, _per_target(points)
    effects = weight_effects(measurements, sampled)
    for perturbation in effects["perturbation"].unique() if len(effects) else ():
        for metric in sampled_metrics(sampled):
            yield "weights", (metric, perturbation, 1), _weight_points(effects, metric, perturbation)
    for (metric, perturbation), points in tops.groupby(_KEYS[:2], sort=False):
        areas = _layer_areas(points)
        if len(areas):
            yield "ablation_curve", (metric, perturbation, int(points["k"].max())), areas


def _weight_points(effects: pd.DataFrame, metric: str, perturbation: str) -> pd.DataFrame:
    rows = effects[effects["perturbation"] == perturbation]
    return pd.DataFrame({"score_sum": rows[f"score_{metric}"], "delta_nll": rows["size"]})


def _tops(measurements: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``top_<metric>``, with their metric, and undefined effects as infinite."""
    frame = measurements[measurements["selection"].str.startswith("top_")].copy()
    frame["metric"] = frame["selection"].str.removeprefix("top_")
    frame["delta_nll"] = _unbounded(frame["delta_nll"])
    return frame


def _unbounded(effect: pd.Series) -> pd.Series:
    """An overflowed loss, whichever way it shows, as an infinite effect."""
    return effect.astype(float).where(np.isfinite(effect.astype(float)), np.inf)


def _per_target(points: pd.DataFrame) -> pd.DataFrame:
    layers = points[points["target_layer"] != ALL]
    return layers.groupby("target_layer", sort=False)[["score_sum", "delta_nll"]].mean()


def _layer_areas(points: pd.DataFrame) -> pd.DataFrame:
    """For each layer measured at the same several k: areas under its predicted and its measured curve."""
    curves = points[points["target_layer"] != ALL].groupby(["target_layer", "k"], sort=False)
    curves = curves[["score_sum", "delta_nll"]].mean()
    effect, score = (curves[column].unstack("k").sort_index(axis=1) for column in ["delta_nll", "score_sum"])
    complete = effect.notna().all(axis=1)
    if effect.shape[1] < 2 or not complete.any():
        return pd.DataFrame()
    areas = pd.DataFrame(
        {"score_sum": _area(score[complete]), "delta_nll": _area(effect[complete])}, index=effect.index[complete]
    )
    areas.attrs["note"] = f"mean height of the curve over log k, k = {', '.join(map(str, effect.columns))}"
    return areas


def _area(curves: pd.DataFrame) -> np.ndarray:
    """Area under each row against ln k, divided by the width: a mean height, in the rows' unit."""
    log_k = np.log(curves.columns.to_numpy(float))
    values = curves.to_numpy(float)
    heights = (values[:, 1:] + values[:, :-1]) / 2
    return (heights * np.diff(log_k)).sum(axis=1) / (log_k[-1] - log_k[0])


def _with_adjusted_p(table: pd.DataFrame) -> pd.DataFrame:
    """``p_adjusted`` by Benjamini and Hochberg over the metrics of each unit, perturbation and k."""
    table["p_adjusted"] = np.nan
    for _, group in table[table["p_value"].notna()].groupby(["unit", "perturbation", "k"], sort=False):
        table.loc[group.index, "p_adjusted"] = stats.false_discovery_control(group["p_value"].to_numpy(float))
    return table


def _above(points: pd.DataFrame, baseline: pd.DataFrame | None, key: list[int]) -> dict[str, float]:
    """By how much the rho of some points is above the baseline's over the units that both hold; empty for neither."""
    if baseline is None or baseline is points:
        return {}
    points, baseline = points.dropna(), baseline.dropna()
    shared = points.index.intersection(baseline.index, sort=False)
    first, second = (tuple(table.loc[shared].to_numpy(float).T) for table in (points, baseline))
    if len(shared) < MIN_POINTS or any(
        np.ptp(ranks) == 0 for xy in (first, second) for ranks in map(stats.rankdata, xy)
    ):
        return {}
    found = rho_difference_interval(first, second, np.random.default_rng(key))
    return dict(zip(["above_magnitude", "above_low", "above_high"], found, strict=True))


def top_against_random(measurements: pd.DataFrame) -> pd.DataFrame:
    """Each top set against random sets of the same size in the same target.

    Columns: target_layer, metric, perturbation, k, delta_nll, ci_low, ci_high, random_mean, random_low,
    random_high (smallest and largest draw), n_random, p_value = (1 + r) / (B + 1) with r of the B draws doing
    at least as much damage: with 3 draws it cannot be below 0.25. Empty where nothing random was measured.
    """
    tops = _tops(measurements)
    controls = _random_effects(measurements)
    rows = []
    for (target, metric, perturbation, k), points in tops.groupby(["target_layer", *_KEYS], sort=False):
        drawn = controls.get((target, perturbation, k), np.array([]))
        effect = points["delta_nll"].mean()
        rows.append(
            {"target_layer": target, "metric": metric, "perturbation": perturbation, "k": k, "delta_nll": effect}
            | {end: points[end].mean() for end in ["ci_low", "ci_high"]}
            | _spread(drawn)
            | {"n_random": len(drawn), "p_value": rank_p_value(effect, drawn) if len(drawn) else np.nan}
        )
    columns = ["target_layer", *_KEYS, "delta_nll", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=[*columns, "random_mean", "random_low", "random_high", "n_random", "p_value"])


def _random_effects(measurements: pd.DataFrame) -> dict[tuple, np.ndarray]:
    drawn = measurements[measurements["selection"] == "random"]
    groups = drawn.groupby(["target_layer", "perturbation", "k"], sort=False)["delta_nll"]
    return {key: _unbounded(effects).to_numpy() for key, effects in groups}


def _spread(drawn: np.ndarray) -> dict[str, float]:
    if not len(drawn):
        return dict.fromkeys(["random_mean", "random_low", "random_high"], np.nan)
    return {"random_mean": drawn.mean(), "random_low": drawn.min(), "random_high": drawn.max()}


def ablation_curves(measurements: pd.DataFrame) -> pd.DataFrame:
    """The curve of delta_nll against log k of each target and metric, next to random weights.

    Only targets measured at several k. Columns: target_layer, metric, perturbation, n_k, k_low, k_high, area
    (the mean height of the curve over ln k, nats per token), area_random (of the mean of the random draws at
    the same k), area_excess = area - area_random; the last two are empty if a k lacks random draws.
    """
    controls = {key: effects.mean() for key, effects in _random_effects(measurements).items()}
    rows = []
    tops = _tops(measurements).groupby(["target_layer", "metric", "perturbation"], sort=False)
    for (target, metric, perturbation), points in tops:
        curve = points.groupby("k")["delta_nll"].mean().to_frame().T
        if curve.shape[1] < 2:
            continue
        random = pd.DataFrame([[controls.get((target, perturbation, k), np.nan) for k in curve]], columns=curve.columns)
        area, area_random = float(_area(curve)[0]), float(_area(random)[0])
        ends = {"n_k": curve.shape[1], "k_low": curve.columns[0], "k_high": curve.columns[-1]}
        rows.append(
            {"target_layer": target, "metric": metric, "perturbation": perturbation, **ends, "area": area}
            | {"area_random": area_random, "area_excess": area - area_random if np.isfinite(area_random) else np.nan}
        )
    columns = ["target_layer", "metric", "perturbation", "n_k", "k_low", "k_high", "area", "area_random", "area_excess"]
    return pd.DataFrame(rows, columns=columns)
