"""From the tables of a discovery run to the layers whose perturbation is worth measuring."""

import re
import shlex
from typing import Literal

import pandas as pd

from bridge.exchange.errors import RequestError
from bridge.exchange.tables import TARGETS

_PLAIN = re.compile(r"[\w.,]+", re.ASCII)  # means nothing to a shell between double quotes

By = Literal["count", "score"]


def choose_targets(
    top_weights: pd.DataFrame, summary: pd.DataFrame, n_top: int, n_control: int, by: By = "count"
) -> pd.DataFrame:
    """The layers that rank highest, and control layers from the whole range of ranks.

    A correlation over the highest layers alone is biased, their range being restricted; the controls lie at
    evenly spaced positions of the score rank among the layers not chosen yet, from its first to its last.

    Args:
        top_weights: global top-K (table TOP_WEIGHTS).
        summary: every parameter in model order (table LAYER_SUMMARY); each of its rows is a possible target.
        n_top: how many layers with role ``top``.
        n_control: how many layers with role ``control``.
        by: ``count`` ranks layers by how many of the top-K they hold, ties by summed score; ``score`` by
            summed score. What still ties stays in model order.

    Returns:
        Table TARGETS: the top layers, best first, then the controls, highest score first. Fewer than asked
        for where the model has no more. Whether the layers left out restrict the range, ``n_layers`` tells.

    Raises:
        RequestError: a negative number of layers.
    """
    if n_top < 0 or n_control < 0:
        raise RequestError(f"a number of layers cannot be negative: {min(n_top, n_control)}")
    ranked = _ranked(top_weights, summary)
    keys = ["n_top", "score_sum"] if by == "count" else ["score_sum"]
    top = ranked.sort_values(keys, ascending=False, kind="stable").head(n_top).assign(role="top")
    others = ranked.drop(top.index).sort_values("score_rank")
    control = others.iloc[spread(len(others), n_control)].assign(role="control")
    return pd.concat([top, control], ignore_index=True)[list(TARGETS.columns)]


def spread(size: int, count: int) -> list[int]:
    """``count`` evenly spaced positions of ``range(size)``, both ends among them; one alone is the middle.

    >>> spread(9, 3)
    [0, 4, 8]
    """
    if count >= size:
        return list(range(size))
    if count <= 1:
        return [(size - 1) // 2][:count]
    return [(2 * i * (size - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]  # half rounds up


def _ranked(top_weights: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """One row for each parameter, in model order: its name as a TARGET_LAYER, its share of the top-K, its rank."""
    counts = top_weights["parameter"].value_counts()
    return pd.DataFrame(
        {
            "target_layer": target_names(summary),
            "n_top": summary["parameter"].map(counts).fillna(0).astype("int64"),
            "score_sum": summary["score_sum"],
            "score_rank": summary["score_sum"].rank(ascending=False, method="first").astype("int64"),
            "n_layers": len(summary),
        }
    ).reset_index(drop=True)


def target_names(summary: pd.DataFrame) -> pd.Series:
    """What names each parameter alone: its module, or its full name where the module would mean another or several."""
    alone = ~summary["layer"].duplicated(keep=False) & (summary["parameter"] == summary["layer"] + ".weight")
    return summary["layer"].where(alone, summary["parameter"])


def render(targets: pd.DataFrame, form: Literal["env", "list", "csv"]) -> str:
    """The targets as text: a shell assignment, one name a line, or a CSV with all columns.

    The assignment is safe to evaluate: all but letters, digits, ``_``, ``.`` and ``,`` is quoted for the shell.
    """
    names = targets["target_layer"].tolist()
    if form == "env":
        joined = ",".join(names)
        return f'TARGET_LAYER="{joined}"' if _PLAIN.fullmatch(joined) else f"TARGET_LAYER={shlex.quote(joined)}"
    return "\n".join(names) if form == "list" else targets.to_csv(index=False).rstrip("\n")
