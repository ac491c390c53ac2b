"""Top weights against random weights of the same number in the same target."""

from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from scipy import stats

from bridge.analysis.measured_sets import SETTING, random_effects, rows_where, top_sets
from bridge.exchange import layout

COLUMNS = ["target_layer", *SETTING, "delta_nll", "ci_low", "ci_high"]
COLUMNS += ["random_mean", "random_low", "random_high", "n_random"]
COMPARED = ["n_draws", "n_beaten", "difference", "difference_low", "difference_high", "n_eff", "p_value"]
COMPARED += ["unbounded_share", "control_unbounded_share", "note"]
_KEY = ["target_layer", *SETTING]


class LayersAboveRandom(NamedTuple):
    """In how many layers the top weights did more damage than every random draw, and what chance gives.

    Attributes:
        n: layers in which something random was measured.
        wins: layers in which the effect is larger than that of every draw.
        draws: the fewest draws B of any of these layers.
        expected: n / (B + 1), the wins that chance gives.
        p_value: probability of as many wins or more by chance, one-sided; NaN for no layer.
    """

    n: int
    wins: int = 0
    draws: int = 0
    expected: float = np.nan
    p_value: float = np.nan


def top_against_random(measurements: pd.DataFrame, comparisons: pd.DataFrame) -> pd.DataFrame:
    """The effect of each top set next to those of the random sets of its size in its target.

    Args:
        measurements: a table of MEASUREMENTS.
        comparisons: a table of COMPARISONS: the instrument compares draw by draw, a seeded perturbation seed by seed,
            and knows the effects on each text.

    Returns:
        Columns: target_layer, metric, perturbation, k, delta_nll, ci_low, ci_high (means over the seeds where a
        perturbation is random), random_mean, random_low, random_high (mean, smallest and largest effect of the
        draws; NaN where nothing random was measured), n_random. A loss that overflowed is an infinite effect. Then
        from the comparisons, empty where there is none: n_draws, n_beaten (how many of them did less damage),
        difference from the mean of the draws with its interval (difference_low, difference_high) and n_eff, p_value,
        unbounded_share, control_unbounded_share, note.
    """
    draws_of = random_effects(measurements)
    rows = []
    for key, points in top_sets(measurements).groupby(_KEY, sort=False):
        target, _, perturbation, k = cast(tuple[str, str, str, int], key)
        draws = draws_of.get((target, perturbation, k), np.array([]))
        row: dict[str, Any] = dict(zip(_KEY, key, strict=True))
        for column in ("delta_nll", "ci_low", "ci_high"):
            row[column] = points[column].mean()
        row |= {"random_mean": np.nan, "random_low": np.nan, "random_high": np.nan, "n_random": len(draws)}
        if len(draws):
            row |= {"random_mean": draws.mean(), "random_low": draws.min(), "random_high": draws.max()}
        rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.merge(_of_random_sets(comparisons), on=_KEY, how="left")


def _of_random_sets(comparisons: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of top sets with random ones: the columns that name them, and ``COMPARED``."""
    rows = rows_where(comparisons, control=layout.RANDOM)
    rows = rows.rename(columns={"ci_low": "difference_low", "ci_high": "difference_high"})
    return rows.assign(metric=rows["selection"].map(layout.metric_of_label))[[*_KEY, *COMPARED]]


def layers_above_random(n_beaten: np.ndarray, n_draws: np.ndarray) -> LayersAboveRandom:
    """Count the layers whose top weights did more damage than every random draw, and compare with chance.

    If the top weights were random ones, a layer's effect would be the largest with probability 1 / (B + 1) at most,
    also where the draws are those of the same seeds of a noisy perturbation. The binomial p-value takes the layers as
    independent; as they share their texts, this holds only nearly.

    Args:
        n_beaten: how many of each layer's draws did less damage than its top weights, (n,).
        n_draws: how many draws the layer has, (n,); layers without any are left out.
    """
    tested = n_draws > 0
    n = int(tested.sum())
    if n == 0:
        return LayersAboveRandom(n=0)
    draws = int(n_draws[tested].min())
    wins = int((n_beaten[tested] == n_draws[tested]).sum())
    chance = 1 / (draws + 1)
    p_value = float(stats.binomtest(wins, n, chance, alternative="greater").pvalue)
    return LayersAboveRandom(n=n, wins=wins, draws=draws, expected=chance * n, p_value=p_value)
