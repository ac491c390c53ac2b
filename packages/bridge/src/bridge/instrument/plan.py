"""Turn the flags of ``bridge validate`` into a plan; every mistake is reported before anything starts."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bridge.analysis.primary_analysis import primary_analysis
from bridge.analysis.single_weights import choose_weights
from bridge.analysis.targets import choose_targets
from bridge.exchange import baseline_file, layout
from bridge.exchange.discovery_run import Discovery, choose_discovery
from bridge.exchange.errors import RequestError, did_you_mean
from bridge.exchange.layout import ALL, Shard, parse_shard
from bridge.exchange.run_folder import check_output
from bridge.instrument import command, process
from bridge.instrument.validation_options import ValidationOptions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request that passed every check: all that is needed to measure.

    Attributes:
        discovery: the run that is validated.
        targets: the layers to measure: table TARGETS.
        single_weights: perturbed one by one: table SINGLE_WEIGHTS; None if none were asked for.
        warnings: for the person and the manifest.
        options: what decides the numbers, as it goes into the manifest.
        identity: of the validation run.
        other_texts: the texts that judge, where they are not those that gave the scores; else empty.
        weights_files: by metric, the file of the top weights of every layer.
        shard: the part of the request that is measured here; None for all of it.
        python: the Python of the instrument's environment.
        command: the instrument's command, but for the targets, the files of weights and where it writes.
        output: the folder for the validation's folder.
    """

    discovery: Discovery
    targets: pd.DataFrame
    single_weights: pd.DataFrame | None
    warnings: list[str]
    options: dict[str, Any]
    identity: dict[str, Any]
    other_texts: dict[str, Any]
    weights_files: dict[str, Path]
    shard: Shard | None
    python: Path
    command: list[str]
    output: Path

    @property
    def cost(self) -> str:
        """How many measurements the request has, of which each is a forward pass over the corpus or part of one."""
        options = self.options
        n_metrics, n_seeds = len(options["metrics"]), len(options["seeds"])
        n_chosen = n_metrics * (2 if "bottom" in options["selection"] else 1)
        sets_of_layer = single = 0
        for perturbation in options["perturbations"]:
            repeats = n_seeds if perturbation == "gaussian_noise" else 1
            sets_of_layer += (n_chosen * repeats + n_seeds) * len(options["k"])
            single += repeats
        n_targets = len(options["target_layers"])
        parts = [f"{n_targets} targets x {sets_of_layer} sets of weights"]
        n_single = 0 if self.single_weights is None else len(self.single_weights) * single
        if n_single:
            parts.append(f"{n_single} single weights")
        total = n_targets * sets_of_layer + n_single
        other = self.other_texts.get("data_file") or self.other_texts.get("dataset")
        texts = other or f"{self.discovery.corpus['n_tokens']} predicted tokens"  # of others they are not counted yet
        return f"{total} measurements ({', '.join(parts)}) on {texts}"


def plan(options: ValidationOptions) -> Plan:
    """Check everything that can be known before anything is started or written.

    Raises:
        RequestError: whatever is wrong with the request, the discovery's files, or the environment.
    """
    if options.shard is not None and options.merge:
        raise RequestError("--shard measures a part and --merge puts the parts together: give one of them")
    shard = None if options.shard is None else parse_shard(options.shard)
    discovery = choose_discovery(options.from_)
    not_compared = baseline_file.check_same(options.baseline, discovery) if options.baseline else []
    metrics = discovery.metrics(options.metrics)
    _check_primary(options.primary, metrics)
    discovery.stability()  # the report needs it: what is wrong with it is said before anything is measured
    ks, weights_files = _sets(discovery, metrics, options)
    options.check_ranges()
    other_texts = options.chosen()
    targets, warnings = _targets(discovery, metrics, ks[-1], options)
    chosen = _chosen(options, discovery, metrics, ks, targets["target_layer"].tolist())
    identity: dict[str, Any] = {
        "options": chosen,
        "model": discovery.model,
        "corpus": discovery.corpus,
        "discovery": _hashes(discovery, metrics, weights_files),
    }
    if other_texts:
        identity["evaluation"] = other_texts
    single_weights = None
    if options.single_weights:
        sampled = discovery.sampled()
        if options.single_weights > len(sampled):
            request = f"--single-weights {options.single_weights}"
            warnings.append(f"{request}: the discovery sampled {len(sampled)}, all of them are taken")
        single_weights = choose_weights(
            sampled, metrics, options.single_weights, _n_weights(discovery, metrics[0]), options.draw_seed
        )
        chosen["single_weights"] = len(single_weights)
        identity["single_weights"] = hashlib.sha256(single_weights.to_csv(index=False).encode()).hexdigest()
        sampled_file = discovery.folder / layout.SAMPLED_WEIGHTS_FILE
        identity["discovery"][sampled_file.name] = _hash(sampled_file)
    elif not chosen["target_layers"]:
        raise RequestError(
            "nothing is to be measured: --layers 0, --control-layers 0, --no-global-set and no --single-weights"
        )
    python = process.find_python(options.perturb_python)
    flags = command.model_flags(discovery, options.device, options.batch_size, options.trust_remote_code)
    flags += command.corpus_flags(discovery, other_texts)
    flags += command.measurement_flags(chosen)
    return Plan(
        discovery=discovery,
        targets=targets,
        single_weights=single_weights,
        warnings=[*warnings, *not_compared],
        options=chosen,
        identity=identity,
        other_texts=other_texts,
        weights_files=weights_files,
        shard=shard,
        python=python,
        command=command.launcher(python, options.num_processes, options.device) + flags,
        output=check_output(options.output or str(discovery.folder.parent)),
    )


def _chosen(
    options: ValidationOptions, discovery: Discovery, metrics: list[str], ks: list[int], target_layers: list[str]
) -> dict[str, Any]:
    """What decides the numbers, as it goes into the manifest: the primary analysis first."""
    chosen: dict[str, Any] = {
        "metrics": metrics,
        "k": ks,
        "perturbations": list(dict.fromkeys(options.perturbations)),
        "seeds": list(dict.fromkeys(options.seeds)),
        "selection": ["top", "random", "bottom"] if options.bottom else ["top", "random"],
        "numbers": options.numbers(),
        "draw_seed": options.draw_seed,
        "target_layers": target_layers,
    }
    if options.global_set:
        chosen["target_layers"].append(ALL)  # all matrices of the model: the top-K there is the global one
    # k in the order of the request: its first is that of the primary analysis, named here before anything is measured
    primary = primary_analysis(chosen | {"k": options.k or ks}, discovery.baseline_metric, options.primary)
    return {"primary": primary._asdict(), **chosen}


def _sets(discovery: Discovery, metrics: list[str], options: ValidationOptions) -> tuple[list[int], dict[str, Path]]:
    """The sizes of the sets, ascending, and for each metric the file that its sets are taken from."""
    if not (options.layers or options.control_layers or options.all_layers or options.global_set):
        return [1], {}
    available = {metric: discovery.ks(metric, "per_layer") for metric in metrics}
    smallest_of_all = max(min(sizes) for sizes in available.values())
    ks = sorted(set(options.k or [smallest_of_all]))
    if ks[0] < 1:
        raise RequestError(f"--k must be at least 1, not {ks[0]}")
    return ks, {metric: _smallest_file(discovery, metric, available[metric], ks[-1]) for metric in metrics}


def _targets(
    discovery: Discovery, metrics: list[str], k: int, options: ValidationOptions
) -> tuple[pd.DataFrame, list[str]]:
    """The layers to measure, ranked by the first metric, and warnings; the tables of every metric are checked.

    A layer must hold the top-k of each metric and as many weights besides, from which the control is drawn.
    """
    top_weights = {metric: discovery.top_weights(metric, discovery.ks(metric)[0]) for metric in metrics}
    summaries = {metric: discovery.summary(metric) for metric in metrics}
    summary = summaries[metrics[0]]
    least = k * (len(metrics) + 1)
    enough = summary[summary["n_weights"] >= least]
    if enough.empty:
        raise RequestError(
            f"no layer has the {least} weights that the top {k} of {len(metrics)} metrics and a control of {k} take; "
            "lower --k"
        )
    warnings = []
    if len(enough) < len(summary):
        warnings = [f"{len(summary) - len(enough)} layers of fewer than {least} weights are left out"]
    n_control = len(enough) if options.all_layers else options.control_layers
    chosen = choose_targets(top_weights[metrics[0]], enough, options.layers, n_control, seed=options.draw_seed)
    return chosen, warnings


def _n_weights(discovery: Discovery, metric: str) -> int:
    """How many weights the discovery scored."""
    return int(discovery.summary(metric)["n_weights"].sum())


def _hashes(discovery: Discovery, metrics: list[str], weights_files: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of each file of the discovery that the validation rests on."""
    assert discovery.baseline  # reading it checks it
    used = [discovery.folder / layout.BASELINE_FILE, *weights_files.values()]
    for metric in metrics:
        used.append(discovery.folder / layout.layer_summary_file(metric))
        used.append(discovery.path(metric, discovery.ks(metric)[0]))
    return {path.name: _hash(path) for path in used}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_primary(metric: str | None, metrics: list[str]) -> None:
    if metric is not None and metric not in metrics:
        compared = ", ".join(metrics)
        raise RequestError(
            f"--primary {metric} is none of the metrics that are compared{did_you_mean(metric, metrics)}: {compared}"
        )


def _smallest_file(discovery: Discovery, metric: str, available: list[int], k: int) -> Path:
    """The smallest file that holds the top-k of every parameter, checked."""
    enough = [size for size in available if size >= k]
    if not enough:
        raise RequestError(
            f"{discovery.folder} holds the top {available[-1]} of each parameter by {metric}, not {k}; "
            f"lower --k, or run the discovery with --topk {k}"
        )
    discovery.top_per_layer(metric, enough[0])
    return discovery.path(metric, enough[0], "per_layer")
