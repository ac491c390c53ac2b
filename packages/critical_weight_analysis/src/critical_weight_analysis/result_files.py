"""The files of a discovery's run folder, and what is said at its end."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from bridge.exchange.printable import say
from bridge.exchange.tables import LAYER_SUMMARY, SAMPLED_WEIGHTS, STABILITY, TOP_WEIGHTS, write_table

from critical_weight_analysis import plots
from critical_weight_analysis.discovery import Discovery

Tops = dict[str, dict[int, pd.DataFrame]]  # metric -> K -> the global top-K

_ROWS_SHOWN = 5
_log = logging.getLogger("critical_weight_analysis")


def write_tables(found: Discovery, tops: Tops, mode: Sequence[str], folder: Path) -> None:
    """The rankings, with what they are to be compared with, the summaries and the sample."""
    for metric, by_k in tops.items():
        for k, top in by_k.items():
            if "global" in mode:
                write_table(folder / f"top_{k}_weights_{metric}.csv", top, TOP_WEIGHTS)
            if "per_layer" in mode:
                within = found.rankings[metric].top_per_layer(k)
                write_table(folder / f"top_{k}_per_layer_{metric}.csv", within, TOP_WEIGHTS)
        summary = found.summaries[metric].table(by_k)
        write_table(folder / f"layer_summary_{metric}.csv", summary, LAYER_SUMMARY)
        _log.info("%s: tables of the top %s written", metric, ", ".join(map(str, by_k)))
        for k in by_k if "global" in mode else ():
            bottom = found.controls.bottom(metric, k)
            write_table(folder / f"bottom_{k}_weights_{metric}.csv", bottom, TOP_WEIGHTS)
    for k in next(iter(tops.values())) if "global" in mode else ():
        random = found.controls.random(k, found.rankings.values())
        if len(random) < k:
            _log.warning("only %d weights lie outside of every top-K for random_%d_weights.csv", len(random), k)
        if len(random):
            write_table(folder / f"random_{k}_weights.csv", random, TOP_WEIGHTS)
    write_table(folder / "sampled_weights.csv", found.sampled, SAMPLED_WEIGHTS)


def write_plots(found: Discovery, tops: Tops, folder: Path) -> None:
    """Where the top-K lie, and how their scores fall off."""
    folder.mkdir(exist_ok=True)
    for metric, by_k in tops.items():
        summary = found.summaries[metric].table(by_k)
        for k in by_k:
            plots.plot_heat_map(summary, k, metric, folder / f"top_{k}_by_layer_{metric}.png")
    plots.plot_scores_by_rank({metric: by_k[max(by_k)] for metric, by_k in tops.items()}, folder / "score_by_rank.png")


def write_stability(table: pd.DataFrame, folder: Path, with_plot: bool) -> None:
    """The rows of STABILITY as a file, in words, and as a plot."""
    write_table(folder / "stability.csv", table, STABILITY)
    for (metric, k), rows in table[table["kind"] == "halves"].groupby(["metric", "k"], sort=False):
        words = metric, k, rows["jaccard"].mean(), rows["jaccard_chance"].iloc[0]
        _log.info("stability: %s, top %d: mean Jaccard overlap of two halves %.3f (chance %.2g)", *words)
    if with_plot:
        (folder / "plots").mkdir(exist_ok=True)
        plots.plot_stability(table, folder / "plots" / "stability.png")


def show(folder: Path, tops: Tops) -> None:
    """The first of each ranking, and where the files are."""
    for metric, by_k in tops.items():
        for k, top in by_k.items():
            rows = top.head(_ROWS_SHOWN).drop(columns="layer").to_string(index=False)
            say("", f"Top {k} by {metric}, the first {min(k, _ROWS_SHOWN)}:", *rows.split("\n"))
    say("", f"written to {folder}")
