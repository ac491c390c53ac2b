"""What a killed pass leaves behind, so that the next one can go on at the layer where it stopped.

After a layer the gradient at its input is written down, with what has been found so far. The next process repeats
the way forward, which gives the same hidden states, takes that gradient, and goes on with the layer before.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from llm_perturb.evaluation.processes import Processes

_SHARE = 0.1  # of the time that writing may take
_log = logging.getLogger("critical_weight_analysis")


class Resume:
    """The states of one pass in a run folder, one file for a process and a layer; the last two are kept.

    Args:
        folder: the run folder.
        identity: what a state must have been made with, such as which sequences went together.
        processes: this process among all; None if it is alone.

    Attributes:
        state: the last one that every process has, or None. ``layers`` of it are done.
        found: what the caller has found so far; it is written down with the state, and comes back with it.
    """

    def __init__(self, folder: Path, identity: Any, processes: Processes | None = None) -> None:  # noqa: ANN401 - anything with ==
        self._folder, self._identity, self._processes = folder, identity, processes
        self._rank = processes.rank if processes else 0
        self._written, self._took = time.monotonic(), 0.0
        states = {int(path.stem.split("-")[2]): path for path in self._files()}
        done = max(self._on_all(states), default=None)
        state = None if done is None else torch.load(states[done], weights_only=False)
        fits = state is not None and state["identity"] == identity
        self.state = state if all(self._gather(fits)) else None
        self.found = self.state["found"] if self.state else None
        if self.state:
            _log.info("going on after %d layers that an earlier process finished", self.layers)

    @property
    def layers(self) -> int:
        """How many layers are done, from the last one."""
        return self.state["layers"] if self.state else 0

    def save(self, layers: int, gradients: list[torch.Tensor]) -> None:
        """Write down the state after a layer, unless that would take too much of the time.

        Args:
            layers: how many are done.
            gradients: at the input of the last of them, by batch.
        """
        if not all(self._gather(time.monotonic() - self._written >= self._took / _SHARE)):
            return
        begun = time.monotonic()
        old = self._files()
        path = self._folder / f"resume-{self._rank}-{layers}.pt"
        temporary = path.with_suffix(".tmp")
        torch.save(
            {"identity": self._identity, "layers": layers, "gradients": gradients, "found": self.found}, temporary
        )
        temporary.replace(path)
        for file in old[:-1]:
            file.unlink()
        self._written, self._took = time.monotonic(), time.monotonic() - begun

    def clear(self) -> None:
        """Remove the states: the pass is complete."""
        for file in [*self._files(), *self._folder.glob(f"resume-{self._rank}-*.tmp")]:
            file.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"resume-{self._rank}-*.pt"), key=lambda path: int(path.stem.split("-")[2]))

    def _on_all(self, states: dict[int, Path]) -> set[int]:
        return set.intersection(*self._gather(set(states)))

    def _gather(self, item: Any) -> list:  # noqa: ANN401
        return self._processes.gather(item) if self._processes else [item]
