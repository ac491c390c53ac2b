"""Checkpoints of the backward pass, so that a killed run resumes at the last finished layer.

After each layer the gradient at its input is saved together with the results so far. A new process repeats the
forward pass (which reproduces the hidden states), loads that gradient and continues with the layer below.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bridge.exchange.layout import path_aside
from llm_perturb.evaluation.processes import Processes
from safetensors import SafetensorError
from torch import Tensor

from critical_weight_analysis.layerwise.saved_state import (
    Collector,
    State,
    StateError,
    nested,
    read_state,
    within,
    write_state,
)

_FORMAT = 2  # of the files; those of another are as those of another identity
_FILE = re.compile(r"\.?resume-(\d+)-.+")  # also temporary files, damaged ones, and those of former versions
_SHARE = 0.1  # of the time that writing may take
_log = logging.getLogger("critical_weight_analysis")
T = TypeVar("T")


class Resume:
    """The states of one pass in a run folder, one file for a process and a layer; the last two are kept.

    A file that is damaged is renamed to ``*.damaged`` with a warning; an earlier state is taken, or none.

    Args:
        folder: the run folder.
        identity: what a state must have been made with, such as which sequences went together; JSON values.
        processes: this process among all; None if it is alone.
        warn: called with a sentence for each file that is set aside.

    Attributes:
        layers: how many layers are done, from the last one, by the last state that every process has.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        processes: Processes | None = None,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        self._folder, self._processes, self._warn = folder, processes, warn
        self._identity = json.loads(json.dumps({"format": _FORMAT, **identity}))
        self._rank: int = processes.rank if processes else 0
        self._world: int = processes.world if processes else 1
        self._written, self._took = time.monotonic(), 0.0
        self._collectors: Mapping[str, Collector] = {}
        self._given_up = False
        for cut in folder.glob(f".resume-{self._rank}-*.tmp"):  # what a killed process was writing
            cut.unlink()
        self._files = self._fitting()
        self.layers = max(set.intersection(*self._gather(set(self._files))), default=0)
        self._state: State = read_state(self._files[self.layers])[1] if self.layers else {}

    def attach(self, collectors: Mapping[str, Collector]) -> None:
        """Restore what the state has of these collectors, and save them with every state from now on.

        If one of them does not fit, in any process, no layer is done and nothing is restored.
        """
        self._collectors = collectors
        if not self.layers:
            return
        blank = {name: collector.state() for name, collector in collectors.items()}
        try:
            for name, collector in collectors.items():
                collector.restore(within(self._state, f"results/{name}"))
            fits = True
        except StateError as error:
            self._set_aside(self._files.pop(self.layers), error)
            fits = False
        if all(self._gather(fits)):
            _log.info("going on after %d layers that an earlier process finished", self.layers)
            return
        self.layers, self._state = 0, {}
        for name, collector in collectors.items():
            collector.restore(blank[name])

    def take_gradients(self) -> list[Tensor]:
        """The gradients at the input of the last layer done, by batch, on the CPU; they are not kept here."""
        gradients, self._state = within(self._state, "gradients"), {}
        return [gradients[str(number)] for number in range(len(gradients))]

    def save(self, layers: int, gradients: list[Tensor]) -> None:
        """Write down the state after a layer, unless that would take too much of the time.

        Args:
            layers: how many are done.
            gradients: at the input of the last of them, by batch.
        """
        due = not self._given_up and time.monotonic() - self._written >= self._took / _SHARE
        if not all(self._gather(due)):
            return
        begun = time.monotonic()
        path = self._folder / f"resume-{self._rank}-{layers}.safetensors"
        results = nested({name: collector.state() for name, collector in self._collectors.items()})
        by_batch = {str(number): gradient for number, gradient in enumerate(gradients)}
        header = {"identity": self._identity, "layers": layers}
        try:
            write_state(path, header, nested({"gradients": by_batch, "results": results}))
        except (OSError, SafetensorError) as error:
            self._given_up = True
            self._warn(f"{path} cannot be written ({error}); the pass goes on, and a kill from now on loses more of it")
            return
        self._files[layers] = path
        for old in sorted(self._files)[:-2]:
            self._files.pop(old).unlink(missing_ok=True)
        self._written, self._took = time.monotonic(), time.monotonic() - begun

    def clear(self) -> None:
        """Remove all files of this process, and of those that there were more of: the pass is complete."""
        for file in self._folder.iterdir():
            match = _FILE.fullmatch(file.name)
            if match and int(match[1]) % self._world == self._rank and not file.is_dir():
                file.unlink()

    def _fitting(self) -> dict[int, Path]:
        """The files of this process and identity, by how many layers are done."""
        files = {}
        for path in sorted(self._folder.glob(f"resume-{self._rank}-*.safetensors")):
            try:
                header, _ = read_state(path)
            except StateError as error:
                self._set_aside(path, error)
                continue
            if header.get("identity") == self._identity and isinstance(header.get("layers"), int):
                files[header["layers"]] = path
        return files

    def _set_aside(self, path: Path, error: StateError) -> None:
        aside = path.rename(path_aside(path))
        self._warn(f"{path} cannot be used ({error}); it is now {aside.name}, and what only it held is computed again")

    def _gather(self, item: T) -> list[T]:
        return self._processes.gather(item) if self._processes else [item]
