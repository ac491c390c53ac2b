"""The hidden states at the inputs of the decoder layers, kept from the way forward until the way back needs them.

On the device where that leaves most of its memory free, else in main memory, else in memory-mapped files.
"""

import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from llm_perturb.evaluation.models import free_bytes
from torch import Tensor

SHARE = 0.25  # of the free memory that may be filled


class HiddenStates:
    """Keeps tensors by key; each is taken once.

    Args:
        n_bytes: how much will be kept.
        device: where the tensors come from, and return to.
        scratch: a folder for the files; None for the system's temporary folder.
    """

    def __init__(self, n_bytes: int, device: torch.device, scratch: Path | None = None) -> None:
        self.place = place_for(n_bytes, device)
        self._device, self._kept = device, {}
        self._folder: Path | None = None
        if self.place == "file":
            self._folder = Path(tempfile.mkdtemp(dir=scratch, prefix=".hidden-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def put(self, key: tuple, tensor: Tensor) -> None:
        """Keep a tensor; it must not be changed afterwards."""
        if self.place == "memory":
            tensor = tensor.cpu()
        if self._folder:
            path = self._folder / "-".join(map(str, key))
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(path)
            tensor = path, tensor.shape, tensor.dtype
        self._kept[key] = tensor

    def take(self, key: tuple) -> Tensor:
        """Get a tensor back, and forget it."""
        kept = self._kept.pop(key)
        if not self._folder:
            return kept.to(self._device)
        path, shape, dtype = kept
        mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        tensor = mapped.view(dtype).view(shape).to(self._device)
        path.unlink()  # its pages live as long as the tensor
        return tensor


def place_for(n_bytes: int, device: torch.device) -> str:
    """``device``, ``memory`` or ``file``: the first of which a quarter of what is free suffices."""
    if device.type == "cuda" and n_bytes < SHARE * free_bytes(device):
        return "device"
    return "memory" if n_bytes < SHARE * free_bytes(torch.device("cpu")) else "file"
