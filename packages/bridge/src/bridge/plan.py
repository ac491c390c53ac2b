"""From the flags of ``bridge validate`` to a plan, with everything that can be wrong found before anything starts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bridge import instrument
from bridge.discovery import Discovery, choose_discovery
from bridge.errors import RequestError
from bridge.runs import check_output
from bridge.single_weights import FILE, choose_weights
from bridge.targets import choose_targets

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
    command: list[str]  # the instrument's, but for where it writes
    output: Path


def plan(options: Options) -> Plan:
    """Check everything that can be known before anything is started or written.

    Raises:
        RequestError: whatever is wrong with the request, the discovery's files, or the environment.
    """
    discovery = choose_discovery(options.places)
    metrics = discovery.metrics(options.metrics)
    available = {metric: discovery.ks(metric, "per_layer") for metric in metrics}
    ks = sorted(set(options.k or [max(min(sizes) for sizes in available.values())]))
    _check_numbers(options, ks)
    weights = {metric: _smallest_file(discovery, metric, available[metric], ks[-1]) for metric in metrics}
    targets, warnings = _targets(discovery, metrics, ks[-1], options)
    chosen = {
        "metrics": metrics,
        "k": ks,
        "perturbations": list(dict.fromkeys(options.perturbations)),
        "seeds": list(dict.fromkeys(options.seeds)),
        "selection": ["top", "random"] + ["bottom"] * options.bottom,
        "target_layers": targets["target_layer"].tolist() + [ALL] * options.global_set,
    }
    single_weights, more_warnings = _single_weights(discovery, metrics[0], options.single_weights)
    if not chosen["target_layers"]:
        raise RequestError("no layer is to be measured: --layers 0, --control-layers 0 and --no-global-set")
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
    flags = _model_flags(discovery, options) + _corpus_flags(discovery) + _measurement_flags(chosen, weights)
    command = [str(instrument.find_python(options.perturb_python)), str(instrument.SCRIPT), *flags]
    output = check_output(options.output or str(discovery.folder.parent))
    warnings += more_warnings
    return Plan(discovery, targets, single_weights, warnings, chosen, identity, command, output)


def _single_weights(discovery: Discovery, metric: str, n: int) -> tuple[pd.DataFrame | None, list[str]]:
    """The weights to perturb one by one, if any were asked for, and what to say of them."""
    if n == 0:
        return None, []
    sampled = discovery.sampled()
    warnings = [f"--single-weights {n}: the discovery sampled {len(sampled)}, all of them are taken"]
    return choose_weights(sampled, metric, n), warnings if n > len(sampled) else []


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


def _check_numbers(options: Options, ks: list[int]) -> None:
    batch_size = 1 if options.batch_size is None else options.batch_size
    numbers = {"k": (ks, 1), "seeds": (options.seeds, 0), "batch-size": ([batch_size], 1)}
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


def _model_flags(discovery: Discovery, options: Options) -> list[str]:
    wanted, model = discovery.options, discovery.model
    name, revision = model["id"], wanted.get("revision")
    if str(model.get("revision")).startswith("local-"):
        name = str(_existing(name, "model", discovery))
    elif revision is None and _is_commit(model.get("revision")):
        revision = model["revision"]  # the branch may have moved on since
    if wanted.get("trust_remote_code") and not options.trust_remote_code:
        raise RequestError(
            f"'{name}' was discovered with --trust-remote-code; give it here too if you still do trust it"
        )
    flags = _flags(
        model=name, revision=revision, dtype=model["dtype"], device=options.device, batch_size=options.batch_size
    )
    return flags + ["--trust-remote-code"] * options.trust_remote_code


def _corpus_flags(discovery: Discovery) -> list[str]:
    names = ("dataset_config", "split", "text_column", "packing", "max_length", "eval_limit")
    chosen = {name: discovery.options.get(name) for name in names}
    data_file, dataset = discovery.options.get("data_file"), discovery.options.get("dataset")
    if data_file:
        data_file = str(_existing(data_file, "data file", discovery))
    if dataset and Path(dataset).exists():
        dataset = str(Path(dataset).absolute())
    return _flags(data_file=data_file, dataset=dataset, **chosen)


def _measurement_flags(chosen: dict, weights: dict[str, Path]) -> list[str]:
    words = ["--target-layer", ",".join(chosen["target_layers"])]
    words += ["--k", *map(str, chosen["k"]), "--selection", *chosen["selection"]]
    words += ["--metric", *chosen["metrics"]] * ("bottom" in chosen["selection"])
    words += ["--perturbation", *chosen["perturbations"], "--seeds", *map(str, chosen["seeds"])]
    return [*words, "--weights-csv", *(path.name for path in weights.values())]


def _flags(**values: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def _existing(name: str, what: str, discovery: Discovery) -> Path:
    path = Path(name).absolute()
    if not path.exists():
        raise RequestError(
            f"the {what} '{name}' of {discovery.folder.name} is not here; "
            "start this command in the folder where the discovery was started"
        )
    return path


def _is_commit(revision: object) -> bool:
    return isinstance(revision, str) and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
