"""What is right: plain autograd, and plain zeroing of weights, in the dtype of the model.

Imports nothing of the tools.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Sums:
    """Sums over sequences of one parameter's gradients, each of the parameter's shape.

    Attributes:
        grad: (1/N) Σ_i dS_i/dθ.
        fisher: (1/n) Σ_i (dS_i/dθ / T_i)².
        curvature: (1/N) Σ_i (dS_i/dθ)².
    """

    grad: Tensor
    fisher: Tensor
    curvature: Tensor


def in_float64(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model as transformers loads it from its checkpoint to compute in float64, with the parameters that it has.

    Constants, such as the frequencies of rotary embeddings, are those of transformers in this dtype.
    """
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    twin.set_experts_implementation("eager")  # the grouped products of experts have no float64
    for name, parameter in model.named_parameters():
        twin.get_parameter(name).copy_(parameter)
    return twin


def loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """S of one sequence alone: the sum of -log p(x_t | x_<t) over its tokens but the first, in nats, float64."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()  # (T, V)
    return -logits.log_softmax(-1).gather(-1, ids[1:, None]).sum()


def losses(model: PreTrainedModel, sequences: list[Tensor]) -> Tensor:
    """S_i of every sequence, float64 (n,)."""
    with torch.no_grad():
        return torch.stack([loss(model, ids) for ids in sequences])


def sums(model: PreTrainedModel, sequences: list[Tensor]) -> dict[str, Sums]:
    """The sums of every parameter, by its first name."""
    parameters = dict(model.named_parameters())
    names, tensors = list(parameters), list(parameters.values())
    total = {name: [torch.zeros_like(tensor) for _ in range(3)] for name, tensor in parameters.items()}
    n, n_tokens = len(sequences), sum(len(ids) - 1 for ids in sequences)
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        for ids in sequences:
            gradients = torch.autograd.grad(loss(model, ids), tensors, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    grad, fisher, curvature = total[name]
                    grad += gradient / n_tokens
                    fisher += (gradient / (len(ids) - 1)) ** 2 / n
                    curvature += gradient**2 / n_tokens
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)
    return {name: Sums(*three) for name, three in total.items()}


def losses_without(model: PreTrainedModel, name: str, index: list[int], sequences: list[Tensor]) -> Tensor:
    """S_i of every sequence while the weights of a parameter at the flat ``index`` are 0."""
    flat = model.get_parameter(name).data.view(-1)
    before = flat[index].clone()
    flat[index] = 0
    try:
        return losses(model, sequences)
    finally:
        flat[index] = before
