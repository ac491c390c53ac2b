"""Several processes under ``accelerate launch``: who this one is, and the little that they tell each other.

Work is split, never a sum: every number is computed whole in one process, so that the table does not depend
on how many there are.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from bridge.exchange.errors import RequestError

T = TypeVar("T")


def _share_cores(world: int) -> None:
    """Divide the cores among the processes: the launcher gives each of several one thread, on any machine."""
    if world == 1 and "OMP_NUM_THREADS" in os.environ:
        return  # somebody's wish
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // world))


def _check_gpus() -> None:
    """Refuse more processes on this machine than it has GPUs: the last ones would find none to take."""
    here, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > n_gpus:
        raise RequestError(
            f"{here} processes were started on a machine with {n_gpus} GPUs, and each needs its own; "
            f"start {n_gpus}, or give --device cpu"
        )


class Processes:
    """This process among those that the launcher started; alone when there was no launcher.

    Args:
        device: what the models of the processes are on, as ``--device`` has it; all but ``cpu`` takes GPUs, if any.

    Raises:
        RequestError: the machine has fewer GPUs than processes.
    """

    def __init__(self, device: str = "auto") -> None:
        on_gpus = device != "cpu" and torch.cuda.is_available()
        if on_gpus:
            _check_gpus()
        self._state = PartialState(cpu=not on_gpus)
        self.rank, self.world = self._state.process_index, self._state.num_processes
        self.device = self._state.device
        if not on_gpus:
            _share_cores(self.world)

    @property
    def first(self) -> bool:
        """Whether this is the process that talks and writes."""
        return self.rank == 0

    def once(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the first process and give its result, or its RequestError, to all."""
        said = [None, None]
        if self.first:
            try:
                said[0] = action()
            except RequestError as error:
                said[1] = str(error)
        broadcast_object_list(said)
        if said[1] is not None:
            raise RequestError(said[1])
        return said[0]

    def gather(self, item: T) -> list[T]:
        """What every process has, in the order of the processes; waits for all of them."""
        return gather_object([item])

    def close(self) -> None:
        """End the process group; nothing can be gathered any more."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
