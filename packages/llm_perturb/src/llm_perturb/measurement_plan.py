"""Which conditions a request means, in the order of the table."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from bridge.exchange import layout
from bridge.exchange.errors import RequestError
from torch.nn import Parameter
from transformers import PreTrainedModel

from llm_perturb.batched_single_weights import Copies, Unit
from llm_perturb.evaluation.decoder_head import is_plain
from llm_perturb.evaluation.parameters import layer_of, match, named_parameters
from llm_perturb.measurement_condition import Condition
from llm_perturb.output_channels import check_channels
from llm_perturb.perturbation import Perturbation
from llm_perturb.perturbation_options import PerturbationOptions
from llm_perturb.selection import Target, draw
from llm_perturb.weights_csv import WeightList, csv_label, read_weight_list


@dataclass(frozen=True, kw_only=True)
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
    selections: Sequence[str]
    metrics: Sequence[str]
    perturbations: list[Perturbation]
    seeds: list[int]
    fixed: list[Condition] = field(default_factory=list)

    def labels(self) -> list[str]:
        """The selections as the table names them: ``top_<metric or CSV>``, ``random``, ``bottom_<metric>``."""
        top_metrics = [csv_label(weight_list.path) for weight_list in self.lists] or self.metrics
        names = {
            "top": [layout.top_label(metric) for metric in top_metrics],
            "matched": [layout.matched_label(metric) for metric in top_metrics],
            "random": [layout.RANDOM],
            "bottom": [layout.bottom_label(metric) for metric in self.metrics],
        }
        labels = [label for selection in self.selections for label in names[selection]]
        return list(dict.fromkeys(labels))

    def conditions(self) -> list[Condition]:
        """All conditions in the order of the table; those that select a set of a target have no weights yet."""
        no_weights = torch.empty(0, dtype=torch.int64)
        sets = [
            Condition(target=target, selection=label, perturbation=perturbation, k=k, seed=seed, positions=no_weights)
            for target in self.targets
            for label in self.labels()
            for perturbation in self.perturbations
            for k in self.ks
            for seed in seeds_of(label, perturbation, self.seeds)
        ]
        by_key = {condition.key: condition for condition in [*sets, *self.fixed]}  # each once
        return list(by_key.values())

    def check(self) -> None:
        """Refuse what could only fail after hours.

        Raises:
            RequestError: two lists of one name, a target that has no such list's weight or too few weights.
        """
        labels = [csv_label(weight_list.path) for weight_list in self.lists]
        for label in labels:
            if labels.count(label) > 1:
                raise RequestError(f"--weights-csv has two files of {label}; their rows could not be told apart")
        n_sets = len(labels or self.metrics)
        if "random" in self.selections or "matched" in self.selections:
            n_sets += 1
        for target in self.targets:
            if max(self.ks) * n_sets > target.n_weights:
                raise RequestError(
                    f"--k {max(self.ks)} is too many for {target.layer}: {n_sets} sets (tops, and a control outside of "
                    f"them) may need {max(self.ks) * n_sets} weights, and it has {target.n_weights}"
                )
            for weight_list in self.lists:
                weight_list.within(target, 1)


def plan_of(options: PerturbationOptions, model: PreTrainedModel) -> Plan:
    """Check a request against the model, before anything is measured.

    Raises:
        RequestError: no target or an unknown one, too few weights, a list of another model, a perturbation that the
            dtype does not allow, ``quantize`` where output channels are not known, or ``--kl`` for a model without a
            plain head.
    """
    layers = options.target_layers
    if not layers and not options.per_weight:
        raise RequestError("no target: set TARGET_LAYER or --target-layer; --list-layers shows what there is")
    named = named_parameters(model)
    targets = [Target(layer, {name: named[name] for name in match(model, layer)}) for layer in dict.fromkeys(layers)]
    if options.kl and not is_plain(model):
        raise RequestError("--kl needs a model whose logits are a linear map of its last hidden state; this is none")
    perturbations, seeds = options.perturbations, options.seeds
    for perturbation in perturbations:
        perturbation.check(model.dtype)
    fixed: list[Condition] = []
    for target in targets:
        if options.rows:
            fixed += lines(target, 0, options.rows, perturbations, seeds)
        if options.cols:
            fixed += lines(target, 1, options.cols, perturbations, seeds)
    if fixed:  # the lines are what is selected, not sets of the target's weights
        targets = []
    if options.per_weight:
        fixed += single_weights(read_weight_list(options.per_weight, named), named, perturbations, seeds)
    plan = Plan(
        targets=targets,
        lists=[read_weight_list(path, named) for path in options.weights_csv],
        ks=options.ks,
        selections=options.selection,
        metrics=options.metric,
        perturbations=perturbations,
        seeds=seeds,
        fixed=fixed,
    )
    plan.check()
    if any(perturbation.kind == "quantize" for perturbation in perturbations):
        names = {name: None for condition in plan.conditions() for name in condition.target.parameters}
        check_channels(model, names)
    return plan


def seeds_of(label: str, perturbation: Perturbation, seeds: list[int]) -> Sequence[int | None]:
    """The seeds where something is drawn, else one None."""
    drawn = label.startswith(layout.RANDOM) or layout.is_matched(label) or perturbation.kind == "gaussian_noise"
    return seeds if drawn else [None]


def single_weights(
    weights: WeightList, named: dict[str, Parameter], perturbations: list[Perturbation], seeds: list[int]
) -> list[Condition]:
    """One condition for each weight of a list, perturbed alone."""
    conditions = []
    for name, index, score in zip(weights.names, weights.indices, weights.scores, strict=True):
        row_and_col: tuple[int, int | None] = (int(index), None)
        if named[name].ndim > 1:
            row_and_col = divmod(int(index), named[name][0].numel())
        conditions += [
            Condition(
                target=Target(layer_of(name), {name: named[name]}),
                selection=layout.SINGLE_WEIGHT,
                perturbation=perturbation,
                k=1,
                seed=seed,
                positions=torch.tensor([index]),
                score_sum=float(score),
                row=row_and_col[0],
                col=row_and_col[1],
            )
            for perturbation in perturbations
            for seed in seeds_of(layout.SINGLE_WEIGHT, perturbation, seeds)
        ]
    return conditions


def lines(
    target: Target, axis: int, indices: list[int], perturbations: list[Perturbation], seeds: list[int]
) -> list[Condition]:
    """Whole rows (axis 0) or columns (axis 1) of a matrix as stored, and a random other one for each seed.

    Raises:
        RequestError: the target is not one matrix, or a line is out of range.
    """
    label = (layout.ROW, layout.COL)[axis]
    control = (layout.RANDOM_ROW, layout.RANDOM_COL)[axis]
    shapes = [tuple(parameter.shape) for parameter in target.parameters.values()]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise RequestError(f"--{label}s needs a TARGET_LAYER that is one matrix, and '{target.layer}' is not")
    shape = shapes[0]
    n_lines = shape[axis]
    for index in indices:
        if not 0 <= index < n_lines:
            raise RequestError(f"--{label}s {index} is out of range: {target.layer} has {n_lines} {label}s, from 0")
    if len(set(indices)) >= n_lines:
        raise RequestError(f"--{label}s leaves no other {label} of {target.layer} for the random control")
    excluded = torch.tensor(sorted(set(indices)))
    flat = torch.arange(shape[0] * shape[1]).view(shape)  # the position of every weight
    conditions = []
    for perturbation in perturbations:
        chosen: list[tuple[str, int, int | None]] = [
            (label, index, seed) for index in indices for seed in seeds_of(label, perturbation, seeds)
        ]
        for control_seed in seeds:
            other = draw(n_lines, 1, excluded, [control_seed, f"random {label}", target.layer])
            chosen.append((control, int(other), control_seed))
        for selection, index, seed in chosen:
            positions = flat.select(axis, index).clone()
            conditions.append(
                Condition(
                    target=target,
                    selection=selection,
                    perturbation=perturbation,
                    k=len(positions),
                    seed=seed,
                    positions=positions,
                    row=index if axis == 0 else None,
                    col=index if axis == 1 else None,
                )
            )
    return conditions


def share(units: Sequence[Unit], rank: int, world: int) -> list[Unit]:
    """The part of one of several processes (or shards): whole targets if there are enough, else single conditions.

    Args:
        units: all of them, in the same order in every process.
        rank: the number of the process, from 0.
        world: how many processes there are.
    """
    names = [unit.conditions[0].key if isinstance(unit, Copies) else unit.target.layer for unit in units]
    number = {name: at for at, name in enumerate(dict.fromkeys(names))}
    if len(number) >= 2 * world:
        owners = [number[name] % world for name in names]
    else:
        owners = [at % world for at in range(len(units))]
    return [unit for unit, owner in zip(units, owners, strict=True) if owner == rank]
