"""From the flags of ``bridge validate`` to a plan, with everything that can be wrong found before anything starts."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bridge.analysis.single_weights import FILE, choose_weights
from bridge.analysis.targets import choose_targets
from bridge.exchange import baseline_file
from bridge.exchange.discovery_run import Discovery, choose_discovery
from bridge.exchange.errors import RequestError
from bridge.exchange.run_folder import check_output
from bridge.instrument import command, process

ALL = "ALL"  # as a TARGET_LAYER: all matrices of the model, so that the top-K there is the global one


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ``bridge validate`` was asked for; its flags, under the same names."""

    places: Sequence[str]
    layers: int = 5
    control_layers: int = 5
    all_layers: bool = False
    metrics: Sequence[str] | None = None
    k: Sequence[int] | None = None
    perturbations: Sequence[str] = ("zero",)
    seeds: Sequence[int] = (0, 1, 2)
    global_set: bool = True
    bottom: bool = False
    single_weights: int = 0
    factor: float | None = None
    sigma: float | None = None
    bit: int | None = None
    n_bits: int | None = None
    baseline: str | None = None
    num_processes: int = 1
    shard: str | None = None
    merge: Sequence[str] | None = None
    output: str | None = None
    experiment_id: str | None = None
    perturb_python: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Plan:
    """A request that was found good: all that is needed to measure."""

    discovery: Discovery
    targets: pd.DataFrame  # table TARGETS
    single_weights: pd.DataFrame | None  # table TOP_WEIGHTS: perturbed one by one
    warnings: list[str]
    options: dict  # what decides the numbers, as it goes to the manifest
    identity: dict
    weights: dict[str, Path]  # by metric, the file of the top weights of every layer
    shard: tuple[int, int] | None  # its number from 1, and of how many
    python: Path
    command: list[str]  # the instrument's, but for the targets, the files and where it writes
    output: Path


def plan(options: Options) -> Plan:
    """Check everything that can be known before anything is started or written.

    Raises:
        RequestError: whatever is wrong with the request, the discovery's files, or the environment.
    """
    shard = _shard(options)
    discovery = choose_discovery(options.places)
    unknown = baseline_file.check_same(options.baseline, discovery) if options.baseline else []
    metrics = discovery.metrics(options.metrics)
    sets = options.layers or options.control_layers or options.all_layers or options.global_set
    ks, weights = _sets(discovery, metrics, options) if sets else ([1], {})
    _check_numbers(options)
    targets, warnings = _targets(discovery, metrics, ks[-1], options)
    chosen = {
        "metrics": metrics,
        "k": ks,
        "perturbations": list(dict.fromkeys(options.perturbations)),
        "seeds": list(dict.fromkeys(options.seeds)),
        "selection": ["top", "random"] + ["bottom"] * options.bottom,
        "numbers": _numbers(options),
        "target_layers": targets["target_layer"].tolist() + [ALL] * options.global_set,
    }
    single_weights, more_warnings = _single_weights(discovery, metrics, options.single_weights)
    if not chosen["target_layers"] and single_weights is None:
        raise RequestError(
            "nothing is to be measured: --layers 0, --control-layers 0, --no-global-set and no --single-weights"
        )
    identity = {
        "options": chosen,
        "model": discovery.model,
        "corpus": discovery.corpus,
        "discovery": _hashes(discovery, metrics, weights),
    }
    if single_weights is not None:
        chosen["single_weights"] = len(single_weights)
        identity["single_weights"] = hashlib.sha256(single_weights.to_csv(index=False).encode()).hexdigest()
        identity["discovery"][FILE] = _hash(discovery.folder / FILE)
    flags = command.model_flags(discovery, options.device, options.batch_size, options.trust_remote_code)
    flags += command.corpus_flags(discovery) + command.measurement_flags(chosen)
    python = process.find_python(options.perturb_python)
    words = command.launcher(python, options.num_processes, options.device) + flags
    output = check_output(options.output or str(discovery.folder.parent))
    warnings += more_warnings + unknown
    return Plan(discovery, targets, single_weights, warnings, chosen, identity, weights, shard, python, words, output)


def _sets(discovery: Discovery, metrics: list[str], options: Options) -> tuple[list[int], dict[str, Path]]:
    """The sizes of the sets, ascending, and for each metric the file that they are taken from."""
    available = {metric: discovery.ks(metric, "per_layer") for metric in metrics}
    ks = sorted(set(options.k or [max(min(sizes) for sizes in available.values())]))
    if ks[0] < 1:
        raise RequestError(f"--k must be at least 1, not {ks[0]}")
    return ks, {metric: _smallest_file(discovery, metric, available[metric], ks[-1]) for metric in metrics}


def _shard(options: Options) -> tuple[int, int] | None:
    if options.shard is None:
        return None
    if options.merge:
        raise RequestError("--shard measures a part and --merge puts the parts together: give one of them")
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", options.shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise RequestError(f"--shard '{options.shard}' must be i/n, such as 2/4, with i from 1 to n")
    return int(found[1]), int(found[2])


def _numbers(options: Options) -> dict[str, float]:
    """The parameters of the perturbations, those that were given.

    Raises:
        RequestError: one is of a perturbation that was not asked for.
    """
    of = {"factor": "scale", "sigma": "gaussian_noise", "bit": "bit_flip", "n_bits": "quantize"}
    given = {name: value for name in of if (value := getattr(options, name)) is not None}
    for name in given:
        if of[name] not in options.perturbations:
            raise RequestError(f"--{name.replace('_', '-')} is for --perturbations {of[name]}, which is not asked for")
    return given


def _single_weights(discovery: Discovery, metrics: list[str], n: int) -> tuple[pd.DataFrame | None, list[str]]:
    """The weights to perturb one by one, if any were asked for, and what to say of them."""
    if n == 0:
        return None, []
    sampled = discovery.sampled()
    warnings = [f"--single-weights {n}: the discovery sampled {len(sampled)}, all of them are taken"]
    return choose_weights(sampled, metrics, n), warnings if n > len(sampled) else []


def _targets(discovery: Discovery, metrics: list[str], k: int, options: Options) -> tuple[pd.DataFrame, list[str]]:
    """The layers to measure, ranked by the first metric, and what to say of them; every metric's tables are checked.

    A layer must hold the top-k of each metric and as many weights besides, from which the control is drawn.
    """
    tables = [(discovery.top_weights(metric, discovery.ks(metric)[0]), discovery.summary(metric)) for metric in metrics]
    top_weights, summary = tables[0]
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
    return choose_targets(top_weights, enough, options.layers, n_control), warnings


def _hashes(discovery: Discovery, metrics: list[str], weights: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of each file of the discovery that the validation rests on."""
    assert discovery.baseline  # reading it checks it
    used = [discovery.folder / "baseline.json", *weights.values()]
    for metric in metrics:
        used += [discovery.folder / f"layer_summary_{metric}.csv", discovery.path(metric, discovery.ks(metric)[0])]
    return {path.name: _hash(path) for path in used}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_numbers(options: Options) -> None:
    batch_size = 1 if options.batch_size is None else options.batch_size
    numbers = {"seeds": (options.seeds, 0), "batch-size": ([batch_size], 1)}
    numbers["single-weights"] = ([options.single_weights], 0)
    for flag, (values, least) in numbers.items():
        if min(values) < least:
            raise RequestError(f"--{flag} must be at least {least}, not {min(values)}")


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
