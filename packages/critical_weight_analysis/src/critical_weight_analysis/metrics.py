"""The sensitivity metrics: pure formulas from the sums that one pass over a corpus leaves behind.

A score is defined for every scalar weight θ_j; higher means more critical. N is the number of predicted
tokens of the corpus, n its number of sequences, L the mean loss over all tokens (nats per token), L_i the
mean and S_i the sum of the losses of sequence i.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sensitivity:
    """What the metrics need to know of one parameter. Every tensor has the parameter's stored shape.

    All sums are float32 or wider. A field that no chosen metric needs (``Metric.needs``) is None.

    Attributes:
        name: the parameter's full name.
        weight: θ, as stored.
        grad: dL/dθ.
        fisher: (1/n) Σ_i (dL_i/dθ)², the diagonal of the empirical Fisher over sequences.
        curvature: h = (1/N) Σ_i (dS_i/dθ)², the per-token empirical Fisher in place of the Hessian diagonal.
        tokens: (1/N) Σ_i Σ_t G_it², G_it what position t of sequence i contributes to dS_i/dθ.
        inputs: Σ_i Σ_t x_it² of the input feature x that θ is multiplied with.
        hessian: an estimate of d²L/dθ².
    """

    name: str
    weight: Tensor
    grad: Tensor | None = None
    fisher: Tensor | None = None
    curvature: Tensor | None = None
    tokens: Tensor | None = None
    inputs: Tensor | None = None
    hessian: Tensor | None = None


Formula = Callable[[Sensitivity], Tensor]


def _computed(field: Tensor | None) -> Tensor:
    """A field of ``Sensitivity`` that the metric says it needs."""
    assert field is not None, "a formula reads a field that is not among its metric's needs"
    return field


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A sensitivity metric: the one place that says what it is.

    Attributes:
        name: as ``--metric`` takes it.
        score: the formula; from the sums of one parameter to scores of its stored shape.
        needs: the fields of ``Sensitivity`` that the formula reads.
        formula: for readers of the report.
        unit: of a score.
        source: who proposed it.
        baseline: whether it is the one that every other must beat.
    """

    name: str
    score: Formula
    needs: frozenset[str]
    formula: str
    unit: str
    source: str
    baseline: bool

    def definition(self) -> dict[str, str | bool]:
        """What a manifest says of it, for whoever reads the scores."""
        return {"formula": self.formula, "unit": self.unit, "source": self.source, "baseline": self.baseline}


METRICS: dict[str, Metric] = {}


def metric(
    *needs: str, formula: str, unit: str = "", source: str = "", baseline: bool = False
) -> Callable[[Formula], Formula]:
    """Declare a formula as the metric of its own name."""

    def declare(score: Formula) -> Formula:
        name = score.__name__
        METRICS[name] = Metric(
            name=name,
            score=score,
            needs=frozenset(needs),
            formula=formula,
            unit=unit,
            source=source,
            baseline=baseline,
        )
        return score

    return declare


@metric(
    "grad",
    formula="|θ · ∂L/∂θ|: first-order estimate of the change of loss at θ = 0",
    unit="nats per token",
    source="Molchanov et al. 2019",
)
def grad_x_weight(sensitivity: Sensitivity) -> Tensor:
    """|θ dL/dθ|: first-order estimate of the change of L when θ is set to 0 (nats per token).

    Mozer & Smolensky 1989; Molchanov et al. 2019.
    """
    grad = _computed(sensitivity.grad)
    return (grad * sensitivity.weight.to(grad.dtype)).abs_()


@metric(
    "fisher",
    formula="mean over sequences of (∂L_i/∂θ)²: diagonal of the empirical Fisher",
    source="SqueezeLLM, Kim et al. 2024",
)
def grad_squared(sensitivity: Sensitivity) -> Tensor:
    """(1/n) Σ_i (dL_i/dθ)²: the diagonal of the empirical Fisher over sequences (SqueezeLLM, Kim et al. 2024)."""
    return _computed(sensitivity.fisher)


@metric("grad", formula="(∂L/∂θ)²: the square of the mean gradient, the corpus taken as one batch")
def grad_squared_batch(sensitivity: Sensitivity) -> Tensor:
    """(dL/dθ)²: the square of the mean gradient, the corpus taken as one batch."""
    return _computed(sensitivity.grad).square()


@metric("tokens", formula="mean over predicted tokens of the squared contribution of each position to ∂S_i/∂θ")
def grad_squared_token(sensitivity: Sensitivity) -> Tensor:
    """(1/N) Σ_i Σ_t G_it²: grad_squared with the position as its unit, no two of which can cancel.

    G_it is what position t contributes to dS_i/dθ; for a linear map the product of its input and the gradient at
    its output there, so that the sum is a product of two squared matrices.
    """
    return _computed(sensitivity.tokens)


@metric(
    "curvature",
    formula="½ θ² h, h the per-token empirical Fisher: second-order estimate of the same change",
    unit="nats per token",
    source="LeCun et al. 1990",
)
def obd(sensitivity: Sensitivity) -> Tensor:
    """½ θ² h: second-order estimate of the change of L when θ is set to 0 (nats per token).

    Optimal Brain Damage, LeCun et al. 1990, with the empirical Fisher as h.
    """
    curvature = _computed(sensitivity.curvature)
    return sensitivity.weight.to(curvature.dtype).square().mul_(curvature).mul_(0.5)


@metric("grad", "curvature", formula="|−θ ∂L/∂θ + ½ θ² h|: both terms of the Taylor series", unit="nats per token")
def taylor2(sensitivity: Sensitivity) -> Tensor:
    """|-θ dL/dθ + ½ θ² h|: both terms of the Taylor series (nats per token)."""
    grad = _computed(sensitivity.grad)
    return obd(sensitivity).addcmul_(sensitivity.weight.to(grad.dtype), grad, value=-1).abs_()


@metric(formula="|θ|: the baseline that a metric must beat", baseline=True)
def magnitude(sensitivity: Sensitivity) -> Tensor:
    """|θ|: the baseline that a metric must beat."""
    return sensitivity.weight.to(torch.promote_types(sensitivity.weight.dtype, torch.float32)).abs()


@metric("inputs", formula="|θ| times the norm of its input feature", source="Sun et al. 2024")
def wanda(sensitivity: Sensitivity) -> Tensor:
    """|θ| ‖x‖₂: x is the input feature that θ is multiplied with, over all positions of the corpus (Sun et al. 2024).

    A table that is looked up is multiplied with ones and zeros; where it is the output head's weight as well, the
    squares of both uses are added: the score is the norm of all that θ adds to any result.
    """
    return magnitude(sensitivity).mul_(_computed(sensitivity.inputs).sqrt())


@metric("hessian", formula="|diagonal of the Hessian|, estimated with Rademacher vectors", source="Hutchinson 1990")
def hutchinson_diag(sensitivity: Sensitivity) -> Tensor:
    """|d²L/dθ²|, the diagonal of the Hessian as Hutchinson (1990) estimates it from Rademacher vectors."""
    return _computed(sensitivity.hessian).abs()
