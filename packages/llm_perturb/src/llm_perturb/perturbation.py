"""Change chosen weights, and restore them bit for bit.

The formulas take the stored tensor and flat indices and return new values; only ``perturbed`` writes to a model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from bridge.exchange.errors import RequestError, RunError
from torch import Tensor
from torch.nn import Parameter

Kind = Literal["zero", "sign_flip", "scale", "gaussian_noise", "bit_flip", "quantize"]
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@dataclass(frozen=True)
class Perturbation:
    """A kind of change with its numbers.

    Attributes:
        kind: what is done.
        factor: of ``scale``.
        sigma: of ``gaussian_noise``, relative to the standard deviation of the tensor.
        bit: of ``bit_flip``, 0 the lowest of the stored dtype; None for the highest bit of the exponent.
        n_bits: of ``quantize``.
    """

    kind: Kind
    factor: float = 0.5
    sigma: float = 1.0
    bit: int | None = None
    n_bits: int = 4

    @property
    def label(self) -> str:
        """The kind with its number, as in the table of measurements: ``zero``, ``scale(0.5)``."""
        bit = "exponent" if self.bit is None else self.bit
        numbers = {"scale": self.factor, "gaussian_noise": self.sigma, "bit_flip": bit, "quantize": self.n_bits}
        return f"{self.kind}({numbers[self.kind]})" if self.kind in numbers else self.kind

    def check(self, dtype: torch.dtype) -> None:
        """Refuse numbers that mean nothing for weights of this dtype.

        Raises:
            RequestError: no such bit, or a grid without steps.
        """
        width = dtype.itemsize * 8
        if self.kind == "bit_flip" and self.bit is not None and not 0 <= self.bit < width:
            raise RequestError(f"--bit {self.bit}: the bits of a weight in {dtype} are numbered 0 to {width - 1}")
        if self.kind == "quantize" and not 2 <= self.n_bits <= 16:
            raise RequestError(f"--n-bits must be 2 to 16, not {self.n_bits}")
        if self.kind == "gaussian_noise" and self.sigma <= 0:
            raise RequestError(f"--sigma must be above 0, not {self.sigma}")

    def new_values(
        self, tensor: Tensor, index: Tensor, channel_axes: tuple[int, ...], rng: np.random.Generator
    ) -> Tensor:
        """The new values of the weights of ``tensor`` at the flat ``index`` (m,): (m,), same dtype.

        Args:
            tensor: the stored tensor.
            index: int64 (m,).
            channel_axes: the axes whose indices name an output channel, for ``quantize``.
            rng: the source of ``gaussian_noise``.
        """
        values = tensor.view(-1)[index]
        match self.kind:
            case "zero":
                return torch.zeros_like(values)
            case "sign_flip":
                return -values
            case "scale":
                return values * self.factor
            case "gaussian_noise":
                return add_noise(tensor, values, self.sigma, rng)
            case "bit_flip":
                return flip_bit(values, self.bit)
            case "quantize":
                return round_to_grid(tensor, index, channel_axes, self.n_bits)


def add_noise(tensor: Tensor, values: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """Add noise: values + sigma * std(tensor) * N(0, 1)."""
    scale = sigma * tensor.double().std(correction=0).item()
    noise = torch.from_numpy(rng.standard_normal(len(values))).to(values.device)
    return (values.double() + scale * noise).to(values.dtype)


def flip_bit(values: Tensor, bit: int | None) -> Tensor:
    """A true flip of one bit of the stored dtype.

    The highest bit of the exponent is clear for |θ| < 2 and set from there on: flipping it makes a small
    weight enormous, one of 1 or more infinite or not a number, and one of 2 or more tiny.
    """
    width = values.element_size() * 8
    bit = width - 2 if bit is None else bit
    mask = torch.ones_like(bits(values)) << bit
    return (bits(values) ^ mask).view(values.dtype)


def round_to_grid(tensor: Tensor, index: Tensor, channel_axes: tuple[int, ...], n_bits: int) -> Tensor:
    """Round to nearest on a symmetric grid of 2^n_bits - 1 levels per output channel.

    step = max |θ| of the channel / (2^(n_bits - 1) - 1); round(θ / step) step.

    Args:
        tensor: the stored tensor.
        index: flat, int64 (m,).
        channel_axes: the axes of ``tensor`` whose indices together name an output channel; none: one grid for all.
        n_bits: 2 or more.
    """
    tensor = tensor.reshape(tensor.shape or (1,))
    others = [axis for axis in range(tensor.ndim) if axis not in channel_axes]
    assert others, "a channel has more than one weight"
    largest = tensor.abs().amax(dim=others, keepdim=True).double()  # of each channel; size 1 along the other axes
    step = largest / (2 ** (n_bits - 1) - 1)
    at = torch.unravel_index(index, tensor.shape)
    steps, values = step.expand(tensor.shape)[at], tensor[at].double()  # (m,), (m,)
    return torch.where(steps > 0, (values / steps).round() * steps, values).to(tensor.dtype)


def bits(values: Tensor) -> Tensor:
    """The same memory as integers: NaN equals itself there, and 0 differs from -0."""
    return values.view(_BITS[values.dtype])


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Which values are others: bool (m,). -0 is 0, and a NaN is another value only with other bits."""
    return (bits(before) != bits(after)) & (before != after)


@contextmanager
def perturbed(
    parameters: dict[str, Parameter], chosen: dict[str, Tensor], change: Callable[[str, Tensor, Tensor], Tensor]
) -> Iterator[int]:
    """While the block runs, the chosen weights have other values; afterwards the same bits as before.

    Args:
        parameters: the tensors, by name.
        chosen: for each tensor to be changed, flat indices int64 (m,).
        change: from name, tensor and indices to the new values.

    Yields:
        How many weights have another value than before.

    Raises:
        RunError: a weight did not take its new value, or was not restored.
    """
    flat = {name: parameters[name].detach().view(-1) for name in chosen}  # view: a copy would change nothing
    index = {name: chosen[name].to(flat[name].device) for name in chosen}
    saved = {name: flat[name][index[name]] for name in chosen}
    new = {name: change(name, parameters[name].detach(), index[name]) for name in chosen}
    try:
        for name in chosen:
            flat[name][index[name]] = new[name]
        _compare(parameters, index, new, "did not take the new value")
        yield sum(int(changed(saved[name], new[name]).sum()) for name in chosen)
    finally:
        for name in chosen:
            flat[name][index[name]] = saved[name]
        _compare(parameters, index, saved, "was not restored")


def _compare(
    parameters: dict[str, Parameter], index: dict[str, Tensor], expected: dict[str, Tensor], what: str
) -> None:
    for name, values in expected.items():
        if not torch.equal(bits(parameters[name].detach().reshape(-1)[index[name]]), bits(values)):
            raise RunError(f"a weight of {name} {what}; its numbers must not be used")
