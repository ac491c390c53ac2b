"""The sensitivity metrics: pure formulas from the sums that one pass over a corpus leaves behind.

A score is defined for every scalar weight θ_j; higher means more critical. N is the number of predicted
tokens of the corpus, n its number of sequences, L the mean loss over all tokens (nats per token), L_i the
mean and S_i the sum of the losses of sequence i.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sensitivity:
    """What the metrics need to know of one parameter. Every tensor has the parameter's stored shape.

    All sums are float32 or wider. A field that no chosen metric needs (see ``NEEDS``) is None.

    Attributes:
        name: the parameter's full name.
        weight: θ, as stored.
        grad: dL/dθ.
        fisher: (1/n) Σ_i (dL_i/dθ)², the diagonal of the empirical Fisher over sequences.
        curvature: h = (1/N) Σ_i (dS_i/dθ)², the per-token empirical Fisher in place of the Hessian diagonal.
    """

    name: str
    weight: Tensor
    grad: Tensor | None = None
    fisher: Tensor | None = None
    curvature: Tensor | None = None


NEEDS: dict[str, frozenset[str]] = {
    "grad_x_weight": frozenset({"grad"}),
    "grad_squared": frozenset({"fisher"}),
    "obd": frozenset({"curvature"}),
    "taylor2": frozenset({"grad", "curvature"}),
    "magnitude": frozenset(),
}


def grad_x_weight(sensitivity: Sensitivity) -> Tensor:
    """|θ dL/dθ|: first-order estimate of the change of L when θ is set to 0 (nats per token).

    Mozer & Smolensky 1989; Molchanov et al. 2019.
    """
    return (sensitivity.grad * sensitivity.weight.to(sensitivity.grad.dtype)).abs()


def grad_squared(sensitivity: Sensitivity) -> Tensor:
    """(1/n) Σ_i (dL_i/dθ)²: the diagonal of the empirical Fisher over sequences (SqueezeLLM, Kim et al. 2024)."""
    return sensitivity.fisher


def obd(sensitivity: Sensitivity) -> Tensor:
    """½ θ² h: second-order estimate of the change of L when θ is set to 0 (nats per token).

    Optimal Brain Damage, LeCun et al. 1990, with the empirical Fisher as h.
    """
    return 0.5 * sensitivity.weight.to(sensitivity.curvature.dtype).square() * sensitivity.curvature


def taylor2(sensitivity: Sensitivity) -> Tensor:
    """|-θ dL/dθ + ½ θ² h|: both terms of the Taylor series (nats per token)."""
    weight = sensitivity.weight.to(sensitivity.grad.dtype)
    return (-weight * sensitivity.grad + 0.5 * weight.square() * sensitivity.curvature).abs()


def magnitude(sensitivity: Sensitivity) -> Tensor:
    """|θ|: the baseline that a metric must beat."""
    return sensitivity.weight.to(torch.promote_types(sensitivity.weight.dtype, torch.float32)).abs()


FORMULAS = {
    "grad_x_weight": grad_x_weight,
    "grad_squared": grad_squared,
    "obd": obd,
    "taylor2": taylor2,
    "magnitude": magnitude,
}
