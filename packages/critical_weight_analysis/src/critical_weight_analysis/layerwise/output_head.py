"""The output head and the loss of some sequences, without ever holding a second table of their logits.

Plain logits are made, and turned into probabilities, a thousand columns of the vocabulary at a time: a block
stays in the processor's cache from the product that makes it to the last use of it.
"""

from collections.abc import Callable
from functools import partial

import torch
from llm_perturb.evaluation.onednn_linear import linear
from torch import Tensor, nn

from critical_weight_analysis.layerwise.gradient_sums import GradientSums
from critical_weight_analysis.layerwise.parallel import n_cores, on_cores
from critical_weight_analysis.layerwise.parameter_uses import Product

COLUMNS = 1024
Block = tuple[slice, Callable[[], Tensor]]  # columns of the logits, and what gives the gradient there, once


def plain_loss(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, list[Block]]:
    """S = Σ_t logsumexp(z_t) - z_t,target with z = W h + b, and its gradient at z.

    Args:
        head: W (V, H) and b (V,) or none.
        hidden: (T, H), what the head receives.
        targets: (T,) ids.

    Returns:
        The loss of every token (T,), and the blocks: softmax(z) - onehot(target) for some columns (T, C).
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    columns = [slice(start, start + COLUMNS) for start in range(0, head.weight.shape[0], COLUMNS)]
    targets, positions = targets.sort()
    bounds = torch.searchsorted(targets, torch.tensor([c.start for c in columns], device=targets.device)).tolist()
    inside = [slice(*pair) for pair in zip(bounds, [*bounds[1:], len(targets)], strict=True)]
    chosen = torch.empty(len(targets), dtype=wide, device=targets.device)

    def exponentials_of(number: int) -> tuple[Tensor, Tensor, Tensor]:
        block, here = columns[number], inside[number]
        bias = None if head.bias is None else head.bias[block]
        z = linear(hidden, head.weight[block], bias).to(wide)  # (T, C)
        chosen[here] = z[positions[here], targets[here] - block.start]
        highest = z.amax(dim=1, keepdim=True)
        z.sub_(highest).exp_()
        return z, highest, highest + z.sum(dim=1, keepdim=True).log()

    computed = on_cores(hidden.device, exponentials_of, range(len(columns)))
    exponentials = {number: z for number, (z, _, _) in enumerate(computed)}  # (T, C) each, taken out when it is used
    highest = [of_block for _, of_block, _ in computed]  # (T, 1) each
    log_normalizer = torch.cat([log for *_, log in computed], dim=1).logsumexp(dim=1, keepdim=True)  # (T, 1)
    nats = torch.empty_like(chosen)
    nats[positions] = log_normalizer[positions, 0] - chosen

    def gradient_of(number: int) -> Tensor:
        here = inside[number]
        gradient = exponentials.pop(number).mul_((highest[number] - log_normalizer).exp_())
        gradient[positions[here], targets[here] - columns[number].start] -= 1
        return gradient

    return nats, [(block, partial(gradient_of, number)) for number, block in enumerate(columns)]


def any_loss(logits: Tensor, z: Tensor, of: tuple[int, slice], targets: Tensor) -> tuple[Tensor, list[Block]]:
    """The same where the model makes its logits from the head's result by something that only autograd can follow.

    Args:
        logits: (B, T, V), the model's, with their graph.
        z: (B, T, V), the head's result, a leaf of that graph.
        of: which sequence of the batch, and its real tokens.
        targets: as above.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits[of].to(wide)
    # not F.cross_entropy, which adds the exponentials of a whole float32 row one by one
    nats = logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]
    gradient = torch.autograd.grad(nats.double().sum(), z, retain_graph=True)[0][of].to(wide)
    columns = [slice(start, start + COLUMNS) for start in range(0, z.shape[-1], COLUMNS)]
    return nats.detach(), [(block, partial(gradient.__getitem__, (slice(None), block))) for block in columns]


def back(
    head: nn.Linear,
    hidden: Tensor,
    blocks: list[Block],
    rows: dict[int, slice],
    weight: GradientSums | None,
    bias: GradientSums | None,
    ids: dict[int, Tensor] | None,
) -> Tensor:
    """Go back through the head with the gradient at its result: add to its sums, return the gradient at its input.

    Args:
        head: the head.
        hidden: (T, H), what it received for the tokens of some sequences.
        blocks: of the gradient at its result.
        rows: which of the tokens are whose.
        weight: the sums of its weight, if they are wanted.
        bias: likewise of its bias.
        ids: of each sequence, the rows which the embedding will add to, if the two share the weight.
    """
    wide = hidden if weight is None else hidden.to(weight.dtype)

    def back_through(some: list[Block]) -> tuple[Tensor, list[Tensor]]:
        result, at_bias = torch.zeros_like(hidden), []
        for block, gradient_of in some:
            gradient = gradient_of()
            result.add_(linear(gradient.to(hidden.dtype), head.weight[block].T))
            if weight is not None:
                batch = [(i, Product(gradient[here], wide[here])) for i, here in rows.items()]
                weight.add_products(batch, start=block.start, ids=ids)
            if bias is not None:
                at_bias.append(torch.stack([gradient[here].sum(0) for here in rows.values()]))
        return result, at_bias

    step = -(-len(blocks) // n_cores(hidden.device))
    runs = [blocks[start : start + step] for start in range(0, len(blocks), step)]
    computed = on_cores(hidden.device, back_through, runs)
    results = [result for result, _ in computed]
    if bias is not None:
        at_bias = torch.cat([of_block for _, of_run in computed for of_block in of_run], dim=1)  # (sequences, V)
        for i, total in zip(rows, at_bias, strict=True):
            bias.add_dense(i, total)
    return sum(results[1:], results[0])
