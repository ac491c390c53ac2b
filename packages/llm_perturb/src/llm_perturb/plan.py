"""Which conditions a request means, in order, and the weights of each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from llm_perturb.corpus import Corpus
from llm_perturb.perturbation import Perturbation
from llm_perturb.scores import target_scores
from llm_perturb.selection import Ranked, Target, draw, highest, lowest
from llm_perturb.sweep import Condition
from llm_perturb.weight_list import WeightList, csv_label

_WEIGHTS_AT_ONCE = 2**27  # whose sums of gradients are held at the same time


@dataclass(frozen=True)
class Plan:
    """Targets, where their top weights come from, and what is done to them."""

    targets: list[Target]
    lists: list[WeightList]
    ks: list[int]
    selections: list[str]
    metrics: list[str]
    perturbations: list[Perturbation]
    seeds: list[int]

    def labels(self) -> list[str]:
        """The selections by their names in the table: ``top_<metric>`` per metric or CSV, ``random``, ``bottom_<metric>``."""
        top = [csv_label(weight_list.path) for weight_list in self.lists] or self.metrics
        names = {"top": [f"top_{name}" for name in top], "random": ["random"]}
        names["bottom"] = [f"bottom_{metric}" for metric in self.metrics]
        return [label for selection in dict.fromkeys(self.selections) for label in dict.fromkeys(names[selection])]

    def shells(self, target: Target) -> Iterator[Condition]:
        """The conditions of a target in the order of the table, their weights not chosen yet."""
        nothing = torch.empty(0, dtype=torch.int64)
        for label in self.labels():
            for perturbation in self.perturbations:
                drawn = label == "random" or perturbation.kind == "gaussian_noise"
                for k in self.ks:
                    for seed in self.seeds if drawn else [None]:
                        yield Condition(target, label, perturbation, k, seed, nothing)

    def order(self) -> list[str]:
        """The keys of all conditions, in the order of the table."""
        return [shell.key for target in self.targets for shell in self.shells(target)]


def share(plan: Plan, rank: int, world: int) -> list[Condition]:
    """The part of one process, weights not chosen yet: whole targets if there are enough, else single conditions."""
    shells = [(number, shell) for number, target in enumerate(plan.targets) for shell in plan.shells(target)]
    by_target = len(plan.targets) >= 2 * world
    return [shell for at, (number, shell) in enumerate(shells) if (number if by_target else at) % world == rank]


def choose_weights(plan: Plan, shells: list[Condition], model: PreTrainedModel, corpus: Corpus) -> list[Condition]:
    """The conditions with their weights."""
    filled = []
    for targets in _groups({shell.target.layer: shell.target for shell in shells}.values()):
        ranked = _rankings(plan, targets, model, corpus)
        filled += [_filled(shell, ranked[shell.target.layer]) for shell in shells if shell.target.layer in ranked]
    return filled


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
    most = max(plan.ks)
    found: dict[str, dict[str, Ranked]] = {target.layer: {} for target in targets}
    for weight_list in plan.lists:
        for target in targets:
            found[target.layer][f"top_{csv_label(weight_list.path)}"] = weight_list.within(target, most)
    computed = {"bottom": "bottom" in plan.selections, "top": not plan.lists}
    if any(computed.values()):
        parameters = {name: p for target in targets for name, p in target.parameters.items()}
        scores = target_scores(model, corpus, parameters, plan.metrics)
        for target in targets:
            for metric in plan.metrics:
                line = torch.cat([scores[metric][name].reshape(-1) for name in target.parameters])
                if computed["top"]:
                    found[target.layer][f"top_{metric}"] = highest(line, most)
                if computed["bottom"]:
                    found[target.layer][f"bottom_{metric}"] = lowest(line, most)
    return found


def _filled(shell: Condition, ranked: dict[str, Ranked]) -> Condition:
    if shell.selection != "random":
        chosen = ranked[shell.selection].first(shell.k)
        return replace(shell, positions=chosen.positions, score_sum=float(chosen.scores.sum()))
    top = [ranking.first(shell.k).positions for label, ranking in ranked.items() if label.startswith("top_")]
    sizes = [len(positions) for positions in top]
    excluded = torch.cat(top).unique()
    key = [shell.seed, "random control", shell.target.layer, shell.k]
    return replace(shell, positions=draw(shell.target.n_weights, min(sizes), excluded, key))
