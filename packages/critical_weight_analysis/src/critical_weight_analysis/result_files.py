"""The files of a discovery's run folder, and what is said at its end."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from bridge.exchange.layout import (
    PLOTS_FOLDER,
    SAMPLED_WEIGHTS_FILE,
    SCORE_BY_RANK_PLOT,
    STABILITY_FILE,
    STABILITY_PLOT,
    layer_summary_file,
    top_by_layer_plot,
    weights_file,
)
from bridge.exchange.printable import say
from bridge.exchange.tables import LAYER_SUMMARY, SAMPLED_WEIGHTS, STABILITY, TOP_WEIGHTS, write_table

from critical_weight_analysis import plots
from critical_weight_analysis.discovery import Discovery

Tops = dict[str, dict[int, pd.DataFrame]]  # metric -> K -> the global top-K

_ROWS_SHOWN = 5
_log = logging.getLogger("critical_weight_analysis")


def write_tables(discovery: Discovery, tops: Tops, mode: Sequence[str], folder: Path) -> None:
    """The rankings, with what they are to be compared with, the summaries and the sample."""
    for metric, by_k in tops.items():
        for k, top in by_k.items():
            if "global" in mode:
                write_table(folder / weights_file("top", k, "weights", metric), top, TOP_WEIGHTS)
            if "per_layer" in mode:
                within = discovery.rankings[metric].top_per_layer(k)
                write_table(folder / weights_file("top", k, "per_layer", metric), within, TOP_WEIGHTS)
        summary = discovery.summaries[metric].table(by_k)
        write_table(folder / layer_summary_file(metric), summary, LAYER_SUMMARY)
        _log.info("%s: tables of the top %s written", metric, ", ".join(map(str, by_k)))
        for k in by_k if "global" in mode else ():
            bottom = discovery.controls.bottom(metric, k)
            write_table(folder / weights_file("bottom", k, "weights", metric), bottom, TOP_WEIGHTS)
    for k in next(iter(tops.values())) if "global" in mode else ():
        random = discovery.controls.random(k, discovery.rankings.values())
        path = folder / weights_file("random", k, "weights")
        if len(random) < k:
            _log.warning("only %d weights lie outside of every top-K for %s", len(random), path.name)
        if len(random):
            write_table(path, random, TOP_WEIGHTS)
    write_table(folder / SAMPLED_WEIGHTS_FILE, discovery.sampled, SAMPLED_WEIGHTS)


@contextmanager
def _optional(what: str) -> Iterator[None]:
    """In the block a file is written that nothing depends on: where that is impossible, it is given up."""
    try:
        yield
    except OSError as error:
        _log.warning("%s cannot be written: %s", what, error)
        say(f"WARNING: {what} cannot be written: {error}", stream=sys.stderr)


def write_plots(discovery: Discovery, tops: Tops, folder: Path) -> None:
    """Where the top-K lie, and how their scores fall off."""
    with _optional("the plots"):
        folder.mkdir(exist_ok=True)
        for metric, by_k in tops.items():
            summary = discovery.summaries[metric].table(by_k)
            for k in by_k:
                plots.plot_heat_map(summary, k, metric, folder / top_by_layer_plot(k, metric))
        ranked = {metric: by_k[max(by_k)] for metric, by_k in tops.items()}
        plots.plot_scores_by_rank(ranked, folder / SCORE_BY_RANK_PLOT)


def write_stability(table: pd.DataFrame, folder: Path, with_plot: bool) -> None:
    """The rows of STABILITY as a file, in words, and as a plot."""
    write_table(folder / STABILITY_FILE, table, STABILITY)
    for (metric, k), rows in table[table["kind"] == "halves"].groupby(["metric", "k"], sort=False):
        words = metric, k, rows["jaccard"].mean(), rows["jaccard_null"].mean(), rows["jaccard_chance"].iloc[0]
        message = "stability: %s, top %d: mean Jaccard overlap of two halves %.3f (null %.3f, chance %.2g)"
        _log.info(message, *words)
    if with_plot:
        with _optional("the plot of stability"):
            (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
            plots.plot_stability(table, folder / PLOTS_FOLDER / STABILITY_PLOT)


def show(folder: Path, tops: Tops) -> None:
    """The first of each ranking, and where the files are."""
    for metric, by_k in tops.items():
        for k, top in by_k.items():
            rows = top.head(_ROWS_SHOWN).drop(columns="layer").to_string(index=False)
            say("", f"Top {k} by {metric}, the first {min(k, _ROWS_SHOWN)}:", *rows.split("\n"))
    say("", f"written to {folder}")
