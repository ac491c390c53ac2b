"""A model whose weights stay in its safetensors files, and are read when they are needed.

The modules are built without memory for their parameters: each parameter is one element, expanded to the parameter's
shape. Its values can be read for a while; module, name and identity of the parameter stay the same.

Which tensors of the files make a parameter, and how, is transformers' own rule: its renamings, and the conversions by
which it merges experts, splits fused projections and so on. They are applied to one parameter at a time.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import load_state_dict

from llm_perturb.evaluation.fingerprint import parameter_digest

Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Header:
    """What a file says of a stored tensor: the file, and shape and dtype as a tensor without memory."""

    file: Path
    tensor: Tensor


@dataclass(frozen=True)
class Source:
    """How transformers makes a parameter, or several at once, of tensors of the files.

    Attributes:
        name: of the parameter or buffer; the first, where one conversion makes several.
        transform: transformers' renaming or conversion, still without tensors.
        keys: the tensors in the files that go into it, each with the pattern of ``transform`` that it matches.
    """

    name: str
    transform: WeightTransform
    keys: list[tuple[str, str]] = field(default_factory=list)

    def make(self, model: PreTrainedModel, get: Get) -> dict[str, Tensor]:
        """The parameters and buffers by name, of the tensors that ``get`` returns for the keys.

        Each tensor is brought to the dtype of the parameter before it is converted, as transformers does.
        """
        transform: Any = deepcopy(self.transform)  # either of two classes, whose base declares no ``convert``
        dtype = model.get_parameter_or_buffer(self.name).dtype
        for pattern, key in self.keys:
            transform.add_tensor(self.name, key, pattern, lambda key=key: get(key).to(dtype))
        tensors = transform.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}

    def names(self, model: PreTrainedModel, headers: dict[str, Header]) -> list[str]:
        """The names of all parameters and buffers that it makes, computed with tensors without memory."""
        return list(self.make(model, lambda key: headers[key].tensor))


def read_headers(files: Iterable[str]) -> dict[str, Header]:
    """What weight files say of their tensors, by key; as in transformers, a later file wins."""
    return {
        key: Header(Path(file), tensor)
        for file in files
        for key, tensor in load_state_dict(file, map_location="meta").items()
    }


def find_sources(
    model: PreTrainedModel, keys: Iterable[str], mapping: Iterable[WeightTransform]
) -> tuple[list[Source], dict[str, str]]:
    """What transformers makes of the tensors of a checkpoint.

    The rule is that of ``transformers.core_model_loading.convert_and_load_state_dict_in_model``.

    Args:
        model: as transformers has built it, before it reads the weights.
        keys: the names of the stored tensors.
        mapping: transformers' renamings and conversions for this model.

    Returns:
        The sources of the model's parameters and buffers, and the keys that the model has no place for, each by the
        name that transformers gives it.
    """
    mapping = deepcopy(list(mapping))  # a renaming may remember which keys it has seen
    renamings = [change for change in mapping if isinstance(change, WeightRenaming)]
    converters = [change for change in mapping if isinstance(change, WeightConverter)]
    by_pattern = {pattern: change for change in converters for pattern in change.source_patterns}
    prefix, expected = model.base_model_prefix, model.state_dict()
    sources: dict[str, Source] = {}
    unused: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            unused[name] = key
            continue
        transform = by_pattern[pattern] if pattern else WeightRenaming(key, name)
        sources.setdefault(name, Source(name, transform)).keys.append((pattern or key, key))
    return list(sources.values()), unused


class Checkpoint:
    """The stored weights of a model, and which of its parameters have their values now.

    Args:
        model: with parameters that have no memory, see ``drop_parameters``.
        sources: how transformers makes its parameters.
        headers: of the tensors in the safetensors files, by key.
    """

    def __init__(self, model: PreTrainedModel, sources: Iterable[Source], headers: dict[str, Header]) -> None:
        self._model, self._headers = model, headers
        self._parameters = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in self._parameters.items()}
        self._first = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        by_name = {name: source for source in sources for name in source.names(model, headers)}
        self._sources: dict[str, Source] = {}
        for name, first_name in self._first.items():
            if name in by_name:
                self._sources.setdefault(first_name, by_name[name])
        self._absent = {name: parameter.data for name, parameter in self._parameters.items()}
        self._holders = dict.fromkeys(self._parameters, 0)
        self._digests: dict[str, str] = {}

    @contextmanager
    def present(self, names: Iterable[str]) -> Iterator[None]:
        """These parameters have their values while this is open; it can be opened within itself."""
        names = list(names)
        self._read([name for name in names if self._holders[name] == 0])
        for name in names:
            self._holders[name] += 1
        try:
            yield
        finally:
            for name in names:
                self._holders[name] -= 1
                if self._holders[name] == 0:
                    self._set(name, self._absent[name])
            _trim_memory()

    def digests(self) -> dict[str, str]:
        """The digest of each parameter as it was first read, in model order; one that never was is read for it."""
        for name in self._parameters:
            if name not in self._digests:
                with self.present([name]):
                    pass
        return {name: self._digests[name] for name in self._parameters}

    def _noted(self, name: str, value: Tensor) -> Tensor:
        """The value, whose digest is kept from the first reading."""
        if name not in self._digests:
            self._digests[name] = parameter_digest(name, value)
        return value

    def _set(self, name: str, value: Tensor) -> None:
        with torch._C.DisableTorchFunction():  # a mode that watches torch's calls would take this for a use
            self._parameters[name].data = value

    def _read(self, names: list[str]) -> None:
        sources = {id(source): source for source in (self._sources[name] for name in names)}
        with torch._C.DisableTorchFunction(), torch.no_grad(), ExitStack() as stack:
            get = opened(self._headers, stack, self._model.device)
            for source in sources.values():
                for name, value in source.make(self._model, get).items():
                    if self._first.get(name) in names:
                        self._set(self._first[name], self._noted(self._first[name], value))

    @contextmanager
    def present_during(self, module: nn.Module) -> Iterator[None]:
        """While this is open, the parameters of a module have their values whenever it is called."""
        own = {id(parameter) for parameter in module.parameters()}
        names = [name for name, parameter in self._parameters.items() if id(parameter) in own]
        held: list[AbstractContextManager[None]] = []

        def load(module: nn.Module, args: tuple[Any, ...]) -> None:
            held.append(self.present(names))
            held[-1].__enter__()

        def drop(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            held.pop().__exit__(None, None, None)

        handles = module.register_forward_pre_hook(load), module.register_forward_hook(drop)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def opened(headers: dict[str, Header], stack: ExitStack, device: torch.device | str = "cpu") -> Get:
    """A function that reads a tensor by its key; each file is opened once, and closed with the stack."""
    pointers: dict[Path, Any] = {}
    stack.callback(pointers.clear)

    def get(key: str) -> Tensor:
        path = headers[key].file
        if path not in pointers:
            pointers[path] = stack.enter_context(safe_open(path, "pt"))
        tensor: Tensor = pointers[path].get_tensor(key)
        return tensor.to(device)

    return get


def drop_parameters(model: nn.Module, device: torch.device) -> None:
    """Make every parameter one element expanded to its shape; one that several modules share stays one."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                empty = torch.zeros((), dtype=old.dtype, device=device).expand(old.shape)
                module._parameters[name] = new.setdefault(id(old), nn.Parameter(empty, requires_grad=False))


def _trim_memory() -> None:
    """Return freed memory to the system: glibc keeps it where smaller allocations lie above it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
