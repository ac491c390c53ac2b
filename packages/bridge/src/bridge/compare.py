"""The command ``bridge compare``: discovery runs of several models, read from their folders and compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bridge.analysis.model_comparison import ComparedModel, ModelComparison, compare_models
from bridge.exchange import layout
from bridge.exchange.atomic_file import atomic_path
from bridge.exchange.discovery_run import Discovery, open_discovery, read_sampled
from bridge.exchange.errors import RequestError
from bridge.exchange.existing_runs import find_runs, read_manifest
from bridge.exchange.printable import say
from bridge.exchange.run_folder import open_run
from bridge.exchange.tables import MEASUREMENTS, read_table
from bridge.report.placement_figures import compared_profiles

_PRINTED = ["metric", "model", "k", "baseline_ppl", "top_k_score_share", "top_fraction_score_share"]
_PRINTED += ["gini_layers", "ppl_ratio", "equal_fraction", "ppl_ratio_at_equal_fraction"]


def compare_folders(
    folders: Sequence[Path], metric: str | None, output: Path, experiment_id: str | None = None
) -> Path:
    """Compare the newest complete discovery run of each model in each folder; print the outcome.

    Writes the run folder comparison_<id> with comparison.csv (one row per metric and model), comparison_pairs.csv,
    plots/comparison_<metric>.png and a manifest.

    Args:
        folders: where the runs are.
        metric: the sensitivity metric; by default all that the runs share.
        output: an existing folder.
        experiment_id: the id of the run folder; by default the time.

    Raises:
        RequestError: a folder without a complete run, fewer than two different runs, no common metric.
    """
    discoveries = _named(_newest_of_each_model(folders))
    if len(discoveries) < 2:
        raise RequestError(
            f"a comparison takes at least two discovery runs, --from names {len(discoveries)}; add another folder"
        )
    metrics = _common_metrics(list(discoveries.values()), metric)
    validations = _validations(discoveries)
    # Tables of the discoveries and their baselines are read, and refused if damaged, before the run is opened.
    models = [_read_model(name, run, metrics, validations.get(name)) for name, run in discoveries.items()]
    baselines = {name: run.baseline["ppl"] for name, run in discoveries.items()}
    opened = open_run(output, layout.COMPARISON, _identity(discoveries, metrics, validations), experiment_id)
    with opened.recorded():
        if len({run.corpus.get("text_sha256") for run in discoveries.values()}) > 1:
            opened.warn("the runs were made on different texts; their differences are not the models' alone")
        comparison = compare_models(models, metrics)
        table = comparison.models
        table.insert(2, "run", table["model"].map({name: str(run.folder) for name, run in discoveries.items()}))
        table.insert(3, "baseline_ppl", table["model"].map(baselines))
        _write(comparison, opened.folder)
        _print(comparison, opened.folder)
    return opened.folder


def _newest_of_each_model(folders: Sequence[Path]) -> list[Discovery]:
    """Of each folder the newest complete run of each model, each run once."""
    runs: dict[Path, Discovery] = {}
    for folder in folders:
        newest = {}
        for path in find_runs(Path(folder), layout.DISCOVERY):  # oldest first
            run = open_discovery(path)
            newest[run.model["id"], run.model.get("revision")] = run
        runs |= {run.folder.resolve(): run for run in newest.values()}
    return list(runs.values())


def _named(runs: Sequence[Discovery]) -> dict[str, Discovery]:
    """The runs by the last part of their model's id, with the run's folder where several have the same."""
    names = [run.model["id"].rstrip("/").rpartition("/")[2] for run in runs]
    named = {}
    for name, run in zip(names, runs, strict=True):
        is_unique = names.count(name) == 1
        named[name if is_unique else f"{name} ({run.folder.parent.name}/{run.folder.name})"] = run
    return named


def _common_metrics(runs: Sequence[Discovery], metric: str | None) -> list[str]:
    """The metric asked for, or all metrics that the runs share."""
    if metric:
        for run in runs:
            run.metrics([metric])  # refuses a metric that the run does not have
        return [metric]
    common = [name for name in runs[0].metrics() if all(name in run.metrics() for run in runs)]
    if not common:
        each = "; ".join(f"{run.folder.name}: {', '.join(run.metrics())}" for run in runs)
        raise RequestError(f"the runs share no metric ({each}); run one of the discoveries again with another --metric")
    return common


def _validations(discoveries: dict[str, Discovery]) -> dict[str, Path]:
    """The newest complete validation of each discovery that lies beside it, where there is one."""
    validations = {}
    for name, run in discoveries.items():
        discovery_folder = run.folder.resolve()
        try:
            candidates = find_runs(discovery_folder.parent, layout.VALIDATION)  # oldest first
        except RequestError:
            continue
        for folder in candidates:
            if Path(str(read_manifest(folder).get("discovery_folder") or "")).name == discovery_folder.name:
                validations[name] = folder
    return validations


def _read_model(name: str, run: Discovery, metrics: Sequence[str], validation: Path | None) -> ComparedModel:
    """The tables of a discovery and, where there is one, the measurements of its validation."""
    sampled_path = run.folder / layout.SAMPLED_WEIGHTS_FILE
    return ComparedModel(
        name=name,
        model=run.model,
        corpus=run.corpus,
        summaries={metric: run.summary(metric) for metric in metrics},
        top_weights={metric: run.top_weights(metric, run.ks(metric)[-1]) for metric in metrics},
        sampled=read_sampled(sampled_path, metrics) if sampled_path.exists() else None,
        measurements=read_table(validation / layout.MEASUREMENTS_FILE, MEASUREMENTS) if validation else None,
    )


def _identity(
    discoveries: dict[str, Discovery], metrics: list[str], validations: dict[str, Path]
) -> dict[str, dict[str, Any]]:
    """All that the tables depend on: which runs, each with its model, corpus and options."""
    runs = {}
    for name, run in discoveries.items():
        runs[name] = {"folder": str(run.folder.resolve())} | run.manifest["identity"]
    return {
        "options": {"metrics": metrics},
        "runs": runs,
        "validations": {name: str(folder.resolve()) for name, folder in validations.items()},
    }


def _write(comparison: ModelComparison, folder: Path) -> None:
    _write_csv(comparison.models, folder / layout.COMPARED_MODELS_FILE)
    _write_csv(comparison.pairs, folder / layout.COMPARED_PAIRS_FILE)
    plots = folder / layout.PLOTS_FOLDER
    plots.mkdir(exist_ok=True)
    for metric, profiles in comparison.profiles.items():
        compared_profiles(profiles, metric, plots / layout.comparison_plot(metric))


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


def _print(comparison: ModelComparison, folder: Path) -> None:
    models = comparison.models.reindex(columns=_PRINTED).dropna(axis=1, how="all")
    say(*models.to_string(index=False, na_rep="", float_format="{:.4g}".format).split("\n"))
    say(*comparison.pairs.to_string(index=False, na_rep="", float_format="{:.3f}".format).split("\n"))
    say(f"comparison: {folder / layout.COMPARED_MODELS_FILE}")
