"""A whole experiment: from the flags of the scripts to a table of measurements in a run folder."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bridge.errors import RequestError, RunError
from bridge.records import write_json
from bridge.runs import Run, check_output, open_run
from tqdm import tqdm

from llm_perturb import models, weights
from llm_perturb.causality import check_causal
from llm_perturb.copies import Copies, Unit, group
from llm_perturb.corpus import Corpus, CorpusOptions, read_texts, tokenize
from llm_perturb.head import is_plain
from llm_perturb.intervals import MIN_SEQUENCES
from llm_perturb.models import LoadedModel
from llm_perturb.perplexity import Perplexity, check_padding, measure, reference_of, sequence_losses, summarize
from llm_perturb.perturbation import Perturbation
from llm_perturb.plan import Plan, choose_weights, lines, share, single_weights
from llm_perturb.processes import Processes
from llm_perturb.selection import Target
from llm_perturb.shards import KIND, Shard
from llm_perturb.sweep import sweep
from llm_perturb.table import failures, record_of, write_records
from llm_perturb.weight_list import hash_file, read_weight_list


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is held."""

    model: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    attn_implementation: str | None = None

    def load(self, target_layers: Sequence[str] = ()) -> LoadedModel:
        """Load it."""
        options = asdict(self)
        return models.load(options.pop("model"), target_layers=target_layers, **options)


@dataclass(frozen=True)
class Request:
    """What one run of the instrument is to measure; see the flags of ``run_topk_perturb.py``."""

    target_layers: list[str]
    k: list[int] = field(default_factory=lambda: [100])
    selections: list[str] = field(default_factory=lambda: ["top", "random", "bottom"])
    metrics: list[str] = field(default_factory=lambda: ["grad_x_weight"])
    perturbations: list[Perturbation] = field(default_factory=lambda: [Perturbation("zero")])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    weights_csv: list[str] = field(default_factory=list)
    per_weight: str | None = None
    rows: list[int] = field(default_factory=list)
    cols: list[int] = field(default_factory=list)
    kl: bool = False


def measure_baseline(
    model_options: ModelOptions, corpus_options: CorpusOptions, batch_size: int, output: str, experiment_id: str | None
) -> None:
    """Measure the unperturbed model and write ``baseline.json``."""
    processes = Processes()
    place = check_output(output)
    texts = read_texts(corpus_options)
    loaded = model_options.load()
    check_causal(loaded.model, batch_size)
    corpus = tokenize(texts, loaded.tokenizer, corpus_options, loaded.max_positions)
    identity = _identity(model_options, corpus_options, loaded, corpus, batch_size)
    if processes.first:
        run = open_run(place, "baseline", identity, experiment_id)
        with run.recorded():
            losses = sequence_losses(loaded.model, corpus.sequences, batch_size, "baseline")
            check_padding(loaded.model, corpus.sequences, losses, batch_size)
            _write_baseline(run, loaded, corpus, summarize(losses, corpus))
        print(f"baseline written to {run.folder / 'baseline.json'}", flush=True)
    processes.close()


def measure_perturbations(
    request: Request,
    model_options: ModelOptions,
    corpus_options: CorpusOptions,
    batch_size: int,
    output: str,
    experiment_id: str | None,
    shard: Shard | None = None,
) -> None:
    """Measure every condition of a request, or of a shard of it, and write the table; a killed run goes on."""
    processes = Processes()
    place = check_output(output)
    texts = read_texts(corpus_options)
    loaded = model_options.load(request.target_layers)
    check_causal(loaded.model, batch_size)
    corpus = tokenize(texts, loaded.tokenizer, corpus_options, loaded.max_positions)
    plan = _make_plan(request, loaded)
    identity = _identity(model_options, corpus_options, loaded, corpus, batch_size)
    identity["options"] |= {**asdict(request), "perturbations": [p.label for p in request.perturbations]}
    csvs = [*request.weights_csv, *([request.per_weight] if request.per_weight else [])]
    identity["weights_csv_sha256"] = [hash_file(path) for path in csvs]
    units, order = group(loaded.model, plan.shells()), {shell.key: at for at, shell in enumerate(plan.shells())}
    facts = {"world_size": processes.world, "device": str(loaded.model.device)}
    kind = "perturb"
    if shard:
        units, kind = share(units, shard.number - 1, shard.of), KIND
        identity["shard"] = str(shard)
        experiment_id = experiment_id and f"{experiment_id}_{shard.number}_of_{shard.of}"
        facts |= {"rows": sorted(order[key] for unit in units for key in keys_of(unit)), "n_rows": len(order)}
        if not units:
            raise RequestError(f"--shard {shard} has nothing to do: there are fewer parts of the work than shards")
    run: Run | None = None

    def begin() -> str:
        nonlocal run
        run = open_run(place, kind, identity, experiment_id, facts)
        return str(run.folder)

    folder = processes.once(begin)
    run = run or Run(Path(folder), {"warnings": []}, resumed=False)
    with run.recorded() if processes.first else nullcontext():
        _run(run, plan, units, loaded, corpus, batch_size, request.kl, processes)
    processes.close()


def _make_plan(request: Request, loaded: LoadedModel) -> Plan:
    """Check the request against the model, before anything is measured."""
    if not request.target_layers and not request.per_weight:
        raise RequestError("no target: set TARGET_LAYER or --target-layer; --list-layers shows what there is")
    named = weights.named_parameters(loaded.model)
    targets = [
        Target(layer, {name: named[name] for name in weights.match(loaded.model, layer)})
        for layer in dict.fromkeys(request.target_layers)
    ]
    if request.kl and not is_plain(loaded.model):
        raise RequestError("--kl needs a model whose logits are a linear map of its last hidden state; this is none")
    for perturbation in request.perturbations:
        perturbation.check(loaded.model.dtype)
    changes = request.perturbations, request.seeds
    fixed = [
        condition
        for target in targets
        for axis, indices in enumerate([request.rows, request.cols])
        if indices
        for condition in lines(target, axis, indices, *changes)
    ]
    if fixed:  # the lines are what is selected, not sets of the target's weights
        targets = []
    if request.per_weight:
        fixed += single_weights(read_weight_list(request.per_weight, named), named, *changes)
    lists = [read_weight_list(path, named) for path in request.weights_csv]
    plan = Plan(targets, lists, request.k, request.selections, request.metrics, *changes, fixed)
    plan.check()
    return plan


def _identity(
    model_options: ModelOptions, corpus_options: CorpusOptions, loaded: LoadedModel, corpus: Corpus, batch_size: int
) -> dict[str, dict]:
    """All that the numbers depend on, but for the request; the batch size, for it rounds."""
    options = {**asdict(model_options), **asdict(corpus_options), "model": loaded.facts["id"], "batch_size": batch_size}
    del options["device"]
    return {"options": options, "model": loaded.facts, "corpus": corpus.facts}


def _write_baseline(run: Run, loaded: LoadedModel, corpus: Corpus, perplexity: Perplexity) -> None:
    facts = {"model": loaded.facts["id"], "revision": loaded.facts["revision"], "dtype": loaded.facts["dtype"]}
    facts |= {"corpus_sha256": corpus.facts["corpus_sha256"], **perplexity.as_dict()}
    write_json(run.folder / "baseline.json", facts)
    print(
        f"BASELINE_PERPLEXITY: {perplexity.ppl:.6g}  ({perplexity.nll:.6f} nats per token, "
        f"{perplexity.n_tokens} tokens, {perplexity.n_sequences} sequences)",
        flush=True,
    )


def _run(
    run: Run,
    plan: Plan,
    units: list[Unit],
    loaded: LoadedModel,
    corpus: Corpus,
    batch_size: int,
    kl: bool,
    processes: Processes,
) -> None:
    model = loaded.model
    reference = reference_of(model, corpus.sequences, batch_size) if kl else None
    baseline = measure(model, corpus.sequences, batch_size, "baseline" if processes.first else None)
    check_padding(model, corpus.sequences, baseline.losses, batch_size)
    perplexity = summarize(baseline.losses, corpus)
    if processes.first:
        _write_baseline(run, loaded, corpus, perplexity)
        if len(corpus.sequences) < MIN_SEQUENCES:
            run.warn(f"{len(corpus.sequences)} sequences are too few for an interval; ci_low and ci_high are empty")
    if len({tuple(losses) for losses in processes.gather(baseline.losses.tolist())}) > 1:
        raise RunError("the processes do not agree on the baseline; do they run on different hardware?")
    finished = processes.once(lambda: _finished(run, perplexity))
    own = share(units, processes.rank, processes.world)
    todo = choose_weights(plan, [unit for unit in own if not keys_of(unit) <= finished], model, corpus)
    bar = tqdm(
        sweep(model, corpus, todo, baseline.losses, batch_size, reference),
        total=sum(len(keys_of(unit)) for unit in todo),
        desc="perturbations",
        disable=not processes.first,
    )
    for outcome in bar:
        bar.set_postfix_str(outcome.condition.target.layer)
        if outcome.failure:
            bar.write(f"error: {outcome.failure}; going on with the other targets", sys.stderr)
        run.append(record_of(outcome, baseline, perplexity, corpus, loaded.facts["id"]), processes.rank)
    processes.gather(len(todo))
    if processes.first:
        keys = {key for unit in units for key in keys_of(unit)}
        records = {record["key"]: record for record in run.records()}
        ordered = [records[shell.key] for shell in plan.shells() if shell.key in keys]
        failed = failures(ordered)
        kept = [r for r in ordered if r["row"]["target_layer"] not in failed or r["row"]["selection"] == "weight"]
        if kept:
            write_records(run, kept, baseline, corpus, comparisons=len(keys) == len(plan.shells()))
        if failed:
            run.update(failed_targets=failed)
            raise RunError(
                "; ".join(failed.values()) + f" ({len(failed)} targets failed, the table has the others)" * bool(kept)
            )


def keys_of(unit: Unit) -> set[str]:
    """The keys of the conditions of a unit of work."""
    return {condition.key for condition in (unit.conditions if isinstance(unit, Copies) else [unit])}


def _finished(run: Run, perplexity: Perplexity) -> set[str]:
    """The keys of the conditions that an earlier, killed run of the same request has measured."""
    records = run.records()
    if any(record["row"]["baseline_nll"] != perplexity.nll for record in records):
        raise RequestError(
            f"{run.folder} was begun where the arithmetic rounds otherwise (another device or number of threads); "
            "go on there, or choose another --experiment-id"
        )
    return {record["key"] for record in records}
