"""Which layers of a discovery to perturb: the highest-ranked ones, and a sample of all others of known probability."""

import re
import shlex
from typing import Literal

import numpy as np
import pandas as pd

from bridge.analysis.components import decoder_part
from bridge.analysis.layer_sample import draw_layers
from bridge.exchange.errors import RequestError
from bridge.exchange.tables import TARGETS

_PLAIN = re.compile(r"[\w.,]+", re.ASCII)  # means nothing to a shell between double quotes

By = Literal["count", "score"]
RANGE_NOTE = "only the top-ranked layers were tested: the range is restricted and rho is biased"


def choose_targets(
    top_weights: pd.DataFrame, summary: pd.DataFrame, n_top: int, n_control: int, by: By = "count", seed: int = 0
) -> pd.DataFrame:
    """The layers that rank highest, and a random sample of the others.

    A correlation over the highest layers alone is biased, their range being restricted. The controls are drawn from
    the layers not chosen yet, all with the same probability, spread over the kinds of matrix and within each over the
    range of the score (``layer_sample``).

    Args:
        top_weights: global top-K (table TOP_WEIGHTS).
        summary: every parameter in model order (table LAYER_SUMMARY); each of its rows is a possible target.
        n_top: how many layers with role ``top``; their inclusion probability is 1.
        n_control: how many layers with role ``control``.
        by: ``count`` ranks layers by how many of the top-K they hold, ties by summed score; ``score`` by
            summed score. What still ties stays in model order.
        seed: of the draw.

    Returns:
        Table TARGETS: the top layers, best first, then the controls, highest score first. Fewer than asked
        for where the model has no more. Whether the layers left out restrict the range, ``n_layers`` tells.

    Raises:
        RequestError: a negative number of layers.
    """
    if n_top < 0 or n_control < 0:
        raise RequestError(f"a number of layers cannot be negative: {min(n_top, n_control)}")
    ranked = _rank_layers(top_weights, summary)
    keys = ["n_top", "score_sum"] if by == "count" else ["score_sum"]
    top = ranked.sort_values(keys, ascending=False, kind="stable").head(n_top).assign(role="top", inclusion=1.0)
    others = ranked.drop(top.index)
    kinds = [decoder_part(parameter).component for parameter in summary["parameter"].iloc[others.index]]
    rng = np.random.default_rng([seed, *b"layers"])
    drawn = draw_layers(-others["score_rank"].to_numpy(float), kinds, n_control, rng)
    control = others.iloc[drawn.chosen].assign(role="control", inclusion=drawn.inclusion).sort_values("score_rank")
    return pd.concat([top, control], ignore_index=True)[list(TARGETS.columns)]


def is_restricted(targets: pd.DataFrame) -> bool:
    """Whether only the highest-ranked of more layers are among the targets (table TARGETS)."""
    has_controls = "control" in set(targets["role"])
    some_left_out = (targets["n_layers"] > len(targets)).any()
    return not has_controls and bool(some_left_out)


def _rank_layers(top_weights: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
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
    only_one_of_module = ~summary["layer"].duplicated(keep=False)
    is_weight_of_module = summary["parameter"] == summary["layer"] + ".weight"
    return summary["layer"].where(only_one_of_module & is_weight_of_module, summary["parameter"])


def render(targets: pd.DataFrame, form: Literal["env", "list", "csv"]) -> str:
    """The targets as text: a shell assignment, one name a line, or a CSV with all columns.

    The assignment is safe to evaluate: all but letters, digits, ``_``, ``.`` and ``,`` is quoted for the shell.
    """
    names = targets["target_layer"].tolist()
    if form == "env":
        joined = ",".join(names)
        return f'TARGET_LAYER="{joined}"' if _PLAIN.fullmatch(joined) else f"TARGET_LAYER={shlex.quote(joined)}"
    return "\n".join(names) if form == "list" else targets.to_csv(index=False).rstrip("\n")
