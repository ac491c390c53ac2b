"""Where the K highest of many scores are: exact, in little memory, equal scores in the order of their indices."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 22  # scores looked at together: bounds the memory of the selection, changes no result
_SAMPLE = 1 << 12  # scores that stand for all while a percentile is looked for


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Flat indices of the K highest scores, highest first; equal scores in the order of their indices.

    ``torch.topk`` leaves open which of several equal scores it takes. Here a score replaces one that was found
    earlier only if it is strictly higher.

    Args:
        scores: any shape, finite.
        k: how many; all of them if there are fewer.

    Returns:
        int64 (min(k, numel),), on the CPU.
    """
    flat = scores.detach().reshape(-1)
    few = _few_candidates(flat, k)
    if few is not None:
        return few[torch.argsort(flat[few], descending=True, stable=True)[:k]].cpu()
    index = torch.empty(0, dtype=torch.int64, device=flat.device)
    best = torch.empty(0, dtype=flat.dtype, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if len(best) < k:
            candidates = torch.arange(len(chunk), device=flat.device)
        else:
            candidates = where(operator.gt, chunk, best.min())
        best = torch.cat([best, chunk[candidates]])
        index = torch.cat([index, candidates + start])
        keep = positions_of_highest(best, k)
        best, index = best[keep], index[keep]
    return index[torch.argsort(best, descending=True, stable=True)].cpu()


def _few_candidates(flat: Tensor, k: int) -> Tensor | None:
    """Indices, ascending, that the K highest are among; None where that does not narrow the search.

    Of equal blocks, take the maxima: the K-th highest of them is reached by at least K scores, so nothing below
    it is wanted, and only blocks whose maximum reaches it are looked into.
    """
    size = next((size for size in (1024, 256, 64, 16) if 8 * k * size <= len(flat)), 16)
    n_blocks = len(flat) // size
    if n_blocks < 2 * k:
        return None
    maxima = flat[: n_blocks * size].view(n_blocks, size).amax(1)
    bound = maxima.topk(k).values[-1]
    blocks = where(operator.ge, maxima, bound)
    if len(blocks) <= 64 * k:
        inside = (blocks[:, None] * size + torch.arange(size, device=flat.device)).reshape(-1)
        candidates = torch.cat([inside, torch.arange(n_blocks * size, len(flat), device=flat.device)])
        return candidates[where(operator.ge, flat[candidates], bound)]
    above = where(operator.gt, flat, bound)
    if len(above) >= k:
        return None
    return torch.cat([above, _first(flat, bound, k - len(above))]).sort().values  # a mass of equal ones


def _first(flat: Tensor, value: Tensor, n: int) -> Tensor:
    """Where scores (m,) equal a value for the first n times."""
    found = [torch.empty(0, dtype=torch.int64, device=flat.device)]
    for start in range(0, len(flat), _CHUNK):
        found.append(where(operator.eq, flat[start : start + _CHUNK], value)[:n] + start)
        n -= len(found[-1])
        if n == 0:
            break
    return torch.cat(found)


def where(comparison: Callable[[Any, Any], Any], flat: Tensor, bound: Tensor | float) -> Tensor:
    """Indices, ascending, of the scores (m,) that ``comparison`` (operator.ge, ...) with the bound finds true.

    NumPy's comparison and search are several times faster than torch's on a CPU.
    """
    if flat.device.type != "cpu":
        true: Tensor = comparison(flat, bound)
        return true.nonzero()[:, 0]
    scores = flat.numpy()
    return torch.from_numpy(np.flatnonzero(comparison(scores, np.asarray(bound, dtype=scores.dtype))))


def kth_smallest(scores: Tensor, k: int) -> float:
    """The k-th smallest of scores of any shape, k from 1.

    For a high k a value of a small sample that should lie somewhat below it leaves few to be sorted; if it does not
    lie below, all are (after Floyd & Rivest 1975).
    """
    flat = scores.detach().reshape(-1)
    if len(flat) > 16 * _SAMPLE and 2 * k > len(flat):
        sample = flat[:: len(flat) // _SAMPLE].sort().values
        upper = flat[where(operator.ge, flat, sample[(k * len(sample)) // len(flat) - len(sample) // 128])]
        k, flat = (k - len(flat) + len(upper), upper) if k > len(flat) - len(upper) else (k, flat)
    return flat.kthvalue(k).values.item()


def positions_of_highest(scores: Tensor, k: int) -> Tensor:
    """Positions of the K highest of scores (m,), ascending; of equal ones those that come first."""
    if len(scores) <= k:
        return torch.arange(len(scores), device=scores.device)
    threshold = kth_smallest(scores, len(scores) - k + 1)
    above = where(operator.gt, scores, threshold)
    level = where(operator.eq, scores, threshold)[: k - len(above)]
    return torch.cat([above, level]).sort().values
