"""The output head and the loss of some sequences, without ever holding a second table of their logits.

Plain logits are made, and turned into probabilities, a thousand columns of the vocabulary at a time: a block
stays in the processor's cache from the product that makes it to the last use of it.
"""

from collections.abc import Iterator

import torch
from llm_perturb.products import linear
from torch import Tensor, nn

from critical_weight_analysis.recorder import Product
from critical_weight_analysis.sums import Sums

COLUMNS = 1024


def plain_loss(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
    """S = Σ_t logsumexp(z_t) - z_t,target with z = W h + b, and its gradient at z.

    Args:
        head: W (V, H) and b (V,) or none.
        hidden: (T, H), what the head receives.
        targets: (T,) ids.

    Returns:
        The loss of every token (T,), and the blocks (columns, softmax(z) - onehot(target) for these columns (T, C)),
        to be asked for once.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    columns = [slice(start, start + COLUMNS) for start in range(0, head.weight.shape[0], COLUMNS)]
    targets, positions = targets.sort()
    bounds = torch.searchsorted(targets, torch.tensor([c.start for c in columns], device=targets.device)).tolist()
    inside = [slice(*pair) for pair in zip(bounds, [*bounds[1:], len(targets)], strict=True)]
    exponentials, highest, partial = [], [], []
    chosen = torch.empty(len(targets), dtype=wide, device=targets.device)
    for block, here in zip(columns, inside, strict=True):
        bias = None if head.bias is None else head.bias[block]
        z = linear(hidden, head.weight[block], bias).to(wide)  # (T, C)
        chosen[here] = z[positions[here], targets[here] - block.start]
        highest.append(z.amax(dim=1, keepdim=True))
        exponentials.append(z.sub_(highest[-1]).exp_())
        partial.append(highest[-1] + z.sum(dim=1, keepdim=True).log())
    log_normalizer = torch.cat(partial, dim=1).logsumexp(dim=1, keepdim=True)  # (T, 1)
    nats = torch.empty_like(chosen)
    nats[positions] = log_normalizer[positions, 0] - chosen

    def gradients() -> Iterator[tuple[slice, Tensor]]:
        for index, (block, here) in enumerate(zip(columns, inside, strict=True)):
            gradient = exponentials[index].mul_((highest[index] - log_normalizer).exp_())
            exponentials[index] = None
            gradient[positions[here], targets[here] - block.start] -= 1
            yield block, gradient

    return nats, gradients()


def any_loss(logits: Tensor, z: Tensor, of: tuple[int, slice], targets: Tensor) -> tuple[Tensor, Iterator]:
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
    columns = (slice(start, start + COLUMNS) for start in range(0, z.shape[-1], COLUMNS))
    return nats.detach(), ((block, gradient[:, block]) for block in columns)


def back(
    head: nn.Linear,
    hidden: Tensor,
    gradients: Iterator[tuple[slice, Tensor]],
    rows: dict[int, slice],
    weight: Sums | None,
    bias: Sums | None,
    ids: dict[int, Tensor] | None,
) -> Tensor:
    """Go back through the head with the gradient at its result: add to its sums, return the gradient at its input.

    Args:
        head: the head.
        hidden: (T, H), what it received for the tokens of some sequences.
        gradients: the blocks of the gradient at its result.
        rows: which of the tokens are whose.
        weight: the sums of its weight, if they are wanted.
        bias: likewise of its bias.
        ids: of each sequence, the rows which the embedding will add to, if the two share the weight.
    """
    result = torch.zeros_like(hidden)
    wide, at_bias = None if weight is None else hidden.to(weight.dtype), []
    for block, gradient in gradients:
        result.add_(linear(gradient.to(hidden.dtype), head.weight[block].T))
        if weight is not None:
            batch = [(i, Product(gradient[here], wide[here])) for i, here in rows.items()]
            weight.add_products(batch, start=block.start, ids=ids)
        if bias is not None:
            at_bias.append(torch.stack([gradient[here].sum(0) for here in rows.values()]))
    for i, total in zip(rows, torch.cat(at_bias, dim=1) if at_bias else (), strict=False):
        bias.add_dense(i, total)
    return result
