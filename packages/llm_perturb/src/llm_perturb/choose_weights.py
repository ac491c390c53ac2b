"""The weights of each condition: highest and lowest scores, lists from files, random draws."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from bridge.exchange import layout
from torch import Tensor
from transformers import PreTrainedModel

from llm_perturb.batched_single_weights import Unit
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.measurement_condition import Condition
from llm_perturb.measurement_plan import Plan
from llm_perturb.selection import Ranked, Target, draw, draw_matched, highest, lowest
from llm_perturb.target_scores import target_scores
from llm_perturb.weights_csv import csv_label

_WEIGHTS_AT_ONCE = 2**27  # whose sums of gradients are held at the same time


def choose_weights(plan: Plan, units: Sequence[Unit], model: PreTrainedModel, corpus: Corpus) -> list[Unit]:
    """The units with the weights of every condition; those whose weights the plan knows come first.

    Args:
        plan: the request.
        units: some of its conditions, in any order.
        model: in eval mode, unperturbed.
        corpus: the sequences that scores are computed on.
    """
    complete: list[Unit] = []
    without_weights: list[Condition] = []
    for unit in units:
        if isinstance(unit, Condition) and len(unit.positions) == 0:
            without_weights.append(unit)
        else:
            complete.append(unit)
    targets = {condition.target.layer: condition.target for condition in without_weights}
    for group in _groups(targets.values()):
        rankings = _rankings(plan, group, model, corpus)
        for condition in without_weights:
            if condition.target.layer in rankings:
                complete.append(_with_weights(condition, rankings[condition.target.layer]))
    return complete


def _groups(targets: Iterable[Target]) -> Iterator[list[Target]]:
    """Targets whose gradients are taken in one pass over the corpus."""
    group: list[Target] = []
    for target in targets:
        if group and sum(t.n_weights for t in [*group, target]) > _WEIGHTS_AT_ONCE:
            yield group
            group = []
        group.append(target)
    if group:
        yield group


def _rankings(
    plan: Plan, targets: list[Target], model: PreTrainedModel, corpus: Corpus
) -> dict[str, dict[str, Ranked]]:
    """For each target, by selection label, the weights in order, as many as the largest k."""
    k = max(plan.ks)
    rankings: dict[str, dict[str, Ranked]] = {target.layer: {} for target in targets}
    for weight_list in plan.lists:
        label = layout.top_label(csv_label(weight_list.path))
        for target in targets:
            rankings[target.layer][label] = weight_list.within(target, k)
    with_top, with_bottom = not plan.lists, "bottom" in plan.selections
    if not with_top and not with_bottom:
        return rankings
    parameters = {name: parameter for target in targets for name, parameter in target.parameters.items()}
    scores = target_scores(model, corpus, parameters, plan.metrics)
    for target in targets:
        for metric in plan.metrics:
            line = torch.cat([scores[metric][name].reshape(-1) for name in target.parameters])  # (n_weights,)
            if with_top:
                rankings[target.layer][layout.top_label(metric)] = highest(line, k)
            if with_bottom:
                rankings[target.layer][layout.bottom_label(metric)] = lowest(line, k)
    return rankings


def _with_weights(condition: Condition, rankings: dict[str, Ranked]) -> Condition:
    """The condition with its weights; what is drawn avoids the top sets of this size."""
    if condition.selection in rankings:
        chosen = rankings[condition.selection].first(condition.k)
        return replace(condition, positions=chosen.positions, score_sum=float(chosen.scores.sum()))
    target = condition.target
    tops: dict[str, Tensor] = {
        label: ranking.first(condition.k).positions for label, ranking in rankings.items() if layout.is_top(label)
    }
    excluded = torch.cat(list(tops.values())).unique()
    n_drawn = min(len(positions) for positions in tops.values())
    kind, _, metric = condition.selection.partition("_")
    key = [condition.seed, f"{kind} control", metric, target.layer, condition.k]
    if layout.is_matched(condition.selection):
        magnitudes = torch.cat([p.detach().float().abs().reshape(-1) for p in target.parameters.values()])
        positions = draw_matched(magnitudes, tops[layout.top_label(metric)], excluded, key)
    else:
        positions = draw(target.n_weights, n_drawn, excluded, key)
    return replace(condition, positions=positions)
