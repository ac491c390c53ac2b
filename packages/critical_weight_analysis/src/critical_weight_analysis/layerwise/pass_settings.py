"""How a pass over the corpus is carried out. Nothing here changes a number beyond rounding."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from llm_perturb.evaluation.checkpoint import Checkpoint
from llm_perturb.evaluation.processes import Processes
from torch import Tensor

from critical_weight_analysis.layerwise.backward_checkpoints import Resume

Item = TypeVar("Item")


@dataclass(frozen=True)
class Settings:
    """The settings of a pass.

    Attributes:
        batch_size: sequences at a time; taken as 1 where a batch could not be told apart by sequence.
        progress: whether to show bars on stderr.
        checkpoint: where the weights are read from when they are needed; None where the model holds them.
        processes: this process among those that share the sequences; None if it is alone.
        resume: what an earlier process left of the same pass, and where this one leaves it; None for neither.
        scratch: a folder for hidden states that do not fit into memory; None for the system's.
    """

    batch_size: int = 1
    progress: bool = False
    checkpoint: Checkpoint | None = None
    processes: Processes | None = None
    resume: Resume | None = None
    scratch: Path | None = None

    def present(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """The weights of these parameters are there while this is open."""
        return self.checkpoint.present(names) if self.checkpoint else nullcontext()

    def share(self, items: list[Item]) -> list[Item]:
        """Those that are this process's to do."""
        return items[self.processes.rank :: self.processes.world] if self.processes else items

    def add_up(self, total: Tensor) -> None:
        """Add what the other processes have to a tensor, in place."""
        if self.processes and self.processes.world > 1:
            here = total.to(self.processes.device)  # a group of GPUs cannot add what lies in main memory
            torch.distributed.all_reduce(here)
            total.copy_(here)
