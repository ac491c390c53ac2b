"""Several pieces of work side by side on the cores of the CPU, each on fewer threads than torch would give it.

Two products that have a core each take less time than one after the other on two: none waits for the other's part, and
what lies between the products needs no thread to be woken.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

MOST = 4  # pieces at a time: what each holds in memory adds up
Item = TypeVar("Item")
Result = TypeVar("Result")


def n_cores(device: torch.device) -> int:
    """How many pieces of work are done at a time; one on a GPU."""
    return min(MOST, torch.get_num_threads()) if device.type == "cpu" else 1


def on_cores(device: torch.device, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[work(item) for item in items]``, whose tensors are on the device; the pieces must not depend on each other.

    Raises:
        Exception: what the first piece that failed has raised, when all have ended.
    """
    items, n_threads, n = list(items), torch.get_num_threads(), n_cores(device)
    if n == 1 or len(items) < 2:
        return [work(item) for item in items]
    with_gradients = torch.is_grad_enabled()  # a setting that each thread has for itself

    def piece(item: Item) -> Result:
        with torch.set_grad_enabled(with_gradients):
            return work(item)

    torch.set_num_threads(n_threads // n)
    try:
        pieces = [_threads(n, n_threads // n).submit(piece, item) for item in items]
        wait(pieces)
    finally:
        torch.set_num_threads(n_threads)
    return [one.result() for one in pieces]


@cache
def _threads(n: int, n_threads_each: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, "core", initializer=torch.set_num_threads, initargs=(n_threads_each,))
