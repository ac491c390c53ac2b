"""Phase 1 as a command: check the request, discover, write the run folder."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import find_executable_batch_size
from bridge.exchange import run_folder
from bridge.exchange.errors import RequestError
from bridge.exchange.layout import ANALYSIS_LOG, BASELINE_FILE, DISCOVERY, PLOTS_FOLDER
from bridge.exchange.run_folder import RunOptions
from bridge.exchange.tables import write_json
from llm_perturb.evaluation import models
from llm_perturb.evaluation.corpus import Corpus, CorpusOptions, read_texts, tokenize
from llm_perturb.evaluation.fingerprint import check_agreement
from llm_perturb.evaluation.models import LoadedModel, ModelOptions
from llm_perturb.evaluation.parameters import in_scope
from llm_perturb.evaluation.processes import Processes
from llm_perturb.evaluation.unigram import baseline_warnings
from torch import Tensor
from torch.nn import Parameter

from critical_weight_analysis import baseline, result_files, stability
from critical_weight_analysis.discovery import Discovery, Engine, discover, engine_for
from critical_weight_analysis.layerwise.backward_checkpoints import Resume
from critical_weight_analysis.layerwise.batches import first_batch_size
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.metrics import METRICS

Metric = Literal[*METRICS]
Scope = Literal["matrices", "all"]
Weights = models.Weights
Mode = Literal["global", "per_layer"]

_NOT_IDENTITY = {"batch_size", "weights", "device", "output", "baseline", "experiment_id", "save_plots"}
_log = logging.getLogger("critical_weight_analysis")


@dataclass(frozen=True, kw_only=True)
class DiscoveryOptions:
    """What is scored, and how.

    Attributes:
        metric: what the weights are scored by.
        topk: how many weights a ranking keeps; several in one pass.
        batch_size: sequences at a time; found automatically if left out. Changes no number beyond rounding.
        scope: matrices, every parameter of two or more dimensions; all, biases and norms too.
        include: name patterns such as '*.mlp.*'; only parameters that match one.
        exclude: name patterns; no parameter that matches one.
        mode: global, the top-K of all weights; per_layer, of each parameter.
        baseline: a baseline.json of run_baseline.py; stop if this run's setup, weights or loss are others.
        seed: of the random control list, the halves of --stability and the signs of hutchinson_diag.
        stability: how many times to discover two random halves of the corpus and compare; one more pass each.
        hutchinson_probes: of hutchinson_diag; each costs two to three backward passes over the corpus.
        save_plots: whether to draw the plots.
        weights: resident, in memory; streamed, read from the checkpoint one layer at a time; auto, by their size.
    """

    metric: list[Metric] = field(default_factory=lambda: ["grad_x_weight"])
    topk: list[int] = field(default_factory=lambda: [100])
    batch_size: int | None = None
    scope: Scope = "matrices"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    mode: list[Mode] = field(default_factory=lambda: ["global", "per_layer"])
    baseline: str | None = None
    seed: int = 0
    stability: int = 0
    hutchinson_probes: int = 10
    save_plots: bool = True
    weights: Weights = "auto"


@dataclass(frozen=True, kw_only=True)
class Options(DiscoveryOptions, ModelOptions, CorpusOptions, RunOptions):
    """All flags of a discovery."""

    def checked(self) -> "Options":
        """The same, lists without repetitions, the K ascending, the paths of texts independent of the current folder.

        Raises:
            RequestError: a number is out of range.
        """
        counts = {"--batch-size": self.batch_size, "--hutchinson-probes": self.hutchinson_probes}
        counts = {flag: [number] for flag, number in counts.items() if number is not None}
        for flag, numbers in {"--topk": self.topk, **counts}.items():
            if min(numbers) < 1:
                raise RequestError(f"{flag} must be at least 1, not {min(numbers)}")
        for flag, number in {"--stability": self.stability, "--seed": self.seed}.items():
            if number < 0:
                raise RequestError(f"{flag} must be at least 0, not {number}")
        if self.stability and "hutchinson_diag" in self.metric:
            raise RequestError(
                "--stability repeats the pass over the corpus, of which --metric hutchinson_diag is no part; "
                "leave one of the two out"
            )
        lists = ("metric", "mode", "include", "exclude", "allow_unused_weights")
        unique = {name: list(dict.fromkeys(getattr(self, name))) for name in lists}
        paths = {"data_file": self.data_file and str(Path(self.data_file).absolute())}
        if self.dataset and Path(self.dataset).exists():
            paths["dataset"] = str(Path(self.dataset).absolute())
        return replace(self, topk=sorted(set(self.topk)), **unique, **paths)

    def corpus(self) -> CorpusOptions:
        """Those that choose the corpus."""
        return CorpusOptions(**{each.name: getattr(self, each.name) for each in fields(CorpusOptions)})

    def identity(self) -> dict:
        """Those that the numbers depend on."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_IDENTITY}


@dataclass(frozen=True)
class Request:
    """Options that were found to be possible, and what they mean."""

    options: Options
    output: Path
    loaded: LoadedModel
    corpus: Corpus
    parameters: dict[str, Parameter]
    expected: dict | None  # the baseline that --baseline names

    @property
    def n_weights(self) -> int:
        """Scalar weights in scope."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def run(options: Options) -> None:
    """Carry out phase 1, and say where its files are.

    Raises:
        RequestError: the options cannot be carried out; all but a different baseline loss is found beforehand.
        RunError: a loss or a score is not finite.
    """
    processes = Processes(options.device)
    request = prepare(options.checked())
    loaded, expected = request.loaded, request.expected
    settings = Settings(progress=processes.first, checkpoint=loaded.checkpoint, processes=processes)
    needs = frozenset().union(*(METRICS[metric].needs for metric in request.options.metric))
    # the proof of the engine reads all streamed weights, so that the fingerprint reads none again
    engine = engine_for(loaded.model, settings, list(request.parameters), needs)
    check_agreement(loaded.fingerprint, processes)
    warnings = baseline.check_model(expected, loaded, request.options.baseline) if expected else []
    opened: run_folder.Run | None = None

    def begin() -> str:
        nonlocal opened
        opened = _open_run(request, engine.name, processes.world)
        for warning in warnings:
            opened.warn(warning)
        return str(opened.folder)

    folder = Path(processes.once(begin))
    with _kept(opened):
        _log.info("%s, %s", loaded.metadata["id"], loaded.metadata["dtype"])
        _log.info("%d weights of %d parameters in scope", request.n_weights, len(request.parameters))
        _log.info("%s", request.corpus.summary)
        _warn(request.corpus.warnings, opened)
        _log.info("%s", engine.account)
        found, settings = _discover(engine, request, replace(settings, scratch=folder), opened)
        tops = {m: {k: ranking.top(k) for k in request.options.topk} for m, ranking in found.rankings.items()}
        splits = list(_halves(engine, request, settings))
        if opened:
            result_files.write_tables(found, tops, request.options.mode, folder)
            if request.options.save_plots:
                result_files.write_plots(found, tops, folder / PLOTS_FOLDER)
            if splits:
                agreement = stability.table(found.rankings, splits, request.options.topk, request.n_weights)
                result_files.write_stability(agreement, folder, request.options.save_plots)
            result_files.show(folder, tops)
        settings.resume.clear()
    processes.close()


def _discover(engine: Engine, request: Request, settings: Settings, opened: run_folder.Run | None) -> tuple:
    """The pass, with as many sequences at a time as was asked for, or as fit; what it found, and its settings."""
    options, device = request.options, request.loaded.model.device
    used = []

    def with_batch_size(batch_size: int) -> Discovery:
        identity = {"engine": engine.name, "batch_size": batch_size, "world": settings.processes.world}
        resume = Resume(settings.scratch, identity, settings.processes, warn=opened.warn if opened else _log.warning)
        used[:] = [replace(settings, batch_size=batch_size, resume=resume)]
        return discover(
            engine,
            request.loaded.model,
            request.corpus.sequences,
            request.parameters,
            options.metric,
            options.topk[-1],
            per_layer="per_layer" in options.mode,
            settings=used[0],
            on_losses=lambda losses: _check_baseline(request, losses, opened),
            seed=options.seed,
            hutchinson_probes=options.hutchinson_probes,
        )

    if options.batch_size or not engine.together:
        found = with_batch_size(options.batch_size if engine.together else 1)
    else:
        first = first_batch_size(request.corpus.sequences, device)
        found = find_executable_batch_size(with_batch_size, starting_batch_size=first)()
    _log.info("%d sequences at a time", used[0].batch_size)
    if opened:
        opened.update(batch_size=used[0].batch_size)
    return found, used[0]


def prepare(options: Options) -> Request:
    """Load and check everything that the options name; cheap checks come before the model.

    Raises:
        RequestError: something is missing, impossible, or not as the baseline says.
    """
    output = run_folder.check_output(options.output)
    expected = baseline.read(options.baseline) if options.baseline else None
    texts = read_texts(options.corpus())
    torch.manual_seed(options.seed)
    loaded = models.load(
        options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        attn_implementation=options.attn_implementation,
        weights=options.weights,
        allow_unused_weights=options.allow_unused_weights,
    )
    corpus = tokenize(texts, loaded.tokenizer, options.corpus(), loaded.max_positions)
    parameters = in_scope(loaded.model, options.scope, options.include, options.exclude)
    request = Request(options, output, loaded, corpus, parameters, expected)
    if options.topk[-1] > request.n_weights:
        raise RequestError(f"--topk {options.topk[-1]} is more than the {request.n_weights} weights in scope")
    if options.stability and len(corpus.sequences) < stability.MIN_SEQUENCES:
        raise RequestError(
            f"--stability needs at least {stability.MIN_SEQUENCES} sequences to halve, the corpus has "
            f"{len(corpus.sequences)}"
        )
    if expected:
        baseline.check_same(expected, baseline.setup(loaded, corpus), options.baseline)
    return request


def _open_run(request: Request, engine: str, world_size: int) -> run_folder.Run:
    options, loaded, corpus = request.options, request.loaded, request.corpus
    identity = {
        "options": options.identity() | {"model": loaded.metadata["id"]},
        "model": loaded.metadata,
        "corpus": corpus.metadata,
    }
    facts = {
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
    return run_folder.open_run(request.output, DISCOVERY, identity, options.experiment_id, facts, loaded.fingerprint)


@contextmanager
def _kept(opened: run_folder.Run | None) -> Iterator[None]:
    """While open, the run is recorded and its log written, by the process that has opened it."""
    if opened is None:
        yield
        return
    with opened.recorded(), _logged(opened.folder):
        yield


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """While open, the log goes to ``analysis.log``."""
    handler = logging.FileHandler(folder / ANALYSIS_LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
        _log.info("complete")
    except BaseException as error:
        _log.error("failed: %s: %s", type(error).__name__, error)
        raise
    finally:
        _log.removeHandler(handler)
        handler.close()


def _check_baseline(request: Request, losses: Tensor, opened: run_folder.Run | None) -> None:
    found = baseline.measured(request.loaded, request.corpus, losses)
    _log.info("baseline: %(nll).6f nats per token, perplexity %(ppl).6g", found)
    if request.expected:
        baseline.check_same(request.expected, found, request.options.baseline)
    vocabulary = request.loaded.model.config.get_text_config().vocab_size
    _warn(baseline_warnings(request.corpus, found["nll"], vocabulary), opened)
    if opened:
        write_json(opened.folder / BASELINE_FILE, found)


def _warn(warnings: Sequence[str], opened: run_folder.Run | None) -> None:
    """Warn in the log, and, by the process that has opened the run, on stderr and in the manifest."""
    for warning in warnings:
        _log.warning("%s", warning)
        if opened:
            opened.warn(warning)


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
