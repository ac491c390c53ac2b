"""Phase 1 as a command: check the request, discover, write the run folder."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from accelerate.utils import find_executable_batch_size
from bridge.exchange import run_folder
from bridge.exchange.atomic_file import write_json
from bridge.exchange.layout import BASELINE_FILE, DISCOVERY, PLOTS_FOLDER
from llm_perturb.evaluation.fingerprint import check_agreement
from llm_perturb.evaluation.processes import Processes
from llm_perturb.evaluation.unigram import baseline_warnings
from torch import Tensor

from critical_weight_analysis import baseline, result_files, stability
from critical_weight_analysis.discovery import Discovery, Engine, discover, engine_for
from critical_weight_analysis.discovery_options import Options
from critical_weight_analysis.discovery_request import Request, prepare
from critical_weight_analysis.layerwise.backward_checkpoints import Resume
from critical_weight_analysis.layerwise.batches import first_batch_size
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.metrics import METRICS
from critical_weight_analysis.run_log import recorded, warn

_log = logging.getLogger("critical_weight_analysis")


def run(options: Options) -> None:
    """Carry out phase 1, and say where its files are.

    Raises:
        RequestError: the options cannot be carried out; all but a different baseline loss is found beforehand.
        RunError: a loss or a score is not finite.
    """
    processes = Processes(options.device)
    request = prepare(options.checked())
    loaded, required = request.loaded, request.baseline
    settings = Settings(progress=processes.first, checkpoint=loaded.checkpoint, processes=processes)
    needs = frozenset().union(*(METRICS[metric].needs for metric in request.options.metric))
    # the proof of the engine reads all streamed weights, so that the fingerprint reads none again
    engine = engine_for(loaded.model, settings, list(request.parameters), needs)
    check_agreement(loaded.fingerprint, processes)
    warnings = baseline.check_model(required.content, loaded, required.path) if required else []
    runs: list[run_folder.Run] = []  # one in the process that opens the folder, none in the others

    def begin() -> str:
        runs.append(_open_run(request, engine.name, processes.world))
        for warning in warnings:
            runs[0].warn(warning)
        return str(runs[0].folder)

    folder = Path(processes.once(begin))
    opened = runs[0] if runs else None
    settings = replace(settings, scratch=folder)
    with recorded(opened):
        _log.info("%s, %s", loaded.metadata["id"], loaded.metadata["dtype"])
        _log.info("%d weights of %d parameters in scope", request.n_weights, len(request.parameters))
        _log.info("%s", request.corpus.summary)
        warn(request.corpus.warnings, opened)
        _log.info("%s", engine.account)
        discovery, settings = _discover(engine, request, settings, processes, opened)
        tops = {m: {k: ranking.top(k) for k in request.options.topk} for m, ranking in discovery.rankings.items()}
        splits = list(_halves(engine, request, settings))
        if opened:
            result_files.write_tables(discovery, tops, request.options.mode, folder)
            if request.options.save_plots:
                result_files.write_plots(discovery, tops, folder / PLOTS_FOLDER)
            if splits:
                agreement = stability.table(discovery.rankings, splits, request.options.topk, request.n_weights)
                result_files.write_stability(agreement, folder, request.options.save_plots)
            result_files.show(folder, tops)
        if settings.resume:
            settings.resume.clear()
    processes.close()


def _discover(
    engine: Engine, request: Request, settings: Settings, processes: Processes, opened: run_folder.Run | None
) -> tuple[Discovery, Settings]:
    """The pass, with as many sequences at a time as was asked for, or as fit; and the settings that it ended with."""
    options, device = request.options, request.loaded.model.device
    folder = settings.scratch
    assert folder is not None, "the run folder is open"
    used = settings

    def with_batch_size(batch_size: int) -> Discovery:
        nonlocal used
        identity = {"engine": engine.name, "batch_size": batch_size, "world": processes.world}
        resume = Resume(folder, identity, processes, warn=opened.warn if opened else _log.warning)
        used = replace(settings, batch_size=batch_size, resume=resume)
        return discover(
            engine,
            request.loaded.model,
            request.corpus.sequences,
            request.parameters,
            options.metric,
            options.topk[-1],
            per_layer="per_layer" in options.mode,
            settings=used,
            on_losses=lambda losses: _check_baseline(request, losses, opened),
            seed=options.seed,
            hutchinson_probes=options.hutchinson_probes,
        )

    if not engine.together:
        discovery = with_batch_size(1)
    elif options.batch_size:
        discovery = with_batch_size(options.batch_size)
    else:
        first = first_batch_size(request.corpus.sequences, device)
        discovery = find_executable_batch_size(with_batch_size, starting_batch_size=first)()
    _log.info("%d sequences at a time", used.batch_size)
    if opened:
        opened.update(batch_size=used.batch_size)
    return discovery, used


def _open_run(request: Request, engine: str, world_size: int) -> run_folder.Run:
    options, loaded, corpus = request.options, request.loaded, request.corpus
    identity = {
        "options": options.identity() | {"model": loaded.metadata["id"]},
        "model": loaded.metadata,
        "corpus": corpus.metadata,
    }
    details = {
        "options": asdict(options),
        "engine": engine,
        "n_weights_in_scope": request.n_weights,
        "batch_size": options.batch_size,
        "device": str(loaded.model.device),
        "world_size": world_size,
        "weights": "streamed" if loaded.checkpoint else "resident",
        "seed": options.seed,
        "metrics": {metric: METRICS[metric].definition() for metric in options.metric},
    }
    return run_folder.open_run(request.output, DISCOVERY, identity, options.experiment_id, details, loaded.fingerprint)


def _check_baseline(request: Request, losses: Tensor, opened: run_folder.Run | None) -> None:
    measured = baseline.measured(request.loaded, request.corpus, losses)
    _log.info("baseline: %(nll).6f nats per token, perplexity %(ppl).6g", measured)
    if request.baseline:
        request.baseline.check(measured)
    vocabulary = request.loaded.model.config.get_text_config().vocab_size
    warn(baseline_warnings(request.corpus, measured["nll"], vocabulary), opened)
    if opened:
        write_json(opened.folder / BASELINE_FILE, measured)


def _halves(engine: Engine, request: Request, settings: Settings) -> Iterator[stability.Halves]:
    options, n = request.options, request.options.stability
    if n:
        _log.info("stability: %d times two halves of the corpus, which costs %d more passes over it", n, n)
    return stability.discover_halves(
        engine,
        request.loaded.model,
        request.corpus.sequences,
        request.parameters,
        options.metric,
        options.topk[-1],
        n,
        seed=options.seed,
        settings=replace(settings, resume=None),
    )
