"""Rows of the measurements table (MEASUREMENTS) by what was perturbed: top sets of weights and random sets."""

from collections.abc import Hashable
from typing import cast

import numpy as np
import pandas as pd

from bridge.exchange import layout

SETTING = ["metric", "perturbation", "k"]


def rows_where(table: pd.DataFrame, **values: Hashable) -> pd.DataFrame:
    """The rows that hold each of the values in the column of that name.

    >>> rows_where(pd.DataFrame({"k": [1, 1, 2], "seed": [0, 1, 0]}), k=1, seed=0).index.tolist()
    [0]
    """
    chosen = np.ones(len(table), dtype=bool)
    for column, value in values.items():
        chosen &= (table[column] == value).to_numpy(dtype=bool)
    return table[chosen]


def first_row(table: pd.DataFrame, **values: Hashable) -> pd.Series | None:
    """The first of the rows that hold each of the values; None without any."""
    rows = rows_where(table, **values)
    return rows.iloc[0] if len(rows) else None


def single_layers(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose target is one layer and not the whole model."""
    return table[table["target_layer"] != layout.ALL]


def top_sets(measurements: pd.DataFrame) -> pd.DataFrame:
    """The measurements of each metric's top weights, with the column ``metric``; undefined effects are infinite."""
    rows = measurements[measurements["selection"].map(layout.is_top).astype(bool)].copy()
    rows["metric"] = rows["selection"].map(layout.metric_of_label)
    rows["delta_nll"] = infinite_where_undefined(rows["delta_nll"])
    return rows


def random_effects(measurements: pd.DataFrame) -> dict[tuple[str, str, int], np.ndarray]:
    """The effects of the random sets, one for each draw, by (target_layer, perturbation, k)."""
    drawn = measurements[measurements["selection"] == layout.RANDOM]
    groups = drawn.groupby(["target_layer", "perturbation", "k"])["delta_nll"]
    return {cast(tuple[str, str, int], key): infinite_where_undefined(effects).to_numpy() for key, effects in groups}


def infinite_where_undefined(effects: pd.Series) -> pd.Series:
    """The effects as floats; a loss that overflowed, whether to infinity or to NaN, is an infinite effect."""
    effects = effects.astype(float)
    return effects.where(np.isfinite(effects), np.inf)


def text_effects(losses: pd.DataFrame, selection: str, perturbation: str, k: int) -> tuple[pd.DataFrame, np.ndarray]:
    """What perturbing a selection of each target costs on each text, and the number of predicted tokens there.

    Args:
        losses: one row a measurement and sequence, with the columns target_layer, selection, perturbation, k, seed,
            ``sequence`` (or ``cluster``, which sequences of one text share), n_tokens, baseline_nats, perturbed_nats.
        selection: whose rows.
        perturbation: likewise.
        k: likewise.

    Returns:
        Nats after minus before by target (rows) and text (columns), means over the seeds; and tokens, (texts,).
    """
    rows = rows_where(losses, selection=selection, perturbation=perturbation, k=k)
    text = "cluster" if "cluster" in rows else "sequence"
    n_seeds = rows.groupby("target_layer")["seed"].transform(lambda seeds: max(1, seeds.nunique()))
    rows = rows.assign(effect=(rows["perturbed_nats"] - rows["baseline_nats"]) / n_seeds)
    rows = rows.sort_values(["seed", "sequence"], kind="stable")  # the same digits whatever their order was
    effects = rows.groupby(["target_layer", text])["effect"].sum(min_count=1).unstack(text)
    sequences = rows.drop_duplicates("sequence")
    n_tokens = sequences.groupby(text)["n_tokens"].sum().reindex(effects.columns)
    return effects, n_tokens.to_numpy(float)
