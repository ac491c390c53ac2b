"""A model whose weights stay in its safetensors files, and are read when they are needed.

The modules are built without memory for their parameters: each parameter is one element that is seen as many. For a
while it can be given the real values; module, name and identity of the parameter stay the same.
"""

import ctypes
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from bridge.errors import RequestError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """Where the parameters of a model are, and which of them are there now.

    Args:
        model: with parameters that have no memory, see ``open_streamed``.
        places: by a parameter's first name, the file and the key of its tensor.
        dtype: what the values are converted to.
        device: where they are brought.
    """

    def __init__(
        self, model: nn.Module, places: dict[str, tuple[Path, str]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._parameters = dict(model.named_parameters())
        self._places, self._dtype, self._device = places, dtype, device
        self._absent = {name: parameter.data for name, parameter in self._parameters.items()}
        self._holders = dict.fromkeys(self._parameters, 0)

    @contextmanager
    def present(self, names: Iterable[str]) -> Iterator[None]:
        """These parameters have their values while this is open; it can be opened within itself."""
        names = list(names)
        with ExitStack() as stack:
            files: dict[Path, object] = {}
            for name in names:
                if self._holders[name] == 0:
                    path, key = self._places[name]
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, "pt"))
                    self._set(name, files[path].get_tensor(key).to(self._device, self._dtype))
                self._holders[name] += 1
            files.clear()
        try:
            yield
        finally:
            for name in names:
                self._holders[name] -= 1
                if self._holders[name] == 0:
                    self._set(name, self._absent[name])
            _give_back()

    def _set(self, name: str, value: Tensor) -> None:
        with torch._C.DisableTorchFunction():  # whoever watches torch's calls would take this for a use
            self._parameters[name].data = value

    @contextmanager
    def present_during(self, module: nn.Module) -> Iterator[None]:
        """While this is open, the parameters of a module have their values whenever it is called."""
        own = {id(parameter) for parameter in module.parameters()}
        names = [name for name, parameter in self._parameters.items() if id(parameter) in own]
        held: list[AbstractContextManager] = []

        def load(module: nn.Module, args: tuple) -> None:
            held.append(self.present(names))
            held[-1].__enter__()

        def drop(module: nn.Module, args: tuple, output: object) -> None:
            held.pop().__exit__(None, None, None)

        handles = module.register_forward_pre_hook(load), module.register_forward_hook(drop)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _give_back() -> None:
    """Return freed memory to the system, which glibc keeps where small things lie above it; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def stored_bytes(source: str, options: dict, dtype: torch.dtype) -> int | None:
    """What the weights of a safetensors checkpoint would take in a dtype; None if it is not of such files."""
    try:
        files = _files(source, options)
    except RequestError:
        return None
    total = 0
    for path in files:
        with safe_open(path, "pt") as opened:
            total += sum(torch.Size(opened.get_slice(key).get_shape()).numel() for key in opened.keys())  # noqa: SIM118 - no dict
    return total * dtype.itemsize


def open_streamed(
    source: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, options: dict
) -> tuple[PreTrainedModel, Checkpoint]:
    """A model without weights, and the checkpoint that they are to be read from.

    Args:
        source: hub id or local folder.
        config: its configuration.
        dtype: of the weights once they are read, and of the arithmetic.
        device: where they are brought.
        options: ``revision`` and ``trust_remote_code``.

    Raises:
        RequestError: no safetensors files, or tensors that are not named and shaped as the model's parameters.
    """
    with init_empty_weights(include_buffers=False):
        trusted = {"trust_remote_code": options["trust_remote_code"]}
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **trusted)
    model.tie_weights()
    _replace_parameters(model, dtype, device)
    return model, Checkpoint(model, _places(model, source, options), dtype, device)


def _replace_parameters(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Parameters of one element that is seen as many; one that several modules share stays one."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                empty = torch.zeros((), dtype=dtype, device=device).expand(old.shape)
                module._parameters[name] = new.setdefault(id(old), nn.Parameter(empty, requires_grad=False))


def _places(model: PreTrainedModel, source: str, options: dict) -> dict[str, tuple[Path, str]]:
    """File and key of every parameter, as transformers would find them; none may have to be converted.

    Raises:
        RequestError: a parameter is not in the files as it is.
    """
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    parameters, found = dict(model.named_parameters()), {}
    for path in _files(source, options):
        with safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no dict
                name, converted = rename_source_key(
                    key, renamings, converters, model.base_model_prefix, model.state_dict()
                )
                shape = tuple(opened.get_slice(key).get_shape())
                if converted is None and name in parameters and shape == tuple(parameters[name].shape):
                    found[name] = path, key
    missing = [name for name in parameters if name not in found]
    if missing:
        raise RequestError(
            f"the checkpoint of '{source}' does not hold {missing[0]} {tuple(parameters[missing[0]].shape)} as it is; "
            "its weights cannot be read one layer at a time: --weights resident"
        )
    return found


def _files(source: str, options: dict) -> Sequence[Path]:
    """The safetensors files of a checkpoint, fetched if they are of the hub.

    Raises:
        RequestError: there are none.
    """

    def fetch(name: str) -> Path | None:
        found = cached_file(source, name, revision=options["revision"], _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    index = fetch(INDEX)
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index else [SINGLE]
    paths = [fetch(name) for name in names]
    if None in paths:
        raise RequestError(f"'{source}' has no safetensors files, from which weights could be read one layer at a time")
    return paths
