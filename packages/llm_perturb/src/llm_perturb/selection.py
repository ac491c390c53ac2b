"""Which weights of a target are perturbed: highest or lowest scores, random draws.

A target is one or several parameter tensors laid end to end; a weight is its position in that line, int64.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from bridge.exchange.errors import RequestError
from torch import Tensor
from torch.nn import Parameter

_NEAREST = 50


@dataclass(frozen=True)
class Target:
    """What a TARGET_LAYER means: parameter tensors by name, in model order, laid end to end."""

    layer: str
    parameters: dict[str, Parameter]

    @property
    def n_weights(self) -> int:
        """How many scalar weights the target has."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def offsets(self) -> dict[str, int]:
        """Where in the line each tensor begins."""
        ends = np.cumsum([0, *(parameter.numel() for parameter in self.parameters.values())])
        return {name: int(start) for name, start in zip(self.parameters, ends, strict=False)}

    def split(self, positions: Tensor) -> dict[str, Tensor]:
        """The positions as flat indices into each tensor that has any."""
        parts = {}
        for name, start in self.offsets().items():
            inside = (positions >= start) & (positions < start + self.parameters[name].numel())
            if inside.any():
                parts[name] = positions[inside] - start
        return parts


@dataclass(frozen=True)
class Ranked:
    """Weights in the order of their scores, best first: positions int64 (m,), scores float64 (m,)."""

    positions: Tensor
    scores: Tensor

    def first(self, k: int) -> "Ranked":
        """The first k of them, or all if there are fewer."""
        return Ranked(self.positions[:k], self.scores[:k])


def highest(scores: Tensor, k: int) -> Ranked:
    """The k highest of scores (m,); of equal ones, those that come first."""
    k = min(k, len(scores))
    threshold = scores.topk(k).values[-1]
    above = (scores > threshold).nonzero().flatten()
    level = (scores == threshold).nonzero().flatten()[: k - len(above)]
    positions = torch.cat([above, level])
    order = torch.argsort(scores[positions], descending=True, stable=True)
    return Ranked(positions[order].cpu(), scores[positions[order]].double().cpu())


def lowest(scores: Tensor, k: int) -> Ranked:
    """The k lowest of scores (m,); of equal ones, those that come first."""
    ranked = highest(-scores, k)
    return Ranked(ranked.positions, -ranked.scores)


def draw(n_weights: int, k: int, excluded: Tensor, key: Sequence[object]) -> Tensor:
    """Draw k different positions out of n_weights, none of them excluded, uniformly; sorted.

    Args:
        n_weights: size of the target.
        k: how many.
        excluded: positions that may not be drawn, without repetition.
        key: what the draw depends on, such as (seed, purpose, target); the same key gives the same draw.

    Raises:
        RequestError: fewer than k are left.
    """
    free = n_weights - len(excluded)
    if k > free:
        raise RequestError(
            f"a random control of {k} weights is impossible: {free} of {n_weights} are outside the top sets"
        )
    chosen = np.sort(generator(key).choice(free, size=k, replace=False))
    barriers = np.sort(excluded.numpy()) - np.arange(len(excluded))  # free positions before each excluded one
    return torch.from_numpy(chosen + np.searchsorted(barriers, chosen, side="right"))


def draw_matched(magnitudes: Tensor, chosen: Tensor, excluded: Tensor, key: Sequence[object]) -> Tensor:
    """For each chosen weight another one of nearly the same magnitude: a control for magnitude alone.

    Each is drawn from the ``_NEAREST`` weights whose magnitude is nearest in rank, without repetition.

    Args:
        magnitudes: abs(θ) of the whole target, (n,).
        chosen: positions, (k,).
        excluded: positions that may not be drawn.
        key: what the draw depends on.

    Returns:
        Positions (k,), in the order of ``chosen``.

    Raises:
        RequestError: fewer than k weights are left.
    """
    order = torch.argsort(magnitudes, stable=True).cpu()
    free = torch.ones(len(magnitudes), dtype=torch.bool)
    free[excluded] = False
    free[chosen] = False
    order = order[free[order]]
    if len(order) < len(chosen):
        raise RequestError(
            f"a matched control of {len(chosen)} weights is impossible: {len(order)} are outside the top sets"
        )
    magnitudes = magnitudes.cpu()
    ranks = torch.searchsorted(magnitudes[order].contiguous(), magnitudes[chosen].contiguous()).numpy()  # (k,)
    rng = generator(key)
    left = np.ones(len(order), dtype=bool)  # not drawn yet
    drawn = []
    for rank in ranks:
        reach = _NEAREST // 2
        while not left[max(0, rank - reach) : rank + reach].any():
            reach *= 2
        start = max(0, rank - reach)
        near = start + np.flatnonzero(left[start : rank + reach])
        drawn.append(rng.choice(near))
        left[drawn[-1]] = False
    return order[torch.tensor(drawn, dtype=torch.int64)]


def generator(key: Sequence[object]) -> np.random.Generator:
    """A random generator that depends on nothing but the key."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
