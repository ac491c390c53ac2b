"""The diagonal of the Hessian of the loss, estimated from products with random signs (Hutchinson 1990).

For a vector v of independent signs, E[v ∘ Hv] = diag(H): what the other columns add to v_j (Hv)_j is
Σ_k≠j H_jk v_j v_k, whose mean is 0. Its variance, Σ_k≠j H_jk² for one probe, falls with the number of probes.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from bridge.exchange.errors import RunError
from llm_perturb.evaluation.corpus import count_tokens
from llm_perturb.evaluation.lm_loss import exact_nats
from llm_perturb.evaluation.parameters import named_parameters
from llm_perturb.evaluation.progress import Progress
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from critical_weight_analysis.layerwise.pass_settings import Settings

PURPOSE = "signs of the Hessian's diagonal"
_NOT_TWICE = ("is not implemented", "differentiate twice")  # how torch says that there is no second derivative
_log = logging.getLogger("critical_weight_analysis")


def hessian_diagonal(
    model: PreTrainedModel,
    sequences: list[Tensor],
    names: Sequence[str],
    n_probes: int,
    seed: int = 0,
    settings: Settings = Settings(),  # noqa: B008 - frozen
) -> dict[str, Tensor]:
    """An estimate of d²L/dθ² of every weight: (1/M) Σ_m v_m ∘ (1/N) Σ_i ∂²S_i/∂θ² v_m over M probes.

    H is the Hessian in the named parameters alone; all others are constants, and add nothing to the variance. A
    tied tensor is one parameter with all its uses. Each sequence is run forward and backward once, and its
    gradient g_i differentiated for each probe, ∂(g_i · v)/∂θ. Beside the weights, a gradient, a probe, its product
    and the result are of the size of the named parameters, and the graph of one sequence's gradient exists.

    Args:
        model: a causal language model in eval mode. Left as it is: weights narrower than float32 are copied.
        sequences: each (T_i + 1,) ids.
        names: parameters, by their first names.
        n_probes: M.
        seed: of the signs.
        settings: whether to show a bar, and with which processes the sequences are shared.

    Returns:
        By name, of the parameter's shape and device, float32 or wider.

    Raises:
        RunError: a loss is not finite, the model cannot be differentiated twice, or every second derivative is 0.
    """
    weights = {
        n: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for n, p in named_parameters(model).items()
    }
    chosen = {name: weights[name].requires_grad_() for name in names}
    totals = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in chosen.items()}
    _announce(len(sequences), n_probes, sum(weight.numel() for weight in chosen.values()))
    mine = settings.share(list(enumerate(sequences)))
    progress = Progress(len(mine) * n_probes, "hutchinson_diag", settings.progress)
    with progress, _differentiable_attention(model):
        for i, sequence in mine:
            gradients = _gradients(model, weights, chosen, sequence, i)
            for probe in range(n_probes):
                signs = {name: rademacher(name, weight, seed, probe) for name, weight in chosen.items()}
                for name, product in _products(gradients, chosen, signs, keep=probe < n_probes - 1):
                    totals[name].addcmul_(signs[name], product)
                progress.update()
    for total in totals.values():
        settings.add_up(total)
    if not any(total.any() for total in totals.values()):
        raise RunError("every second derivative is 0: the model's attention or a kernel of its own hides them")
    return {name: total.div_(n_probes * count_tokens(sequences)) for name, total in totals.items()}


def rademacher(name: str, like: Tensor, seed: int, probe: int) -> Tensor:
    """The signs, +1 or -1, of one parameter in one probe; they depend on nothing but the arguments and the size.

    Args:
        name: of the parameter.
        like: a tensor of the shape, dtype and device wanted.
        seed: of all signs.
        probe: its number.
    """
    generator = np.random.default_rng([seed, probe, *f"{PURPOSE}/{name}".encode()])
    packed = np.frombuffer(generator.bytes((like.numel() + 7) // 8), dtype=np.uint8)
    bits = torch.from_numpy(np.unpackbits(packed, count=like.numel()))
    return bits.to(like.device, like.dtype).mul_(2).sub_(1).view(like.shape)


def _announce(n_sequences: int, n_probes: int, n_weights: int) -> None:
    _log.info(
        "hutchinson_diag: %d probes of %d sequences, %d products, each of two to three backward passes of a sequence; "
        "memory for about 5 times the %d weights in scope in float32 (%.1f GB), and intermediate results of a sequence",
        *(n_probes, n_sequences, n_probes * n_sequences, n_weights, 5 * 4 * n_weights / 1e9),
    )


@contextmanager
def _differentiable_attention(model: PreTrainedModel) -> Iterator[None]:
    """While open, attention is computed by what autograd can differentiate twice; fused kernels it cannot."""
    chosen = model.config._attn_implementation
    other = chosen not in ("eager", "sdpa")
    if other:
        model.set_attn_implementation("eager")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if other:
            model.set_attn_implementation(chosen)


def _gradients(
    model: PreTrainedModel, weights: dict[str, Tensor], chosen: dict[str, Tensor], sequence: Tensor, i: int
) -> dict[str, Tensor]:
    """dS_i/dθ with its graph, of those parameters where it is not constant."""
    ids = sequence[None].to(model.device)  # (1, T + 1)
    inputs = {"input_ids": ids, "use_cache": False}
    with torch.enable_grad():
        logits = torch.func.functional_call(model, weights, (), inputs).logits[0, :-1]  # (T, V)
        loss = exact_nats(logits, ids[0, 1:]).double().sum()
        if not loss.isfinite():
            raise RunError(f"the loss of sequence {i} is {loss.item()}, not finite; try --dtype float32")
        if not loss.requires_grad:
            return {}
        all_gradients = torch.autograd.grad(loss, list(chosen.values()), create_graph=True, allow_unused=True)
    return {name: g for name, g in zip(chosen, all_gradients, strict=True) if g is not None and g.requires_grad}


def _products(
    gradients: dict[str, Tensor], chosen: dict[str, Tensor], signs: dict[str, Tensor], keep: bool
) -> Iterator[tuple[str, Tensor]]:
    """∂(g · v)/∂θ = ∂²S_i/∂θ² v, of the parameters on which g · v depends. ``keep``: the graph is needed again."""
    if not gradients:
        return
    try:
        # Not autograd.grad: it passes over nodes that lead to no input, and with them the refusal of a kernel
        # that can be differentiated only once, whose part would then be missing without a word
        torch.autograd.backward(list(gradients.values()), [signs[name] for name in gradients], retain_graph=keep)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NOT_TWICE):
            raise
        reason = str(error).splitlines()[0]
        raise RunError(f"hutchinson_diag needs a model that can be differentiated twice: {reason}") from error
    for name, weight in chosen.items():
        if weight.grad is not None:
            yield name, weight.grad
            weight.grad = None
