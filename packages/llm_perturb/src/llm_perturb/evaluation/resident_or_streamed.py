"""Whether the weights of a model are read into memory or stay in their files, by the memory that is free."""

from typing import Literal

import torch
from bridge.exchange.errors import RequestError
from bridge.exchange.printable import say

from llm_perturb.evaluation.devices import free_bytes

Weights = Literal["auto", "resident", "streamed"]
RESIDENT_SHARE = 0.6  # of the free memory that weights may take without being streamed


def cannot_be_streamed(source: str, obstacle: str) -> RequestError:
    """The error that says what stands against leaving the weights in their files."""
    return RequestError(f"the weights of '{source}' cannot be read one layer at a time: {obstacle}; --weights resident")


def is_streamed(source: str, needed: int, obstacle: str | None, weights: Weights, device: torch.device) -> bool:
    """Whether to leave weights in their files.

    Args:
        source: hub id or folder.
        needed: bytes of the weights in memory.
        obstacle: what stands against leaving them in their files.
        weights: what was asked for.
        device: where they are to be.

    Raises:
        RequestError: they are to be left there and cannot be, or are to be in memory and do not fit.
    """
    free = min(free_bytes(torch.device("cpu")), free_bytes(device))  # weights reach a GPU by way of main memory
    if weights == "streamed" and obstacle:
        raise cannot_be_streamed(source, obstacle)
    if weights == "streamed" or (weights == "auto" and not obstacle and needed > RESIDENT_SHARE * free):
        say(f"WEIGHTS: read from the checkpoint layer by layer (--weights {weights})")
        return True
    if needed > free:
        raise RequestError(
            f"the weights of '{source}' take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB of memory are free: "
            "choose a smaller --dtype, or, for a discovery, --weights streamed"
        )
    return False
