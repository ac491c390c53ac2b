"""Save matrix products of the forward pass for the second forward pass of a layer, within a memory budget.

The backward pass runs each layer forward once more, to have its graph. What a linear map returned the first
time can be cached and used again. And the last thing that most layers do is to add a linear map's result to the
residual stream: no gradient depends on that value, so it is not computed again at all.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from llm_perturb.evaluation.devices import free_bytes
from llm_perturb.evaluation.onednn_linear import linear
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

Func = Callable[..., Any]
Args = tuple[Any, ...]
Item = TypeVar("Item")

_PASSING = {"AddBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}


def bytes_to_spare(parameters: Iterable[nn.Parameter]) -> int:
    """The model's bytes, which its gradients would take, if four times as much is free."""
    parameters = list(parameters)
    return min(sum(parameter.nbytes for parameter in parameters), free_bytes(parameters[0].device) // 4)


@dataclass(frozen=True)
class CachedResult:
    """Of one call of a linear map: its weight (id), its result (..., O) if it was saved, and the result's version."""

    weight: int
    result: Tensor | None
    version: int


class ActivationCache(TorchFunctionMode):
    """Active while a batch runs through a layer: it saves results the first time and returns them the second time.

    Args:
        budget: how many bytes may be cached, over all layers.
        unneeded: ids of the weights of linear maps whose results no gradient depends on.

    Attributes:
        layer: the one that is running.
        budget: how many bytes may still be cached.
        recomputing: whether the layer is run for the second time.
    """

    def __init__(self, budget: int, unneeded: frozenset[int]) -> None:
        super().__init__()
        self.layer = ""
        self.recomputing = False
        self.budget = budget
        self._saving = True
        self._unneeded = unneeded
        self._results: dict[str, deque[CachedResult]] = {}

    def first_forward(self, layer: str, save: bool = True) -> "ActivationCache":
        """The layer is about to run for the first time; nothing is saved if it will not run again."""
        self.layer = layer
        self.recomputing = False
        self._saving = save
        return self

    def second_forward(self, layer: str) -> "ActivationCache":
        """The layer is about to run for the second and last time."""
        self.layer = layer
        self.recomputing = True
        return self

    def __exit__(self, *error: object) -> None:
        if self.recomputing:
            self._drop()
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __torch_function__(self, func: Func, types: Any, args: Args = (), kwargs: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - torch's signature
        kwargs = kwargs or {}
        if not is_linear(func, args, kwargs):
            return func(*args, **kwargs)
        return self._recompute(func, args) if self.recomputing else self._compute(func, args)

    def _compute(self, func: Func, args: Args) -> Tensor:
        result = linear(*_operands(func, args))  # (..., O)
        if not self._saving:
            return result
        weight = id(weight_of(func, args))
        saved = None
        if weight not in self._unneeded and result.nbytes <= self.budget:
            saved = result.detach()
            self.budget -= result.nbytes
        cached = CachedResult(weight=weight, result=saved, version=result._version)
        self._results.setdefault(self.layer, deque()).append(cached)
        return result

    def _recompute(self, func: Func, args: Args) -> Tensor:
        weight = id(weight_of(func, args))
        x, matrix, bias = _operands(func, args)
        shape = (*x.shape[:-1], len(matrix))
        result = self._take(weight, shape)
        if weight in self._unneeded:
            result = x.new_zeros(shape)
        if result is None:
            with torch.no_grad():
                result = linear(x, matrix, bias)
        output: Tensor = _KnownResult.apply(x, matrix, result)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return output

    def _take(self, weight: int, shape: tuple[int, ...]) -> Tensor | None:
        """The cached result of the next call; None if it was not saved, or is not that of this call any more."""
        if not self._results.get(self.layer):
            return None
        cached = self._results[self.layer].popleft()
        result = cached.result
        if result is not None:
            self.budget += result.nbytes
        if cached.weight != weight:  # the layer makes other calls than before, and nothing cached belongs to them
            self._drop()
            return None
        unchanged = result is not None and result._version == cached.version and result.shape == shape
        return result if unchanged else None

    def _drop(self) -> None:
        """Forget what is left of the layer's calls."""
        for cached in self._results.pop(self.layer, ()):
            if cached.result is not None:
                self.budget += cached.result.nbytes


class _KnownResult(torch.autograd.Function):
    """A linear map whose result is known already: only its backward pass is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, result: Tensor) -> Tensor:  # noqa: ANN401
        ctx.matrix = matrix
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return linear(grad, ctx.matrix.T), None, None


def _operands(func: Func, args: Args) -> tuple[Tensor, Tensor, Tensor | None]:
    """X (..., I), W (O, I) and b (O,) or none, of a call that ``is_linear``."""
    if func is F.linear:
        return args[0], args[1].detach(), args[2] if len(args) == 3 else None
    return args[1], args[2].detach().T, args[0]


def is_linear(func: Func, args: Args, kwargs: dict[str, Any]) -> bool:
    """Whether a call is a linear map with a parameter as weight."""
    if func is F.linear:
        return len(args) in {2, 3} and not kwargs and isinstance(args[1], nn.Parameter)
    return func is torch.addmm and len(args) == 3 and not kwargs and isinstance(args[2], nn.Parameter)


def weight_of(func: Func, args: Args) -> nn.Parameter:
    """The weight of a call that ``is_linear``."""
    weight: nn.Parameter = args[1] if func is F.linear else args[2]
    return weight


def only_added(output: Tensor, candidates: dict[Node, Item], origin: Node | None) -> set[Item]:
    """Those candidates whose result reaches ``output`` through additions only.

    The backward of an addition keeps no value, so no gradient depends on these results.

    Args:
        output: with its graph.
        candidates: by the node that computed it, anything that stands for the result.
        origin: the node beyond which there is none of them.
    """
    passing: set[Item] = set()
    inner: set[Item] = set()
    seen: set[tuple[Node, bool]] = set()
    stack = [(output.grad_fn, True)]
    while stack:
        node, by_additions = stack.pop()
        if node is None or node is origin or (node, by_additions) in seen:
            continue
        seen.add((node, by_additions))
        if node in candidates:
            (passing if by_additions else inner).add(candidates[node])
        on = by_additions and node.name() in _PASSING
        stack += [(following, on) for following, _ in node.next_functions]
    return passing - inner
