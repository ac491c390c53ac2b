"""Discovery runs of several models side by side: where their critical weights sit and how concentrated they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from bridge.analysis.concentration import at_equal_fraction, global_curve, top_score_share
from bridge.analysis.correlation import ALL
from bridge.analysis.profiles import cosine, gini, profiles_of, rank_agreement, score_profiles, shares
from bridge.analysis.single_weights import FILE
from bridge.exchange.discovery_run import KIND, Discovery, open_discovery, read_sampled
from bridge.exchange.errors import RequestError
from bridge.exchange.printable import say
from bridge.exchange.run_folder import find_runs, open_run, read_manifest
from bridge.exchange.tables import MEASUREMENTS, atomic_path, read_table
from bridge.report.placement_figures import compared_profiles

COMPARISON = "comparison"
RunFacts = tuple[str, dict, dict[str, pd.DataFrame], dict[str, pd.DataFrame]]


@dataclass(frozen=True)
class Comparison:
    """Models compared by one or more metrics.

    Attributes:
        models: one row per metric and model; columns as ``compare`` says.
        pairs: one row per metric and pair of models: metric, first, second, top_k_cosine (of the top-K shares by
            component and depth), score_spearman (of the shares of all score, over the n_cells that both have).
        profiles: (metric, model) to the share of the top-K in each component (rows) and depth bin (columns).
    """

    models: pd.DataFrame
    pairs: pd.DataFrame
    profiles: dict[tuple[str, str], pd.DataFrame]


def compare(
    runs: list[RunFacts],
    metrics: list[str] | None = None,
    validations: dict[str, pd.DataFrame] | None = None,
    sampled: dict[str, pd.DataFrame] | None = None,
) -> Comparison:
    """Compare the global top-K of several models.

    Every ranking is cut to the smallest K among the runs: the first rows of an exact top-K are an exact top-K.

    Columns of ``models``: metric, model (the name given), model_id, dtype, n_parameters, corpus, n_tokens,
    n_weights (scored), k, top_k_score_share (score of the top-K over the score of all weights),
    top_fraction_score_share (of the highest 0.01 %; see ``concentration.top_score_share``), gini_layers
    (inequality of the layers' score sums: 0 all equal, towards 1 all in one layer), largest_layer_share, a
    ``share <component>`` and a ``share <depth>`` of the top-K for each, and from a validation the perplexity
    ratio when the global top-K was zeroed: ablation_k, ppl_ratio, ppl_ratio_low, ppl_ratio_high (95 %
    interval), random_ppl_ratio (largest draw); where several models have one, equal_fraction and
    ppl_ratio_at_equal_fraction (see ``concentration.at_equal_fraction``).

    Args:
        runs: (name, discovery manifest, metric to LAYER_SUMMARY table, metric to TOP_WEIGHTS table); names differ.
        metrics: which metrics; by default those that every run has, in the order of the first.
        validations: name to the MEASUREMENTS table of a validation of that run, where there is one.
        sampled: name to the SAMPLED_WEIGHTS table of that run, where there is one.
    """
    metrics = metrics or [m for m in runs[0][3] if all(m in tops and m in sums for _, _, sums, tops in runs)]
    rows, pairs, profiles = [], [], {}
    for metric in metrics:
        k = min(len(tops[metric]) for _, _, _, tops in runs)
        top = {name: tops[metric].sort_values("rank").head(k) for name, _, _, tops in runs}
        facts = [(manifest.get("identity") or {}).get("model") or {} for _, manifest, _, _ in runs]
        found = profiles_of(list(top.values()), [sums[metric] for _, _, sums, _ in runs], facts)
        profiles |= {(metric, name): profile for name, profile in zip(top, found, strict=True)}
        curves = {name: global_curve(table, metric) for name, table in (validations or {}).items()}
        curves = {name: curve for name, curve in curves.items() if len(curve)}
        sizes = {name: int(sums[metric]["n_weights"].sum()) for name, _, sums, _ in runs}
        fraction, ratios = at_equal_fraction(curves, sizes) if len(curves) > 1 else (np.nan, {})
        for name, manifest, sums, tops in runs:
            total = sums[metric]["score_sum"].sum()
            measured = (validations or {}).get(name)
            rows.append(
                {"metric": metric, "model": name, **_identity(manifest), **_concentration(top[name], sums[metric])}
                | {
                    "top_fraction_score_share": top_score_share(
                        tops[metric], (sampled or {}).get(name), metric, total, sizes[name]
                    )
                }
                | shares(profiles[metric, name])
                | ({} if measured is None else robustness(measured, metric))
                | ({"equal_fraction": fraction, "ppl_ratio_at_equal_fraction": ratios[name]} if name in ratios else {})
            )
        scores = dict(zip(top, score_profiles([sums[metric] for _, _, sums, _ in runs]), strict=True))
        for one, two in combinations(top, 2):
            rho, n_cells = rank_agreement(scores[one], scores[two])
            alike = cosine(profiles[metric, one], profiles[metric, two])
            pair = {"metric": metric, "first": one, "second": two}
            pairs.append(pair | {"top_k_cosine": alike, "score_spearman": rho, "n_cells": n_cells})
    return Comparison(pd.DataFrame(rows), pd.DataFrame(pairs), profiles)


def _identity(manifest: dict) -> dict:
    identity = manifest.get("identity") or {}
    model, corpus = identity.get("model") or {}, identity.get("corpus") or {}
    return {
        "model_id": model.get("id", ""),
        "dtype": model.get("dtype", ""),
        "n_parameters": model.get("n_parameters"),
        "corpus": corpus.get("source", ""),
        "n_tokens": corpus.get("n_tokens"),
    }


def _concentration(top: pd.DataFrame, summary: pd.DataFrame) -> dict:
    sums = summary["score_sum"].to_numpy(float)
    total = sums.sum()
    return {
        "n_weights": int(summary["n_weights"].sum()),
        "k": len(top),
        "top_k_score_share": top["score"].sum() / total if total > 0 else np.nan,
        "gini_layers": gini(sums),
        "largest_layer_share": sums.max() / total if total > 0 else np.nan,
    }


def robustness(measurements: pd.DataFrame, metric: str) -> dict:
    """Perplexity after over before, when the global top-K of a metric was perturbed; empty if it was not."""
    rows = measurements[(measurements["target_layer"] == ALL) & (measurements["perturbation"] == "zero")]
    top = rows[rows["selection"] == f"top_{metric}"].sort_values("k")
    if top.empty:
        return {}
    row = top.iloc[-1]
    random = rows[(rows["selection"] == "random") & (rows["k"] == row["k"])]["delta_nll"]
    with np.errstate(over="ignore"):
        return {
            "ablation_k": int(row["k"]),
            "ppl_ratio": float(np.exp(row["delta_nll"])),
            "ppl_ratio_low": float(np.exp(row["ci_low"])),
            "ppl_ratio_high": float(np.exp(row["ci_high"])),
            "random_ppl_ratio": float(np.exp(random.max())) if len(random) else np.nan,
        }


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
    found = _newest(folders)
    if len(found) < 2:
        raise RequestError(
            f"a comparison takes at least two discovery runs, --from names {len(found)}; add another folder"
        )
    metrics = _common_metrics(list(found.values()), metric)
    runs = [
        (
            name,
            run.manifest,
            {m: run.summary(m) for m in metrics},
            {m: run.top_weights(m, run.ks(m)[-1]) for m in metrics},
        )
        for name, run in found.items()
    ]
    baselines = {name: run.baseline["ppl"] for name, run in found.items()}  # a damaged one is refused before the run
    validations = {name: each for name, run in found.items() if (each := _validation_of(run)) is not None}
    opened = open_run(output, COMPARISON, _identity_of(found, metrics, validations), experiment_id)
    with opened.recorded():
        if len({run.corpus.get("text_sha256") for run in found.values()}) > 1:
            opened.warn("the runs were made on different texts; their differences are not the models' alone")
        measured = {name: read_table(each / "measurements.csv", MEASUREMENTS) for name, each in validations.items()}
        files = {name: run.folder / FILE for name, run in found.items()}
        sampled = {name: read_sampled(path, metrics) for name, path in files.items() if path.exists()}
        comparison = compare(runs, metrics, measured, sampled)
        models = comparison.models
        models.insert(2, "run", models["model"].map({name: str(run.folder) for name, run in found.items()}))
        models.insert(3, "baseline_ppl", models["model"].map(baselines))
        _write(comparison, models, opened.folder)
        _print(comparison, opened.folder)
    return opened.folder


def _identity_of(found: dict[str, Discovery], metrics: list[str], validations: dict[str, Path]) -> dict:
    """All that the tables depend on: which runs, each with its model, corpus and options."""
    runs = {name: {"folder": str(run.folder.resolve())} | run.manifest["identity"] for name, run in found.items()}
    places = {name: str(folder.resolve()) for name, folder in validations.items()}
    return {"options": {"metrics": metrics}, "runs": runs, "validations": places}


def _write(comparison: Comparison, models: pd.DataFrame, folder: Path) -> None:
    for name, table in [("comparison.csv", models), ("comparison_pairs.csv", comparison.pairs)]:
        with atomic_path(folder / name) as temporary:
            table.to_csv(temporary, index=False)
    (folder / "plots").mkdir(exist_ok=True)
    for metric in dict.fromkeys(metric for metric, _ in comparison.profiles):
        shown = {name: profile for (of, name), profile in comparison.profiles.items() if of == metric}
        compared_profiles(shown, metric, folder / "plots" / f"comparison_{metric}.png")


def _newest(folders: Sequence[Path]) -> dict[str, Discovery]:
    """Name to run: of each folder the newest complete run of each model, each run once."""
    runs: dict[Path, Discovery] = {}
    for folder in folders:
        complete = [open_discovery(path) for path in find_runs(Path(folder), KIND)]
        by_model = {(run.model["id"], run.model.get("revision")): run for run in complete}
        runs |= {run.folder.resolve(): run for run in by_model.values()}
    names = [run.model["id"].rstrip("/").rpartition("/")[2] for run in runs.values()]
    return {
        name if names.count(name) == 1 else f"{name} ({run.folder.parent.name}/{run.folder.name})": run
        for name, run in zip(names, runs.values(), strict=True)
    }


def _common_metrics(runs: list[Discovery], metric: str | None) -> list[str]:
    if metric:
        return [run.metrics([metric])[0] for run in runs][:1]
    common = [name for name in runs[0].metrics() if all(name in run.metrics() for run in runs)]
    if not common:
        each = "; ".join(f"{run.folder.name}: {', '.join(run.metrics())}" for run in runs)
        raise RequestError(f"the runs share no metric ({each}); run one of the discoveries again with another --metric")
    return common


def _validation_of(run: Discovery) -> Path | None:
    """The newest complete validation of a run that lies beside it, if there is one."""
    try:
        candidates = find_runs(run.folder.resolve().parent, "validation")
    except RequestError:
        return None
    for folder in reversed(candidates):
        if Path(read_manifest(folder).get("discovery_folder") or "").name == run.folder.resolve().name:
            return folder
    return None


def _print(comparison: Comparison, folder: Path) -> None:
    columns = ["metric", "model", "k", "baseline_ppl", "top_k_score_share", "top_fraction_score_share"]
    columns += ["gini_layers", "ppl_ratio", "equal_fraction", "ppl_ratio_at_equal_fraction"]
    shown = comparison.models.reindex(columns=columns).dropna(axis=1, how="all")
    say(*shown.to_string(index=False, na_rep="", float_format="{:.4g}".format).split("\n"))
    say(*comparison.pairs.to_string(index=False, na_rep="", float_format="{:.3f}".format).split("\n"))
    say(f"comparison: {folder / 'comparison.csv'}")
