"""The output head and the loss, without ever holding all logits.

The vocabulary is taken a thousand columns at a time, so that a block of logits stays in the processor's
cache from the product that makes it to the sum that it goes into.
"""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from transformers import PreTrainedModel

COLUMNS = 1024
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the logits are the head's linear map of the last hidden state and nothing more; seen from a trial."""
    if model not in _plain:
        head = model.get_output_embeddings()
        _plain[model] = isinstance(head, nn.Linear) and _trial(model, head)
    return _plain[model]


@torch.no_grad()
def _trial(model: PreTrainedModel, head: nn.Linear) -> bool:
    ids = torch.arange(min(8, head.weight.shape[0]), device=model.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    return hidden is not None and torch.equal(head(hidden), logits)


def exact_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) from all logits (T, V): (T,).

    Not ``F.cross_entropy``, which on the CPU loses most of a digit more in float32 over 49,152 words.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]


def token_nats(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) at each position: logsumexp(z) - z_target with z = W h + b.

    Args:
        head: W (V, H) and b (V,) or none.
        hidden: (T, H), what the head receives.
        targets: (T,) ids.

    Returns:
        (T,), float32 or wider.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    chosen = torch.zeros_like(targets, dtype=wide)
    partial = []
    for start in range(0, head.weight.shape[0], COLUMNS):
        block = slice(start, start + COLUMNS)
        z = F.linear(hidden, head.weight[block], None if head.bias is None else head.bias[block]).to(wide)  # (T, C)
        here = ((targets >= start) & (targets < start + COLUMNS)).nonzero()[:, 0]
        chosen[here] = z[here, targets[here] - start]
        largest = z.amax(1)
        partial.append(z.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest))
    return torch.stack(partial).logsumexp(0) - chosen
