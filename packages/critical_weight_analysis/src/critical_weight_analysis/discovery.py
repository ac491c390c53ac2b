"""Global discovery: score every weight with every metric in one pass over a corpus, keep the exact top-K."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import pandas as pd
from bridge.exchange.errors import RequestError, RunError
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from critical_weight_analysis import hutchinson, whole_model
from critical_weight_analysis.control_lists import Controls
from critical_weight_analysis.layer_summary import Summary
from critical_weight_analysis.layerwise import engine
from critical_weight_analysis.layerwise.parallel import on_cores
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.layerwise.saved_state import nested
from critical_weight_analysis.metrics import FORMULAS, NEEDS, Sensitivity
from critical_weight_analysis.ranking import Ranking, top_indices
from critical_weight_analysis.sampling import N_HEAD, Sample

TOGETHER = 1 << 25  # weights of a parameter whose scores by several metrics may be in memory at the same time
BEFORE = frozenset({"hessian"})  # what no engine gives, because it is computed before the pass


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


def engine_for(model: PreTrainedModel, settings: Settings = Settings()) -> ModuleType:  # noqa: B008 - frozen
    """The module whose ``sensitivities`` measures this model: layer by layer where it can, else autograd's.

    Raises:
        RequestError: it can only be measured whole, and its weights are not to be held whole.
    """
    if engine.supports(model, settings):
        return engine
    if settings.checkpoint:
        raise RequestError(
            "this model cannot be run layer by layer, so all its weights must be in memory: --weights resident"
        )
    return whole_model


def needs_of(metrics: Sequence[str], engine: ModuleType, settings: Settings = Settings()) -> frozenset[str]:  # noqa: B008 - frozen
    """The fields of ``Sensitivity`` that the metrics need.

    Raises:
        RequestError: the engine does not give one of them, or not with these settings.
    """
    for metric in metrics:
        if "hessian" in NEEDS[metric] and settings.checkpoint:
            raise RequestError(f"--metric {metric} needs all weights in memory: --weights resident")
        if not NEEDS[metric] <= engine.GIVES | BEFORE:
            raise RequestError(f"--metric {metric} needs a model that can be run layer by layer, which this one cannot")
    return frozenset().union(*(NEEDS[metric] for metric in metrics))


def scores_of(metric: str, sensitivity: Sensitivity) -> Tensor:
    """The scores of one parameter, of its stored shape.

    Raises:
        RunError: a score is not finite; names the parameter.
    """
    scores = FORMULAS[metric](sensitivity)
    if not scores.amax().isfinite():  # no score is below 0, and amax passes NaN on
        n_bad = scores.numel() - int(scores.isfinite().sum())
        raise RunError(
            f"the score {metric} of {sensitivity.name} is not finite at {n_bad} of {scores.numel()} weights; "
            "try --dtype float32"
        )
    return scores


def discover(
    engine: ModuleType,
    model: PreTrainedModel,
    sequences: list[Tensor],
    parameters: dict[str, Parameter],
    metrics: list[str],
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
        engine: a module with ``sensitivities``, see ``engine_for``.
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
        by_metric = {"rankings": rankings, "summaries": summaries}
        settings.resume.attach(nested(by_metric) | {"controls": controls, "sample": sample})
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
