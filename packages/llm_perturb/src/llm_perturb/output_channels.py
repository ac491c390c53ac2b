"""Which weights of a tensor form one output channel: what ``quantize`` rounds with one step.

A linear map contracts some axes of its weight with its input; the indices along the others name an output channel.
Linear and convolution modules have one convention each. Of a tensor that a module uses in its own way, such as the
fused experts of a mixture (E, O, I) or (E, I, O), a forward pass over a few tokens shows which axes are contracted.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from bridge.exchange.errors import RequestError, one_line
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import Parameter
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_perturb.evaluation.causality import probe_sequences
from llm_perturb.evaluation.parameters import layer_of, named_parameters

_ROWS_ARE_CHANNELS = (nn.Linear, nn.Embedding, _ConvNd)
_PRODUCTS = {"mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "_grouped_mm", "grouped_mm_fallback"}
_Use = tuple[type[nn.Module], str]  # class and attribute: modules of one class use it alike

_probed: WeakKeyDictionary[nn.Module, dict[_Use, tuple[int, ...]]] = WeakKeyDictionary()


def check_channels(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse parameters whose output channels are not known.

    Raises:
        RequestError: no product of the forward pass shows them, or several products show different ones.
    """
    for name in names:
        channel_axes(model, name)


def channel_axes(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """The axes of the stored tensor whose indices together name an output channel.

    ``(0,)`` for Linear (O, I), Embedding (V, H) and convolutions (O, I, width), ``(1,)`` for Conv1D (I, O), ``(0, 1)``
    for experts (E, O, I), ``(0, 2)`` for experts (E, I, O), and ``()`` for a vector, which has one step.

    Args:
        model: in eval mode, unperturbed.
        name: of the parameter.

    Raises:
        RequestError: they are not known, of a tensor with more than two axes.
    """
    shape = model.get_parameter(name).shape
    long_axes = [axis for axis, size in enumerate(shape) if size > 1]
    if len(long_axes) <= 1:
        return ()
    module = model.get_submodule(layer_of(name))
    if isinstance(module, Conv1D):
        return (1,)
    if isinstance(module, _ROWS_ARE_CHANNELS):
        return (0,)
    if model not in _probed:
        _probed[model] = _probe(model)
    contracted = _probed[model].get(_use(model, name))
    if contracted is not None:
        return tuple(axis for axis in range(len(shape)) if axis not in contracted)
    if len(long_axes) == 2:  # a table, or one vector for each expert
        return (long_axes[0],)
    raise RequestError(
        f"--perturbation quantize: which axes of {name} {tuple(shape)} are its output channels is not known; "
        "leave it out, or take another perturbation"
    )


def _use(model: nn.Module, name: str) -> _Use:
    return type(model.get_submodule(layer_of(name))), name.rpartition(".")[2]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> dict[_Use, tuple[int, ...]]:
    """The axes that products contract, of every parameter for which they are the same in all products."""
    watch = _WatchProducts(named_parameters(model))
    try:
        with watch:
            model(input_ids=torch.stack(probe_sequences(model)).to(model.device), use_cache=False)
    except Exception as error:  # whatever a model makes of a few tokens
        reason = one_line(error)
        raise RequestError(f"--perturbation quantize: the model cannot be run on a few tokens: {reason}") from None
    uses: defaultdict[_Use, set[tuple[int, ...]]] = defaultdict(set)
    for name, contracted in watch.contracted:
        uses[_use(model, name)].add(contracted)
    return {use: next(iter(axes)) for use, axes in uses.items() if len(axes) == 1}


class _WatchProducts(TorchDispatchMode):
    """While active, notes which axes of the parameters are contracted in matrix products.

    A factor that is a view of a parameter has its storage; strides tell which axes of the parameter its axis runs over.

    Attributes:
        contracted: each parameter's name with the axes that a product contracts.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {p.untyped_storage().data_ptr(): (name, p) for name, p in parameters.items()}
        self.contracted: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - whatever the operation returns
        """Note the factors of a product, and compute it."""
        for factor, axis in _factors(func, args):
            owner = self._parameters.get(factor.untyped_storage().data_ptr())
            if owner is None:
                continue
            name, parameter = owner
            contracted = axes_under(parameter, factor.stride(axis), factor.shape[axis])
            if contracted:
                self.contracted.add((name, contracted))
        return func(*args, **(kwargs or {}))


def _factors(func: OpOverload, args: Sequence[Any]) -> list[tuple[Tensor, int]]:
    """The two factors of a matrix product, each with the axis that is contracted; nothing for another operation."""
    name = func.overloadpacket.__name__
    if name not in _PRODUCTS:
        return []
    left, right = args[1:3] if name.startswith(("add", "badd")) else args[:2]
    return [(left, -1), (right, -min(right.ndim, 2))]


def axes_under(tensor: Tensor, stride: int, size: int) -> tuple[int, ...]:
    """The axes of ``tensor`` that an axis of a view of it runs over.

    >>> axes_under(torch.empty(5, 3, 4), stride=1, size=4), axes_under(torch.empty(5, 3, 4), stride=1, size=12)
    ((2,), (1, 2))
    """
    if stride == 0:
        return ()
    return tuple(
        axis
        for axis, (step, length) in enumerate(zip(tensor.stride(), tensor.shape, strict=True))
        if length > 1 and step % stride == 0 and step // stride < size
    )
