"""The device that a model is on, and the memory that is free there."""

import os

import psutil
import torch
from bridge.exchange.errors import RequestError


def check_device(device: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` means here.

    With several processes, ``auto`` and ``cuda`` give each its own GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch_device = torch.device(device)
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError):
        raise RequestError(f"--device {device} is not available on this machine; try --device cpu") from None
    return torch_device


def free_bytes(device: torch.device) -> int:
    """Memory that is free where a device's tensors are."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
