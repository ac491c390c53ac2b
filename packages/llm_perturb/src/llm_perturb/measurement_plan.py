"""Which conditions a request means, in order, and the weights of each."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from bridge.exchange.errors import RequestError
from torch.nn import Parameter
from transformers import PreTrainedModel

from llm_perturb.batched_single_weights import Copies, Unit
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.parameters import layer_of
from llm_perturb.measurement import Condition
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Ranked, Target, draw, draw_matched, highest, lowest
from llm_perturb.target_scores import target_scores
from llm_perturb.weights_csv import WeightList, csv_label

_WEIGHTS_AT_ONCE = 2**27  # whose sums of gradients are held at the same time


@dataclass(frozen=True)
class Plan:
    """Targets, where their top weights come from, and what is done to them.

    Attributes:
        targets: of which sets are selected.
        lists: CSVs of weights that ``top`` goes by; without any, it goes by the metrics.
        ks: sizes of the sets.
        selections: ``top``, ``random``, ``bottom``, ``matched``.
        metrics: the scores computed here.
        perturbations: what is done to every set.
        seeds: of everything that is drawn.
        fixed: further conditions, whose weights are known: single weights, rows, columns.
    """

    targets: list[Target]
    lists: list[WeightList]
    ks: list[int]
    selections: list[str]
    metrics: list[str]
    perturbations: list[Perturbation]
    seeds: list[int]
    fixed: list[Condition] = field(default_factory=list)

    def labels(self) -> list[str]:
        """The selections as the table names them: ``top_<metric or CSV>``, ``random``, ``bottom_<metric>``."""
        top = [csv_label(weight_list.path) for weight_list in self.lists] or self.metrics
        names = {kind: [f"{kind}_{name}" for name in top] for kind in ("top", "matched")}
        names |= {"random": ["random"], "bottom": [f"bottom_{metric}" for metric in self.metrics]}
        return [label for selection in dict.fromkeys(self.selections) for label in dict.fromkeys(names[selection])]

    def shells(self) -> list[Condition]:
        """All conditions in the order of the table; those that select a set of a target have no weights yet."""
        nothing = torch.empty(0, dtype=torch.int64)
        sets = [
            Condition(target, label, perturbation, k, seed, nothing)
            for target in self.targets
            for label in self.labels()
            for perturbation in self.perturbations
            for k in self.ks
            for seed in seeds_of(label, perturbation, self.seeds)
        ]
        return list({condition.key: condition for condition in [*sets, *self.fixed]}.values())  # each once

    def check(self) -> None:
        """Refuse what could only fail after hours.

        Raises:
            RequestError: two lists of one name, a target that has no such list's weight or too few weights.
        """
        labels = [csv_label(weight_list.path) for weight_list in self.lists]
        for label in labels:
            if labels.count(label) > 1:
                raise RequestError(f"--weights-csv has two files of {label}; their rows could not be told apart")
        n_sets = len(labels or self.metrics) + bool({"random", "matched"} & set(self.selections))
        for target in self.targets:
            if max(self.ks) * n_sets > target.n_weights:
                raise RequestError(
                    f"--k {max(self.ks)} is too many for {target.layer}: {n_sets} sets (tops, and a control outside of "
                    f"them) may need {max(self.ks) * n_sets} weights, and it has {target.n_weights}"
                )
            for weight_list in self.lists:
                weight_list.within(target, 1)


def seeds_of(label: str, perturbation: Perturbation, seeds: list[int]) -> Sequence[int | None]:
    """The seeds where something is drawn, else one None."""
    drawn = label.startswith(("random", "matched")) or perturbation.kind == "gaussian_noise"
    return seeds if drawn else [None]


def single_weights(
    weights: WeightList, named: dict[str, Parameter], perturbations: list[Perturbation], seeds: list[int]
) -> list[Condition]:
    """One condition for each weight of a list, perturbed alone."""
    conditions = []
    for name, index, score in zip(weights.names, weights.indices, weights.scores, strict=True):
        target = Target(layer_of(name), {name: named[name]})
        row, col = divmod(int(index), named[name][0].numel()) if named[name].ndim > 1 else (int(index), None)
        position = torch.tensor([index])
        conditions += [
            Condition(target, "weight", perturbation, 1, seed, position, float(score), row, col)
            for perturbation in perturbations
            for seed in seeds_of("weight", perturbation, seeds)
        ]
    return conditions


def lines(
    target: Target, axis: int, indices: list[int], perturbations: list[Perturbation], seeds: list[int]
) -> list[Condition]:
    """Whole rows (axis 0) or columns (axis 1) of a matrix as stored, and a random other one for each seed.

    Raises:
        RequestError: the target is not one matrix, or a line is out of range.
    """
    label, shape = ("row", "col")[axis], [tuple(p.shape) for p in target.parameters.values()]
    if len(shape) != 1 or len(shape[0]) != 2:
        raise RequestError(f"--{label}s needs a TARGET_LAYER that is one matrix, and '{target.layer}' is not")
    n_lines, n_columns = shape[0][axis], shape[0][1]
    for index in indices:
        if not 0 <= index < n_lines:
            raise RequestError(f"--{label}s {index} is out of range: {target.layer} has {n_lines} {label}s, from 0")
    if len(set(indices)) >= n_lines:
        raise RequestError(f"--{label}s leaves no other {label} of {target.layer} for the random control")
    conditions = []
    every = torch.arange(shape[0][0] * n_columns).view(shape[0])
    for perturbation in perturbations:
        chosen = [(label, index, seed) for index in indices for seed in seeds_of(label, perturbation, seeds)]
        for seed in seeds:
            other = draw(n_lines, 1, torch.tensor(sorted(set(indices))), [seed, f"random {label}", target.layer])
            chosen.append((f"random_{label}", int(other), seed))
        for selection, index, seed in chosen:
            positions = every.select(axis, index).clone()
            place = {label: index}
            conditions.append(Condition(target, selection, perturbation, len(positions), seed, positions, **place))
    return conditions


def share(units: list[Unit], rank: int, world: int) -> list[Unit]:
    """The part of one process: whole targets if there are enough of them, else single conditions."""
    places = [unit.conditions[0].key if isinstance(unit, Copies) else unit.target.layer for unit in units]
    number = {place: at for at, place in enumerate(dict.fromkeys(places))}
    by_target = len(number) >= 2 * world
    return [u for at, u in enumerate(units) if (number[places[at]] if by_target else at) % world == rank]


def choose_weights(plan: Plan, units: list[Unit], model: PreTrainedModel, corpus: Corpus) -> list[Unit]:
    """The units with the weights of every condition."""
    empty = [unit for unit in units if isinstance(unit, Condition) and not len(unit.positions)]
    filled = [unit for unit in units if not (isinstance(unit, Condition) and not len(unit.positions))]
    for targets in _groups({shell.target.layer: shell.target for shell in empty}.values()):
        ranked = _rankings(plan, targets, model, corpus)
        filled += [_filled(shell, ranked[shell.target.layer]) for shell in empty if shell.target.layer in ranked]
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
    """The condition with its weights; what is drawn avoids the top sets of this size."""
    if shell.selection in ranked:
        chosen = ranked[shell.selection].first(shell.k)
        return replace(shell, positions=chosen.positions, score_sum=float(chosen.scores.sum()))
    top = {label: ranking.first(shell.k).positions for label, ranking in ranked.items() if label.startswith("top_")}
    excluded, n_drawn = torch.cat(list(top.values())).unique(), min(map(len, top.values()))
    kind, _, of = shell.selection.partition("_")
    key = [shell.seed, f"{kind} control", of, shell.target.layer, shell.k]
    if kind == "matched":
        magnitudes = torch.cat([p.detach().float().abs().reshape(-1) for p in shell.target.parameters.values()])
        return replace(shell, positions=draw_matched(magnitudes, top[f"top_{of}"], excluded, key))
    return replace(shell, positions=draw(shell.target.n_weights, n_drawn, excluded, key))
