"""Measure all conditions of a request and write the table of measurements; a killed run is resumed."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bridge.exchange import layout
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.run_folder import Run, RunOptions, check_output, open_run

from llm_perturb.baseline_run import setup_identity, tell_of_texts, write_baseline
from llm_perturb.batched_single_weights import Copies, Unit, group
from llm_perturb.choose_weights import choose_weights
from llm_perturb.evaluation.causality import check_causal
from llm_perturb.evaluation.corpus import Corpus, CorpusOptions, read_texts, tokenize
from llm_perturb.evaluation.fingerprint import check_agreement
from llm_perturb.evaluation.models import LoadedModel, ModelOptions
from llm_perturb.evaluation.perplexity import Measured, Perplexity, check_padding, measure, reference_of, summarize
from llm_perturb.evaluation.processes import Processes
from llm_perturb.evaluation.progress import Progress, note
from llm_perturb.intervals import MIN_CLUSTERS, by_cluster
from llm_perturb.measurement_plan import Plan, plan_of, share
from llm_perturb.measurements_table import failures, record_form, record_of, write_records
from llm_perturb.perturbation_options import PerturbationOptions
from llm_perturb.sweep import sweep
from llm_perturb.weights_csv import check_model, hash_file


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What one run measures, on what.

    Attributes:
        plan: all conditions of the request.
        units: those that this run measures: all, or those of a shard.
        loaded: the model.
        corpus: the sequences.
        batch_size: sequences at a time.
        kl: whether the divergence of the predictions is measured.
    """

    plan: Plan
    units: list[Unit]
    loaded: LoadedModel
    corpus: Corpus
    batch_size: int
    kl: bool


def measure_perturbations(
    *,
    options: PerturbationOptions,
    model_options: ModelOptions,
    corpus_options: CorpusOptions,
    batch_size: int,
    run_options: RunOptions,
) -> None:
    """Measure every condition of a request, or of a shard of it, and write the table.

    Args:
        options: what is perturbed, and how.
        model_options: the model.
        corpus_options: the texts.
        batch_size: sequences at a time.
        run_options: the run folder.

    Raises:
        RequestError: the options cannot be carried out; all that can be is checked before anything is measured.
        RunError: a target failed, a loss of the unperturbed model is not finite, or the instrument fails a check.
    """
    target_layers = options.target_layers
    options.check(batch_size)
    shard = layout.parse_shard(options.shard) if options.shard else None
    processes = Processes(model_options.device)
    output = check_output(run_options.output)
    texts = read_texts(corpus_options)
    loaded = model_options.load(target_layers)
    check_causal(loaded.model, batch_size)
    corpus = tokenize(texts, loaded.tokenizer, corpus_options, loaded.max_positions)
    for path in options.weight_files:
        check_model(path, loaded.fingerprint)
    plan = plan_of(options, loaded.model)
    check_agreement(loaded.fingerprint, processes)

    identity: dict[str, Any] = setup_identity(model_options, corpus_options, loaded, corpus, batch_size)
    identity["options"] |= options.identity()
    identity["weights_csv_sha256"] = [hash_file(path) for path in options.weight_files]
    units = group(loaded.model, plan.conditions())
    details = {"world_size": processes.world, "device": str(loaded.model.device)}
    kind, experiment_id = layout.PERTURBATION, run_options.experiment_id
    if shard:
        kind = layout.SHARD
        experiment_id = experiment_id and shard.experiment_id(experiment_id)
        identity["shard"] = str(shard)
        units = share(units, shard.number - 1, shard.of)
        if not units:
            raise RequestError(f"--shard {shard} has nothing to do: there are fewer parts of the work than shards")
        details |= _rows_of(units, plan)

    run: Run | None = None

    def begin() -> str:
        nonlocal run
        run = open_run(output, kind, identity, experiment_id, details, loaded.fingerprint)
        return str(run.folder)

    folder = processes.once(begin)
    if run is None:  # the first process opened it; the others only append to their logs
        run = Run(folder=Path(folder), manifest={"warnings": []}, resumed=False, _lock=None)
    work = _Work(plan=plan, units=units, loaded=loaded, corpus=corpus, batch_size=batch_size, kl=options.kl)
    with run.recorded() if processes.first else nullcontext():
        _carry_out(work, run, processes)
    processes.close()


def _rows_of(units: Sequence[Unit], plan: Plan) -> dict[str, object]:
    """Which rows of the table of the whole request a shard measures, and how many there are in all."""
    number = {condition.key: row for row, condition in enumerate(plan.conditions())}
    rows = sorted(number[key] for unit in units for key in keys_of(unit))
    return {"rows": rows, "n_rows": len(number)}


def _carry_out(work: _Work, run: Run, processes: Processes) -> None:
    model, corpus = work.loaded.model, work.corpus
    reference = reference_of(model, corpus.sequences, work.batch_size) if work.kl else None
    baseline = measure(model, corpus.sequences, work.batch_size, "baseline" if processes.first else None)
    check_padding(model, corpus.sequences, baseline.losses, work.batch_size)
    perplexity = summarize(baseline.losses, corpus)
    if processes.first:
        tell_of_texts(run, corpus)
        write_baseline(run, work.loaded, corpus, perplexity)
        _warn_of_few_texts(run, corpus)
    if len({tuple(losses) for losses in processes.gather(baseline.losses.tolist())}) > 1:
        raise RunError("the processes do not agree on the baseline; do they run on different hardware?")

    finished = processes.once(lambda: _finished(run, perplexity, record_form(len(work.corpus.sequences))))
    own = share(work.units, processes.rank, processes.world)
    remaining = [unit for unit in own if not keys_of(unit) <= finished]
    remaining = choose_weights(work.plan, remaining, model, corpus)
    n_conditions = sum(len(keys_of(unit)) for unit in remaining)
    with Progress(n_conditions, "perturbations", processes.first) as progress:
        for outcome in sweep(model, corpus, remaining, baseline.losses, work.batch_size, reference):
            progress.at(outcome.condition.target.layer)
            if outcome.failure:
                note(f"error: {outcome.failure}; going on with the other targets")
            record = record_of(outcome, baseline, perplexity, corpus, work.loaded.metadata["id"])
            run.append(record, processes.rank)
            progress.update()
    processes.gather(len(remaining))  # waits until every process has finished its part
    if processes.first:
        _write_results(work, run, baseline)


def _warn_of_few_texts(run: Run, corpus: Corpus) -> None:
    n_clusters = len(by_cluster(np.array(corpus.lengths), corpus.clusters))
    if n_clusters < MIN_CLUSTERS:
        run.warn(f"{n_clusters} texts are too few for an interval (at least {MIN_CLUSTERS})")


def _finished(run: Run, perplexity: Perplexity, form: type[object]) -> set[str]:
    """The keys of the conditions that an earlier, killed run of the same request has measured."""
    records = run.records(form)
    if any(record["row"]["baseline_nll"] != perplexity.nll for record in records):
        raise RequestError(
            f"{run.folder} was begun where the arithmetic rounds otherwise (another device or number of threads); "
            "go on there, or choose another --experiment-id"
        )
    return {record["key"] for record in records}


def _write_results(work: _Work, run: Run, baseline: Measured) -> None:
    """Write the table of all conditions but those of failed targets.

    Raises:
        RunError: a target failed.
    """
    keys = {key for unit in work.units for key in keys_of(unit)}
    form = record_form(len(work.corpus.sequences))
    records = {record["key"]: record for record in run.records(form)}
    conditions = work.plan.conditions()
    ordered = [records[condition.key] for condition in conditions if condition.key in keys]
    failed = failures(ordered)
    kept = [
        record
        for record in ordered
        if record["row"]["target_layer"] not in failed or record["row"]["selection"] == layout.SINGLE_WEIGHT
    ]
    if kept:
        write_records(run, kept, baseline, work.corpus, comparisons=len(keys) == len(conditions))
    if failed:
        run.update(failed_targets=failed)
        message = "; ".join(failed.values())
        if kept:
            message += f" ({len(failed)} targets failed, the table has the others)"
        raise RunError(message)


def keys_of(unit: Unit) -> set[str]:
    """The keys of the conditions of a unit of work."""
    conditions = unit.conditions if isinstance(unit, Copies) else [unit]
    return {condition.key for condition in conditions}
