"""See every use of a parameter while a piece of the model runs, and what its gradient is made of.

A torch function mode receives every call of torch. Where a parameter is the weight of a linear map or the
table of an embedding, the call's input is kept and, in the backward pass, the gradient at its output: the
parameter's gradient is their product, which is then taken sequence by sequence. Everywhere else the parameter is
replaced by an alias that shares its memory and requires a gradient, so that autograd finds it. No flag of the
model is touched, and no use is missed, whatever the module is called and however it reaches its weight.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from bridge.exchange.errors import RunError
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map_only

Func = Callable[..., Any]
Args = tuple[Any, ...]


@dataclass
class Use:
    """One linear map or embedding that took part.

    Attributes:
        kind: ``linear`` (weight (O, I)), ``addmm`` (weight (I, O), as in Conv1D) or ``embedding`` (table (V, H)).
        weight: the name of the weight, None if it is not of interest.
        bias: likewise of the bias.
        x: the input: (..., I), or the ids.
        section: where it happened, ``Recorder.section`` at that time.
        grad: the gradient at the output, (..., O); None if the output led nowhere.
        node: the output's place in autograd's graph, kept if ``Recorder.with_nodes``.
    """

    kind: str
    weight: str | None
    bias: str | None
    x: Tensor
    section: Any
    grad: Tensor | None = None
    node: Node | None = None
    version: int = 0

    def keep_grad(self, grad: Tensor) -> None:
        """Called by autograd in the backward pass."""
        if self.x._version != self.version:
            raise RunError(f"the input of {self.weight} was overwritten after its use, and its gradient needs it")
        self.grad = grad


class Product(NamedTuple):
    """leftᵀ right, with left (T, R) and right (T, C); one of them is what the parameter was multiplied with."""

    left: Tensor
    right: Tensor
    input_is_left: bool = False


@dataclass
class GradientPieces:
    """The gradient of one parameter, as the sum of the parts that its uses gave.

    Attributes:
        products: of its uses as a weight.
        rows: (ids (T,), gradient (T, H)), to be added to the rows of a table.
        dense: tensors of the parameter's shape.
    """

    products: list[Product] = field(default_factory=list)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    dense: list[Tensor] = field(default_factory=list)


NamedPiece = tuple[str, Literal["products", "rows", "dense"], Product | tuple[Tensor, Tensor] | Tensor]


class Recorder(TorchFunctionMode):
    """Records the uses of the given parameters while it is active (``with recorder:``).

    Attributes:
        uses: linear maps and embeddings, in the order of the calls.
        aliases: by (section, name), the stand-in of a parameter that was used in any other way; its ``.grad``
            holds the gradient once autograd has run. It may have been asked only for its dtype or shape.
        used: the (section, name) of those aliases that a result depends on.
        section: what is being run; set by the caller.
        paused: while true, calls are passed on as they are.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], with_nodes: bool = False) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.aliases: dict[tuple[Any, str], Tensor] = {}
        self.used: set[tuple[Any, str]] = set()
        self.section: Any = None
        self.paused = False
        self._with_nodes = with_nodes
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def __torch_function__(self, func: Func, types: Any, args: Args = (), kwargs: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - torch's signature
        kwargs = kwargs or {}
        if self.paused or not (self._among(args) or self._among(kwargs.values())):
            return func(*args, **kwargs)
        operands = _operands(func, args, kwargs)
        if operands is None:
            return self._with_aliases(func, args, kwargs)
        kind, x, weight, bias = operands
        if self._is_ours(x):
            return self._with_aliases(func, args, kwargs)
        use = Use(kind, self._name(weight), self._name(bias), x.detach(), self.section, version=x._version)
        out = func(*args, **kwargs)
        self.uses.append(use)
        if not torch.is_grad_enabled():
            return out
        if not out.requires_grad:  # nothing before it does: an embedding, whose output is then a leaf
            out.requires_grad_()
        out.register_hook(use.keep_grad)
        use.node = out.grad_fn if self._with_nodes else None
        return out.clone() if out.is_leaf else out  # a leaf could not be changed in place by what follows

    def _with_aliases(self, func: Func, args: Args, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        touched: set[tuple[Any, str]] = set()

        def alias(tensor: Tensor) -> Tensor:
            name = self._name(tensor)
            if name is None:
                return tensor
            key = (self.section, name)
            touched.add(key)
            if key not in self.aliases:
                self.aliases[key] = tensor.detach().requires_grad_()
            return self.aliases[key]

        args, kwargs = tree_map_only(Tensor, alias, (args, kwargs))
        result = func(*args, **kwargs)
        for key in touched:
            if result is self.aliases[key]:  # such as .type() to the dtype that it has: no use yet
                return self._parameters[key[1]]
        if tree_any(lambda leaf: isinstance(leaf, Tensor) and leaf.requires_grad, result):
            self.used |= touched
        return result

    def pieces(self, index: int = 0, batch: int = 1, length: int | None = None) -> dict[str, GradientPieces]:
        """The gradients after the backward pass, by parameter.

        Args:
            index: which sequence of the batch.
            batch: how many were run; 1 also where several need not be told apart.
            length: how many of its tokens are real; None for all.
        """
        by_name: dict[str, GradientPieces] = {}
        for use in self.uses:
            for name, kind, piece in _pieces_of(use, index, batch, length):
                getattr(by_name.setdefault(name, GradientPieces()), kind).append(piece)
        for (_, name), alias in self.aliases.items():
            if alias.grad is not None:
                if batch > 1:
                    raise RunError(f"the gradients of {name} cannot be told apart by sequence: --batch-size 1")
                by_name.setdefault(name, GradientPieces()).dense.append(alias.grad)
        return by_name

    def _among(self, things: Iterable[object]) -> bool:
        return any(
            id(thing) in self._names or (isinstance(thing, list | tuple) and self._among(thing)) for thing in things
        )

    def _is_ours(self, thing: object) -> bool:
        return id(thing) in self._names

    def _name(self, tensor: Tensor | None) -> str | None:
        return self._names.get(id(tensor))


def _operands(func: Func, args: Args, kwargs: dict[str, Any]) -> tuple[str, Tensor, Tensor, Tensor | None] | None:
    """(kind, x, weight, bias) of a call whose parameter gradients are products, else None."""
    if func is F.linear and len(args) >= 2 and not kwargs.keys() - {"bias"}:
        return "linear", args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
    if func is torch.addmm and len(args) == 3 and not kwargs:
        return "addmm", args[1], args[2], args[0]
    if func is F.embedding and len(args) >= 2 and not kwargs.get("scale_grad_by_freq"):
        return "embedding", args[0], args[1], None
    return None


def _pieces_of(use: Use, index: int, batch: int, length: int | None) -> Iterator[NamedPiece]:
    """(parameter, field of ``GradientPieces``, one item of that field) of one use."""
    if use.grad is None:
        return
    grad = use.grad.reshape(batch, -1, use.grad.shape[-1])[index, :length]  # (T, O)
    if use.kind == "embedding":
        assert use.weight is not None
        yield use.weight, "rows", (use.x.reshape(batch, -1)[index, :length], grad)
        return
    x = use.x.reshape(batch, -1, use.x.shape[-1])[index, :length]  # (T, I)
    if use.weight:
        yield use.weight, "products", Product(grad, x) if use.kind == "linear" else Product(x, grad, True)
    if use.bias:
        yield use.bias, "dense", grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
