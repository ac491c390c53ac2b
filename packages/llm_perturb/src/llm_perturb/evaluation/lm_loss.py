"""The output head and the loss, without ever holding all logits.

The vocabulary is taken two thousand columns at a time, so that a block of logits stays in the processor's
cache from the product that makes it to the sum that it goes into.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llm_perturb.evaluation.onednn_linear import linear

COLUMNS = 2048


class TokenScores(NamedTuple):
    """Of each position: -log p(target), float32 or wider, and whether no other token was more probable, bool; (T,)."""

    nats: Tensor
    correct: Tensor


def exact_scores(logits: Tensor, targets: Tensor) -> TokenScores:
    """The scores from all logits (T, V)."""
    chosen = logits.gather(-1, targets[:, None]).flatten()
    return TokenScores(exact_nats(logits, targets), chosen >= logits.amax(-1))


def exact_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) from all logits (T, V): (T,).

    Not ``F.cross_entropy``, which on the CPU loses most of a digit more in float32 over 49,152 words.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None]).flatten()


def token_scores(head: nn.Linear, hidden: Tensor, targets: Tensor) -> TokenScores:
    """-log p(target) at each position: logsumexp(z) - z_target with z = W h + b; correct where z_target = max z.

    Args:
        head: W (V, H) and b (V,) or none.
        hidden: (T, H), what the head receives.
        targets: (T,) ids.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    chosen = torch.zeros_like(targets, dtype=wide)
    partial, highest = [], []
    for block in blocks(head):
        z = logits_of(head, hidden, block).to(wide)  # (T, C)
        here = ((targets >= block.start) & (targets < block.stop)).nonzero().flatten()
        chosen[here] = z[here, targets[here] - block.start]
        largest = z.amax(1)
        highest.append(largest)
        partial.append(z.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest))
    nats = torch.stack(partial).logsumexp(0) - chosen
    return TokenScores(nats, chosen >= torch.stack(highest).amax(0))


def token_divergence(head: nn.Linear, hidden: Tensor, other_head: nn.Linear, other_hidden: Tensor) -> Tensor:
    """KL(p || q) at each position, in nats: Σ_v p_v (z_v - z'_v) - logsumexp(z) + logsumexp(z').

    In float64 from the logits on: for a single weight the terms are a million times larger than what is left.

    Args:
        head: of p.
        hidden: (T, H), what the head of p receives.
        other_head: of q.
        other_hidden: (C * T, H), what the head of q receives in C copies of the same positions.

    Returns:
        float64 (C * T,).
    """
    copies = len(other_hidden) // len(hidden)
    before, after, weighted = [], [], []
    for block in blocks(head):
        z = logits_of(head, hidden, block).double()  # (T, V')
        other = logits_of(other_head, other_hidden, block).double().view(copies, *z.shape)  # (C, T, V')
        largest = z.amax(1)  # (T,)
        p = (z - largest[:, None]).exp_()
        before.append(p.sum(1).log_().add_(largest))
        weighted.append(torch.einsum("tv,ctv->ct", p, z - other) * (largest - before[-1]).exp_())
        after.append(other.logsumexp(2))
    normalizer = torch.stack(before)  # (blocks, T)
    share = (normalizer - normalizer.logsumexp(0)).exp()  # of each block in the whole of p
    mean = (torch.stack(weighted) * share[:, None]).sum(0)  # (C, T)
    return (mean - normalizer.logsumexp(0) + torch.stack(after).logsumexp(0)).view(-1)


def blocks(head: nn.Linear) -> list[slice]:
    """The vocabulary in pieces of ``COLUMNS``."""
    n_words = head.weight.shape[0]
    return [slice(start, start + COLUMNS) for start in range(0, n_words, COLUMNS)]


def logits_of(head: nn.Linear, hidden: Tensor, block: slice) -> Tensor:
    """The logits of some words: (T, C)."""
    return linear(hidden, head.weight[block], None if head.bias is None else head.bias[block])
