"""What a pass collects, as tensors by name: how it is saved to a file, and how it comes back.

The file is one safetensors file, which holds numbers and text and nothing that could be executed. Its metadata have
a header (JSON) and a checksum over the header and all tensors, so that a damaged file is never taken for a whole one.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from bridge.exchange.atomic_file import atomic_path
from bridge.exchange.json_file import parse_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
T = TypeVar("T")


class StateError(Exception):
    """A state cannot be read, or is not of what it is to be restored into."""


class Collector(Protocol):
    """What grows during a pass, parameter by parameter."""

    def state(self) -> State:
        """All that was collected so far."""

    def restore(self, state: State) -> None:
        """Replace what was collected by what ``state`` gave.

        Raises:
            StateError: the state is of something else.
        """


def nested(groups: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Several states (or groups of anything) as one: ``{"a": {"b": tensor}}`` becomes ``{"a/b": tensor}``."""
    return {f"{outer}/{inner}": item for outer, group in groups.items() for inner, item in group.items()}


def within(state: State, outer: str) -> State:
    """One of the states that ``nested`` put together."""
    return {name.removeprefix(f"{outer}/"): tensor for name, tensor in state.items() if name.startswith(f"{outer}/")}


def columns_of(state: State, dtypes: Mapping[str, torch.dtype]) -> State:
    """The tensors of these names, after a check that they are there, of these types and of one length.

    Raises:
        StateError: they are not.
    """
    for name, dtype in dtypes.items():
        if name not in state or state[name].dtype != dtype or state[name].ndim == 0:
            raise StateError(f"expected a column '{name}' of {dtype}")
    columns = {name: state[name] for name in dtypes}
    if len({len(column) for column in columns.values()}) > 1:
        raise StateError(f"the columns {', '.join(columns)} are not of one length")
    return columns


def rows_by_parameter(parameter: Tensor, n_parameters: int) -> dict[int, slice]:
    """Where the rows of each parameter are, given each row's parameter number (m,).

    Raises:
        StateError: a number is out of range, or the rows of a parameter are not together.
    """
    numbers, lengths = torch.unique_consecutive(parameter, return_counts=True)
    known = set(numbers.tolist())
    if len(known) < len(numbers) or not known <= set(range(n_parameters)):
        raise StateError("a parameter is not of this model, or occurs twice")
    ends = lengths.cumsum(0).tolist()
    groups = zip(numbers.tolist(), lengths.tolist(), ends, strict=True)
    return {number: slice(end - length, end) for number, length, end in groups}


def write_state(path: Path, header: dict[str, Any], tensors: State) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file.
        header: JSON values.
        tensors: of any dtype and device.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"header": text, "sha256": _checksum(text, tensors)})


def read_state(path: Path) -> tuple[dict[str, Any], State]:
    """The header and the tensors (on the CPU) of a file of ``write_state``.

    Raises:
        StateError: it is damaged, or another kind of file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dict
        text = metadata["header"]
        if metadata["sha256"] != _checksum(text, tensors):
            raise StateError("its content does not match its checksum")
        header = parse_json(text)
        if not isinstance(header, dict):
            raise StateError("its header is no object")
        return header, tensors
    except KeyError as error:
        raise StateError(f"it has no {error}") from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise StateError(str(error)) from None


def _checksum(header: str, tensors: State) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.as_strided([tensor.numel()], [1])  # contiguous, yet of one element the stride may be any
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
