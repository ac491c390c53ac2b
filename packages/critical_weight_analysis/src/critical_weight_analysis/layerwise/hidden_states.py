"""The hidden states at the inputs of the decoder layers, kept from the forward pass until the backward pass.

On the device where that leaves most of its memory free, else in main memory, else in memory-mapped files.
"""

import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from bridge.exchange.scratch import make_scratch
from llm_perturb.evaluation.devices import free_bytes
from torch import Tensor

SHARE = 0.25  # of the free memory that may be filled
Storage = Literal["device", "memory", "file"]
Key = tuple[int | str, ...]


@dataclass(frozen=True)
class _File:
    """A tensor in a file."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def write(cls, path: Path, tensor: Tensor) -> "_File":
        tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(path)
        return cls(path, tensor.shape, tensor.dtype)

    def read(self, device: torch.device) -> Tensor:
        """Read the tensor and remove the file."""
        n_bytes = self.path.stat().st_size
        mapped: Tensor = torch.from_file(str(self.path), shared=False, size=n_bytes, dtype=torch.uint8)
        tensor = mapped.view(self.dtype).view(self.shape).to(device)
        self.path.unlink()  # its pages live as long as the tensor
        return tensor


class HiddenStates:
    """Keeps tensors by key; each is taken once.

    Args:
        n_bytes: how much will be kept.
        device: where the tensors come from, and return to.
        scratch: a folder for the files; None for the system's temporary folder.
    """

    def __init__(self, n_bytes: int, device: torch.device, scratch: Path | None = None) -> None:
        self.storage = storage_for(n_bytes, device)
        self._device = device
        self._kept: dict[Key, Tensor | _File] = {}
        self._folder: Path | None = None
        if self.storage == "file":
            self._folder = make_scratch(scratch)
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a tensor; it must not be changed afterwards."""
        if self._folder:
            self._kept[key] = _File.write(self._folder / "-".join(map(str, key)), tensor)
        else:
            self._kept[key] = tensor.cpu() if self.storage == "memory" else tensor

    def take(self, key: Key) -> Tensor:
        """Get a tensor back, and forget it."""
        kept = self._kept.pop(key)
        return kept.read(self._device) if isinstance(kept, _File) else kept.to(self._device)


def storage_for(n_bytes: int, device: torch.device) -> Storage:
    """``device``, ``memory`` or ``file``: the first of which a quarter of what is free suffices."""
    if device.type == "cuda" and n_bytes < SHARE * free_bytes(device):
        return "device"
    return "memory" if n_bytes < SHARE * free_bytes(torch.device("cpu")) else "file"
