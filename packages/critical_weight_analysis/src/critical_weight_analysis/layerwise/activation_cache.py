"""Spare a layer's second forward run some of its matrix products, as far as a memory budget goes.

What a linear map returned on the way forward can be kept, and given back when the layer is run once more. And what
a layer does last is mostly to add a linear map's result to the residual stream: no gradient depends on that value, so
it need not be computed again at all.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from llm_perturb.evaluation.models import free_bytes
from llm_perturb.evaluation.onednn_linear import linear
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

_PASSING = {"AddBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}


def bytes_to_spare(parameters: Iterable[nn.Parameter]) -> int:
    """The model's bytes, which its gradients would take, if four times as much is free."""
    parameters = list(parameters)
    return min(sum(parameter.nbytes for parameter in parameters), free_bytes(parameters[0].device) // 4)


class Keeper(TorchFunctionMode):
    """Active while a batch runs through a layer: the first time it keeps, the second time it gives back.

    Args:
        left: how many bytes may be kept, over all layers.
        unneeded: ids of the weights of linear maps whose results no gradient depends on.

    Attributes:
        layer: the one that is running.
        left: how many bytes may still be kept.
        replaying: whether the layer is run for the second time.
    """

    def __init__(self, left: int, unneeded: frozenset[int]) -> None:
        super().__init__()
        self.layer: str | None = None
        self.replaying, self._again = False, True
        self.left, self._unneeded = left, unneeded
        self._kept: dict[str, deque[tuple[int, Tensor | None, int]]] = {}  # weight, result, its version

    def record(self, layer: str, again: bool = True) -> "Keeper":
        """The calls of this layer are about to be made for the first time; nothing is kept if not ``again``."""
        self.layer, self.replaying, self._again = layer, False, again
        return self

    def replay(self, layer: str) -> "Keeper":
        """The calls of this layer are about to be made again, once."""
        self.layer, self.replaying = layer, True
        return self

    def __exit__(self, *error: object) -> None:
        if self.replaying:
            self._drop()
        super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ANN401 - torch's signature
        kwargs = kwargs or {}
        if not is_linear(func, args, kwargs):
            return func(*args, **kwargs)
        return self._give_back(func, args) if self.replaying else self._keep(func, args)

    def _keep(self, func: Callable, args: tuple) -> Tensor:
        result, weight = _map(func, args), weight_of(func, args)
        if not self._again:
            return result
        size = 0 if id(weight) in self._unneeded else result.nbytes
        size = size if size <= self.left else 0
        self.left -= size
        record = id(weight), result.detach() if size else None, result._version
        self._kept.setdefault(self.layer, deque()).append(record)
        return result

    def _give_back(self, func: Callable, args: tuple) -> Tensor:
        weight = weight_of(func, args)
        x, matrix, _ = _operands(func, args)
        result = self._take(id(weight), (*x.shape[:-1], len(matrix)))
        if id(weight) in self._unneeded:
            result = x.new_zeros(*x.shape[:-1], len(matrix))
        with torch.no_grad():
            result = _map(func, args) if result is None else result
        return _Known.apply(x, matrix, result)

    def _take(self, key: int, shape: tuple[int, ...]) -> Tensor | None:
        """The result of the next call as it was kept; None if it was not, or is not that of this call any more."""
        if not self._kept.get(self.layer):
            return None
        kept_key, result, version = self._kept[self.layer].popleft()
        if result is not None:
            self.left += result.nbytes
        if kept_key != key:  # the layer makes other calls than before: nothing kept can be told to belong to them
            self._drop()
            return None
        unchanged = result is not None and result._version == version and result.shape == shape
        return result if unchanged else None

    def _drop(self) -> None:
        """Forget what is left of the layer's calls."""
        for _, result, _ in self._kept.pop(self.layer, ()):
            self.left += 0 if result is None else result.nbytes


class _Known(torch.autograd.Function):
    """A linear map whose result is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, result: Tensor) -> Tensor:  # noqa: ANN401
        ctx.matrix = matrix
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return linear(grad, ctx.matrix.T), None, None


def _operands(func: Callable, args: tuple) -> tuple[Tensor, Tensor, Tensor | None]:
    """X (..., I), W (O, I) and b (O,) or none, of a call that ``is_linear``."""
    if func is F.linear:
        return args[0], args[1].detach(), args[2] if len(args) == 3 else None
    return args[1], args[2].detach().T, args[0]


def _map(func: Callable, args: tuple) -> Tensor:
    """What the call returns, by the fastest product there is."""
    return linear(*_operands(func, args))


def is_linear(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call is a linear map with a parameter as weight."""
    if func is F.linear:
        return len(args) in {2, 3} and not kwargs and isinstance(args[1], nn.Parameter)
    return func is torch.addmm and len(args) == 3 and not kwargs and isinstance(args[2], nn.Parameter)


def weight_of(func: Callable, args: tuple) -> nn.Parameter:
    """The weight of a call that ``is_linear``."""
    return args[1] if func is F.linear else args[2]


def only_added(output: Tensor, candidates: dict[Node, Any], origin: Node | None) -> set[Any]:
    """Those candidates whose result reaches ``output`` through additions only.

    The backward of an addition keeps no value, so no gradient depends on these results.

    Args:
        output: with its graph.
        candidates: by the node that made it, anything that stands for the result.
        origin: the node beyond which there is none of them.
    """
    passing, inner = set(), set()
    seen, stack = set(), [(output.grad_fn, True)]
    while stack:
        node, by_additions = stack.pop()
        if node in (None, origin) or (node, by_additions) in seen:
            continue
        seen.add((node, by_additions))
        if node in candidates:
            (passing if by_additions else inner).add(candidates[node])
        on = by_additions and node.name() in _PASSING
        stack += [(following, on) for following, _ in node.next_functions]
    return passing - inner
