"""The scores of a target's weights, by plain autograd on the target's own tensors.

They share no code with the discovery whose ranking they may be compared with: a ranking must not be checked
against itself.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from bridge.exchange.errors import RunError
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.lm_loss import exact_nats
from llm_perturb.evaluation.progress import over

Metric = Literal["grad_x_weight", "grad_squared", "obd", "taylor2", "magnitude"]


def target_scores(
    model: PreTrainedModel, corpus: Corpus, parameters: dict[str, Parameter], metrics: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """The scores of all weights of some parameters: metric -> name -> float tensor of the stored shape.

    One sequence at a time: grad_x_weight |θ dL/dθ|, grad_squared (1/n) Σ_i (dL_i/dθ)², obd ½θ²h and taylor2
    |-θ dL/dθ + ½θ²h| with h = (1/N) Σ_i (dS_i/dθ)², magnitude |θ|.

    Raises:
        RunError: a score is not finite; names the parameter.
    """
    weights = {name: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()}
    if set(metrics) == {"magnitude"}:  # no pass over the corpus
        return {"magnitude": {name: _finite("magnitude", name, weight.abs()) for name, weight in weights.items()}}
    grad = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}  # Σ (dL_i/dθ)²
    square_sum = {name: torch.zeros_like(weight) for name, weight in weights.items()}  # Σ (dS_i/dθ)²
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for sequence in over(corpus.sequences, "gradient of the targets"):
            _sequence_loss(model, sequence).backward()
            for name, parameter in parameters.items():
                assert parameter.grad is not None, name
                gradient = parameter.grad.to(grad[name].dtype)
                parameter.grad = None
                grad[name] += gradient
                square[name].addcmul_(gradient, gradient, value=1 / (len(sequence) - 1) ** 2)
                square_sum[name].addcmul_(gradient, gradient)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    n, N = len(corpus.sequences), corpus.n_tokens
    scores: dict[str, dict[str, Tensor]] = {metric: {} for metric in metrics}
    for name, weight in weights.items():
        first = weight * grad[name] / N  # θ dL/dθ
        second = 0.5 * weight**2 * square_sum[name] / N  # ½θ²h
        for metric in metrics:
            match metric:
                case "grad_x_weight":
                    score = first.abs()
                case "grad_squared":
                    score = square[name] / n
                case "obd":
                    score = second
                case "taylor2":
                    score = (second - first).abs()
                case _:
                    assert metric == "magnitude", metric
                    score = weight.abs()
            scores[metric][name] = _finite(metric, name, score)
    return scores


def _finite(metric: str, name: str, scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise RunError(f"the score {metric} of {name} is not finite; try --dtype float32")
    return scores


def _sequence_loss(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    ids = sequence.to(model.device)
    (logits,) = model(input_ids=ids[None], use_cache=False).logits  # (T, V)
    return exact_nats(logits[:-1], ids[1:]).sum()
