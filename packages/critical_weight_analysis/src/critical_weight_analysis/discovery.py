"""Global discovery: score every weight with every metric in one pass over a corpus, keep the exact top-K."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import pandas as pd
from bridge.exchange.errors import RequestError, RunError
from llm_perturb.evaluation.checkpoint import Checkpoint
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from critical_weight_analysis import hutchinson
from critical_weight_analysis.control_lists import Controls
from critical_weight_analysis.highest_scores import top_indices
from critical_weight_analysis.layer_summary import Summary
from critical_weight_analysis.layerwise.autograd_check import FIELDS, ProofError, prove
from critical_weight_analysis.layerwise.autograd_reference import by_autograd
from critical_weight_analysis.layerwise.engine import LayerwiseEngine
from critical_weight_analysis.layerwise.parallel import on_cores
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.layerwise.probe import Refusal, probe
from critical_weight_analysis.layerwise.saved_state import Collector, nested
from critical_weight_analysis.metrics import METRICS, Sensitivity
from critical_weight_analysis.ranking import Ranking
from critical_weight_analysis.sampling import N_HEAD, Sample
from critical_weight_analysis.whole_model import WholeModelEngine

LAYERWISE, WHOLE_MODEL = LayerwiseEngine.name, WholeModelEngine.name

TOGETHER = 1 << 25  # weights of a parameter whose scores by several metrics may be in memory at the same time
BEFORE = frozenset({"hessian"})  # what no engine gives, because it is computed before the pass
_log = logging.getLogger("critical_weight_analysis")


@dataclass(frozen=True)
class Discovery:
    """What one pass leaves.

    Attributes:
        losses: of every sequence, float64 (n,).
        rankings: by metric.
        summaries: by metric.
        controls: random weights and those of the lowest scores.
        sampled: a few weights of every parameter with the scores of all metrics, as rows of SAMPLED_WEIGHTS.
    """

    losses: Tensor
    rankings: dict[str, Ranking]
    summaries: dict[str, Summary]
    controls: Controls
    sampled: pd.DataFrame


class Engine(Protocol):
    """Measures the sensitivity of a model's loss to its parameters."""

    @property
    def name(self) -> str:
        """``LAYERWISE`` or ``WHOLE_MODEL``."""

    @property
    def account(self) -> str:
        """Why the model is measured this way, in one line."""

    @property
    def together(self) -> bool:
        """Whether sequences may be run as a batch."""

    @property
    def gives(self) -> frozenset[str]:
        """The fields of ``Sensitivity`` that it can fill."""

    def sensitivities(
        self,
        model: PreTrainedModel,
        sequences: list[Tensor],
        names: Sequence[str],
        needs: frozenset[str],
        settings: Settings = ...,
    ) -> tuple[Tensor, Iterator[Sensitivity]]:
        """The loss S_i of every sequence, float64 (n,), and what is needed of every parameter named."""


def engine_for(
    model: PreTrainedModel,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    names: Sequence[str] | None = None,
    needs: frozenset[str] = FIELDS,
) -> Engine:
    """How to measure a model: layer by layer where that is proved to give what autograd gives, else as a whole.

    Args:
        model: a causal language model in eval mode.
        settings: where its weights are, and which processes must come to the same decision.
        names: the parameters to be measured; all if left out.
        needs: what is needed of them.

    Raises:
        RequestError: the model is not causal, or can only be measured whole and its weights are not to be held whole.
    """
    begun = time.monotonic()
    names = list(dict(model.named_parameters())) if names is None else names
    engine = _engine(model, settings.checkpoint, names, needs - BEFORE, begun)
    if settings.processes:
        engine = _agreed(engine, settings.processes.gather((engine.name, engine.together, engine.account)))
    if settings.checkpoint and engine.name == WHOLE_MODEL:
        raise RequestError(
            f"all weights of this model must be in memory, --weights resident: it is run {engine.account}"
        )
    return engine


def _engine(
    model: PreTrainedModel, checkpoint: Checkpoint | None, names: Sequence[str], needs: frozenset[str], begun: float
) -> LayerwiseEngine | WholeModelEngine:
    structure = probe(model, checkpoint)
    if isinstance(structure, Refusal):
        _log.info("the model is not run layer by layer: %s", structure.reason)
        if not checkpoint:
            by_autograd(model, names, needs)  # what it refuses cannot be measured as a whole either
        return _whole(structure.reason)
    expected = by_autograd(model, names, needs, structure, checkpoint)
    try:
        proof = prove(model, structure, expected, checkpoint)
    except ProofError as error:
        return _whole(str(error))
    account = proof.account(time.monotonic() - begun)
    return LayerwiseEngine(structure=structure, account=account, together=proof.together)


def _whole(reason: str) -> WholeModelEngine:
    return WholeModelEngine(f"as a whole, because layer by layer is not possible: {reason}")


def _agreed(
    engine: LayerwiseEngine | WholeModelEngine, decisions: list[tuple[str, bool, str]]
) -> LayerwiseEngine | WholeModelEngine:
    """What every process can do: as a whole if one must, one sequence at a time if one must."""
    name, together, account = max(decisions, key=lambda decision: (decision[0] == WHOLE_MODEL, not decision[1]))
    if name == WHOLE_MODEL:
        return WholeModelEngine(account=account, together=together)
    return replace(engine, account=account, together=together)


def needs_of(metrics: Sequence[str], engine: Engine, settings: Settings = Settings()) -> frozenset[str]:  # noqa: B008 - frozen
    """The fields of ``Sensitivity`` that the metrics need.

    Raises:
        RequestError: the engine does not give one of them, or not with these settings.
    """
    for metric in metrics:
        if "hessian" in METRICS[metric].needs and settings.checkpoint:
            raise RequestError(f"--metric {metric} needs all weights in memory: --weights resident")
        if not METRICS[metric].needs <= engine.gives | BEFORE:
            raise RequestError(
                f"--metric {metric} needs a model that is run layer by layer, and this one is run {engine.account}"
            )
    return frozenset().union(*(METRICS[metric].needs for metric in metrics))


def scores_of(metric: str, sensitivity: Sensitivity) -> Tensor:
    """The scores of one parameter, of its stored shape.

    Raises:
        RunError: a score is not finite; names the parameter.
    """
    scores = METRICS[metric].score(sensitivity)
    if not scores.amax().isfinite():  # no score is below 0, and amax passes NaN on
        n_bad = scores.numel() - int(scores.isfinite().sum())
        raise RunError(
            f"the score {metric} of {sensitivity.name} is not finite at {n_bad} of {scores.numel()} weights; "
            "try --dtype float32"
        )
    return scores


def discover(
    engine: Engine,
    model: PreTrainedModel,
    sequences: list[Tensor],
    parameters: dict[str, Parameter],
    metrics: Sequence[str],
    k: int,
    *,
    per_layer: bool = True,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    on_losses: Callable[[Tensor], None] = lambda losses: None,
    seed: int = 0,
    hutchinson_probes: int = 10,
) -> Discovery:
    """Score every weight of the parameters. The scores of one parameter exist at a time.

    For `hutchinson_diag` the diagonal of the Hessian of all parameters is computed first, and kept during the pass.

    Args:
        engine: from ``engine_for``.
        model: the model that the parameters belong to.
        sequences: each (T_i + 1,) ids.
        parameters: by name, in model order.
        metrics: names of formulas.
        k: the largest K that the rankings will be asked for.
        per_layer: whether to rank within each parameter as well.
        settings: how it is done.
        on_losses: called with the losses before anything that takes long; may raise to stop.
        seed: of the random control list and of the signs of `hutchinson_diag`.
        hutchinson_probes: how many vectors of signs `hutchinson_diag` averages.

    Raises:
        RunError: a loss or a score is not finite.
    """
    needs = needs_of(metrics, engine, settings)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    rankings = {metric: Ranking(shapes, k, per_layer) for metric in metrics}
    summaries = {metric: Summary(list(shapes)) for metric in metrics}
    controls, sample = Controls(shapes, metrics, k, seed), Sample(shapes, metrics)
    if settings.resume:
        by_metric: dict[str, Mapping[str, Collector]] = {"rankings": rankings, "summaries": summaries}
        others: dict[str, Collector] = {"controls": controls, "sample": sample}
        settings.resume.attach(nested(by_metric) | others)
    hessian = {}
    if needs & BEFORE:
        on_losses(engine.sensitivities(model, sequences, [], frozenset(), settings)[0])  # before the long part
        hessian = hutchinson.hessian_diagonal(model, sequences, list(parameters), hutchinson_probes, seed, settings)
    losses, stream = engine.sensitivities(model, sequences, list(parameters), needs - BEFORE, settings)
    if not hessian:
        on_losses(losses)
    for sensitivity in _with_hessian(stream, hessian) if hessian else stream:

        def score(metric: str, sensitivity: Sensitivity = sensitivity) -> Tensor:
            scores = scores_of(metric, sensitivity)
            best = top_indices(scores, max(k, N_HEAD))
            rankings[metric].update(sensitivity.name, sensitivity.weight, scores, best[:k])
            summaries[metric].update(sensitivity.name, scores)
            controls.update(metric, sensitivity, scores)
            return best[:N_HEAD]

        together = sensitivity.weight.numel() <= TOGETHER
        highest = on_cores(sensitivity.weight.device, score, metrics) if together else map(score, metrics)
        sample.update(sensitivity, list(highest))
        del sensitivity, score  # before the next layer is computed
    return Discovery(losses, rankings, summaries, controls, sample.table())


def _with_hessian(stream: Iterator[Sensitivity], hessian: dict[str, Tensor]) -> Iterator[Sensitivity]:
    """Each parameter with its part of the diagonal, which is kept no longer than that."""
    for sensitivity in stream:
        yield replace(sensitivity, hessian=hessian.pop(sensitivity.name))
