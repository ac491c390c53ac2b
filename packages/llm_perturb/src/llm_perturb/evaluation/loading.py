"""Load a model as transformers does, with its weights in memory or left in their files: the same model both ways.

transformers finds the files, builds the modules without memory, reads the tensors into them and ties what is tied. Only
the reading is replaced, at ``PreTrainedModel._load_pretrained_model``: there the model, its files and
its conversions are known, and nothing has been read yet. A model whose weights stay in their files is read as tensors
without memory, but for buffers and for tensors that transformers has to compare before it ties them.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bridge.exchange.errors import RequestError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model, set_param_for_module
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from llm_perturb.evaluation.checkpoint import (
    Checkpoint,
    Header,
    Source,
    drop_parameters,
    find_sources,
    opened,
    read_headers,
)
from llm_perturb.evaluation.load_errors import refuse_damaged
from llm_perturb.evaluation.quantization import refuse_codes, refuse_stored_codes, restore_dtypes

BeforeReading = Callable[[PreTrainedModel, str | None], bool]


@dataclass(frozen=True)
class Loaded:
    """A model as transformers has loaded it.

    Attributes:
        model: with the values of its weights, or with parameters without memory.
        checkpoint: where the weights are read from when they are needed; None where the model holds them.
        unused: stored tensors that the model has no place for, but for those that transformers computes itself.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint | None
    unused: list[str]


def load_model(
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    before_reading: BeforeReading,
    options: dict[str, Any],
) -> Loaded:
    """Load a causal language model.

    Args:
        source: hub id or local folder.
        config: its configuration.
        dtype: of the weights and of the arithmetic.
        device: where weights are brought that are read when they are needed; a model that holds its weights is on
            the CPU.
        before_reading: called with the model, whose parameters have no memory yet, and with what stands against
            leaving the weights in their files, if anything does; returns whether to leave them there.
        options: ``revision``, ``trust_remote_code`` and others of ``from_pretrained``.

    Raises:
        RequestError: a damaged file, a weight that is missing or of another shape, stored codes in place of values.
    """
    reader = _Reader(source, before_reading)
    loader: Any = AutoModelForCausalLM
    model: PreTrainedModel
    info: dict[str, Any]
    with _in_place_of_reading(reader), _without_report():
        model, info = loader.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _refuse_incomplete(source, info["missing_keys"], info["mismatched_keys"])
    unused = sorted(name for name in info["unexpected_keys"] if not _is_constant(name, reader.unused.get(name)))
    if not reader.streamed:
        refuse_codes(source, model)
        return Loaded(model, None, unused)
    drop_parameters(model, device)
    return Loaded(model, Checkpoint(model, reader.sources, reader.headers), unused)


def bytes_in_memory(model: PreTrainedModel) -> int:
    """What the weights of a model take, a tied tensor counted once."""
    tied = model.all_tied_weights_keys.keys()
    return sum(tensor.numel() * tensor.itemsize for name, tensor in model.state_dict().items() if name not in tied)


class _Reader:
    """What stands in for ``PreTrainedModel._load_pretrained_model`` while one model is loaded."""

    def __init__(self, source: str, before_reading: BeforeReading) -> None:
        self.source, self.before_reading = source, before_reading
        self.original: Any = PreTrainedModel._load_pretrained_model
        self.headers: dict[str, Header] = {}
        self.sources: list[Source] = []
        self.unused: dict[str, Header] = {}
        self.streamed = False

    def __call__(
        self,
        model: PreTrainedModel,
        state_dict: dict[str, Any] | None,
        files: list[str],
        settings: LoadStateDictConfig,
        *more: Any,  # noqa: ANN401 - handed on as it came
    ) -> tuple[LoadStateDictInfo, dict[str, Any] | None]:
        refuse_damaged(files)
        obstacle = None
        if settings.hf_quantizer:
            obstacle = "its weights are quantized"
        else:
            self._read_headers(model, files, settings)
        if not all(file.endswith(".safetensors") for file in files):
            obstacle = f"{Path(files[0]).name} is not a safetensors file"
        self.streamed = self.before_reading(model, obstacle)
        if self.streamed:
            return self._leave(model, settings), None
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        info, index = self.original(model, state_dict, files, settings, *more)
        self._refuse_conversion_errors(info)
        if settings.hf_quantizer:
            restore_dtypes(model, dtypes, settings)
        return info, index

    def _read_headers(self, model: PreTrainedModel, files: list[str], settings: LoadStateDictConfig) -> None:
        self.headers = read_headers(files)
        self.sources, unused = find_sources(model, self.headers, settings.weight_mapping or [])
        self.unused = {name: self.headers[key] for name, key in unused.items()}
        refuse_stored_codes(self.source, model, self.sources, self.headers)

    def _refuse_conversion_errors(self, info: LoadStateDictInfo) -> None:
        for name, error in info.conversion_errors.items():
            reason = " ".join(error.strip().splitlines()[-2:])
            raise RequestError(f"the tensors of '{self.source}' that make {name} cannot be put together: {reason}")

    def _leave(self, model: PreTrainedModel, settings: LoadStateDictConfig) -> LoadStateDictInfo:
        """Read tensors without memory, and the values of what transformers needs at once."""
        empty = {key: header.tensor for key, header in self.headers.items()}
        info: LoadStateDictInfo
        info, _ = convert_and_load_state_dict_in_model(model, empty, replace(settings, device_map={"": "meta"}))
        self._refuse_conversion_errors(info)
        parameters, tied = dict(model.named_parameters(remove_duplicate=False)), model.all_tied_weights_keys
        stood_for = tied.keys() | {first for other, first in tied.items() if other not in info.missing_keys}
        _refuse_incomplete(self.source, info.missing_keys & parameters.keys() - stood_for, info.mismatched_keys)
        compared = {name for pair in tied.items() if info.missing_keys.isdisjoint(pair) for name in pair}
        set_parameter: Any = set_param_for_module  # takes no quantizer, too
        needed = compared | (model.state_dict().keys() - parameters.keys())
        with ExitStack() as stack:
            get = opened(self.headers, stack)
            for source in self.sources:
                if needed.intersection(source.names(model, self.headers)):
                    for name, value in source.make(model, get).items():
                        set_parameter(model, name, value, info, None)
        return info


@contextmanager
def _in_place_of_reading(reader: _Reader) -> Iterator[None]:
    owner: Any = PreTrainedModel
    owner._load_pretrained_model = reader
    try:
        yield
    finally:
        owner._load_pretrained_model = staticmethod(reader.original)


@contextmanager
def _without_report() -> Iterator[None]:
    """Leave transformers' table of missing and unexpected tensors out of its log; here each of them is an error."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def _refuse_incomplete(source: str, missing: Iterable[str], mismatched: Iterable[tuple[Any, ...]]) -> None:
    missing, mismatched = sorted(missing), sorted(mismatched)
    if missing:
        raise RequestError(f"the checkpoint of '{source}' lacks weights that the model needs: {first_names(missing)}")
    if mismatched:
        name, stored, expected = mismatched[0]
        more = f" (and {len(mismatched) - 1} more such)" if len(mismatched) > 1 else ""
        raise RequestError(
            f"the checkpoint of '{source}' cannot be loaded: it holds {name} as {_shape(stored)}, and by the "
            f"configuration it is {_shape(expected)}{more}"
        )


def _is_constant(name: str, header: Header | None) -> bool:
    """Whether a tensor is a causal mask, its fill value or rotary frequencies.

    Older checkpoints store them with the weights, and the models of today compute them. transformers ignores them for
    some families only.
    """
    shape = header.tensor.shape if header else ()
    if re.search(r"(^|\.)(attn|attention)\.(bias|causal_mask)$", name):
        return len(shape) == 4 and shape[:2] == (1, 1)  # (1, 1, positions, positions); a bias has one dimension
    return re.search(r"(^|\.)(masked_bias|inv_freq)$", name) is not None


def first_names(names: list[str], n: int = 5) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "()"
