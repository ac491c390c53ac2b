"""Discoveries of several models side by side: where their critical weights sit and how concentrated the score is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from bridge.analysis.concentration import SampledScores, gini, top_score_share
from bridge.analysis.profiles import (
    profile_correlation,
    profile_cosine,
    profile_margins,
    score_profiles,
    top_weight_profiles,
)
from bridge.analysis.robustness import ablation_ratios, ratios_at_equal_fraction, zeroed_top_sets
from bridge.exchange import layout


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One model of a comparison, with the tables of its discovery and, where there is one, of its validation.

    Attributes:
        name: what the model is called in the comparison; names differ.
        model: metadata of the model in the discovery's manifest.
        corpus: metadata of the corpus there.
        summaries: metric to table LAYER_SUMMARY.
        top_weights: metric to table TOP_WEIGHTS, the global top-K.
        sampled: table SAMPLED_WEIGHTS, where there is one.
        measurements: table MEASUREMENTS of a validation of this discovery, where there is one.
    """

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    corpus: Mapping[str, Any] = field(default_factory=dict)
    summaries: Mapping[str, pd.DataFrame]
    top_weights: Mapping[str, pd.DataFrame]
    sampled: pd.DataFrame | None = None
    measurements: pd.DataFrame | None = None

    def n_weights(self, metric: str) -> int:
        """How many weights were scored."""
        return int(self.summaries[metric]["n_weights"].sum())

    def first_weights(self, metric: str, k: int) -> pd.DataFrame:
        """The K highest-ranked weights; the first rows of an exact top-K are an exact top-K."""
        return self.top_weights[metric].sort_values("rank").head(k)


@dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """Models compared by one or more metrics.

    Attributes:
        models: one row per metric and model; columns as ``compare_models`` says.
        pairs: one row per metric and pair of models: metric, first, second, top_k_cosine (of the top-K shares by
            component and depth), score_spearman (of the shares of all score, over the n_cells that both have).
        profiles: metric to model to the share of the top-K in each component (rows) and depth bin (columns).
    """

    models: pd.DataFrame
    pairs: pd.DataFrame
    profiles: dict[str, dict[str, pd.DataFrame]]


def compare_models(models: Sequence[ComparedModel], metrics: Sequence[str] | None = None) -> ModelComparison:
    """Compare the global top-K of several models.

    Every ranking is cut to the smallest K among the models.

    Columns of ``models``: metric, model (its name), model_id, dtype, n_parameters, corpus, n_tokens,
    n_weights (scored), k, top_k_score_share (score of the top-K over the score of all weights), gini_layers
    (inequality of the layers' score sums: 0 all equal, towards 1 all in one layer), largest_layer_share,
    top_fraction_score_share (of the highest 0.01 %; see ``concentration.top_score_share``), a
    ``share <component>`` and a ``share <depth>`` of the top-K for each, and from a validation the perplexity
    ratio when the global top-K was zeroed: ablation_k, ppl_ratio, ppl_ratio_low, ppl_ratio_high (95 %
    interval), random_ppl_ratio (largest draw) and random_unbounded_share (draws without a finite loss); where several
    models have one, equal_fraction and ppl_ratio_at_equal_fraction (see ``robustness.ratios_at_equal_fraction``).

    Args:
        models: two or more.
        metrics: which metrics; by default those that every model has, in the order of the first.
    """
    if metrics is None:
        metrics = [metric for metric in models[0].top_weights if all(metric in m.top_weights for m in models)]
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    profiles = {}
    for metric in metrics:
        k = min(len(model.top_weights[metric]) for model in models)
        summaries = [model.summaries[metric] for model in models]
        top_weights = [model.first_weights(metric, k) for model in models]
        top_profiles = top_weight_profiles(top_weights, summaries, [model.model for model in models])
        profiles[metric] = {model.name: profile for model, profile in zip(models, top_profiles, strict=True)}
        at_equal_fraction = _at_equal_fraction(models, metric)
        for model in models:
            row: dict[str, Any] = {"metric": metric, "model": model.name}
            row |= _description(model)
            row |= _concentration(model, metric, k)
            row |= profile_margins(profiles[metric][model.name])
            row |= _robustness(model, metric)
            row |= at_equal_fraction.get(model.name, {})
            rows.append(row)
        all_score = {model.name: profile for model, profile in zip(models, score_profiles(summaries), strict=True)}
        for first, second in combinations(all_score, 2):
            agreement = profile_correlation(all_score[first], all_score[second])
            pair: dict[str, Any] = {"metric": metric, "first": first, "second": second}
            pair["top_k_cosine"] = profile_cosine(profiles[metric][first], profiles[metric][second])
            pair |= {"score_spearman": agreement.rho, "n_cells": agreement.n_cells}
            pairs.append(pair)
    return ModelComparison(models=pd.DataFrame(rows), pairs=pd.DataFrame(pairs), profiles=profiles)


def _description(model: ComparedModel) -> dict[str, Any]:
    """What the model and its corpus are, from the manifest."""
    return {
        "model_id": model.model.get("id", ""),
        "dtype": model.model.get("dtype", ""),
        "n_parameters": model.model.get("n_parameters"),
        "corpus": model.corpus.get("source", ""),
        "n_tokens": model.corpus.get("n_tokens"),
    }


def _concentration(model: ComparedModel, metric: str, k: int) -> dict[str, Any]:
    """How the score is spread over the model's weights and layers."""
    layer_sums = model.summaries[metric]["score_sum"].to_numpy(float)
    total = layer_sums.sum()
    n_weights = model.n_weights(metric)
    top_weights = model.first_weights(metric, k)
    has_score = total > 0
    return {
        "n_weights": n_weights,
        "k": len(top_weights),
        "top_k_score_share": top_weights["score"].sum() / total if has_score else np.nan,
        "gini_layers": gini(layer_sums),
        "largest_layer_share": layer_sums.max() / total if has_score else np.nan,
        "top_fraction_score_share": top_score_share(
            model.top_weights[metric]["score"].to_numpy(float), total, n_weights, _sampled_scores(model, metric)
        ),
    }


def _sampled_scores(model: ComparedModel, metric: str) -> SampledScores | None:
    """The scores of the sampled weights, where the table has them and their ranks."""
    share = layout.share_column(metric)
    if model.sampled is None or share not in model.sampled:
        return None
    return SampledScores(
        scores=model.sampled[layout.score_column(metric)].to_numpy(float),
        shares=model.sampled[share].to_numpy(float),
    )


def _robustness(model: ComparedModel, metric: str) -> dict[str, float]:
    """What zeroing the global top-K did, where it was measured."""
    ratios = None if model.measurements is None else ablation_ratios(model.measurements, metric)
    return {} if ratios is None else ratios._asdict()


def _at_equal_fraction(models: Sequence[ComparedModel], metric: str) -> dict[str, dict[str, float]]:
    """By model, the perplexity ratio at the fraction that all could be compared at; empty for fewer than two models."""
    curves = {}
    for model in models:
        if model.measurements is not None:
            curves[model.name] = zeroed_top_sets(model.measurements, metric)
    curves = {name: curve for name, curve in curves.items() if len(curve)}
    if len(curves) < 2:
        return {}
    n_weights = {model.name: model.n_weights(metric) for model in models}
    fraction, ratios = ratios_at_equal_fraction(curves, n_weights)
    return {name: {"equal_fraction": fraction, "ppl_ratio_at_equal_fraction": ratio} for name, ratio in ratios.items()}
