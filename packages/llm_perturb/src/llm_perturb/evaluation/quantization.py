"""Quantized weights: recognized, turned into plain values where transformers can, else refused.

Codes cannot be scored or changed like values.
"""

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from bridge.exchange.errors import RequestError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from llm_perturb.evaluation.checkpoint import Header, Source

PLAIN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # dtypes whose values are the weights


def quantization_method(config: PreTrainedConfig) -> str | None:
    """How the stored weights are quantized by the configuration: fp8, gptq, bitsandbytes ...; None for plain floats."""
    settings: Any = getattr(config, "quantization_config", None)
    if not settings:
        settings = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if not settings:
        return None
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    method: str | None = settings.get("quant_method")
    if method:
        return method
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "bitsandbytes"
    return "a method that is not named"


def dequantize(config: PreTrainedConfig) -> None:
    """Have transformers turn codes into values where it can, also on a machine that could compute with the codes."""
    method = AUTO_QUANTIZATION_CONFIG_MAPPING.get(quantization_method(config) or "")
    if method and "dequantize" in inspect.signature(method).parameters:
        holder = config if getattr(config, "quantization_config", None) else config.get_text_config(decoder=True)
        holder.quantization_config = {**holder.quantization_config, "dequantize": True}


def refuse_stored_codes(
    source: str, model: PreTrainedModel, sources: Iterable[Source], headers: Mapping[str, Header]
) -> None:
    """Stop at stored tensors that are codes by their dtype, where the configuration names no quantization."""
    expected = model.state_dict()
    for one in sources:
        for _, key in one.keys:
            stored = headers[key].tensor.dtype
            if expected[one.name].is_floating_point() and stored not in PLAIN:
                raise RequestError(
                    f"{key} of '{source}' is stored as {str(stored).removeprefix('torch.')}: these are codes, "
                    "not values, and the configuration names no quantization by which to read them"
                )


def refuse_codes(source: str, model: PreTrainedModel) -> None:
    """Stop at weights that are still codes once they are loaded."""
    method = getattr(model, "quantization_method", None)
    if method:
        raise RequestError(
            f"the weights of '{source}' are still quantized ({getattr(method, 'value', method)}) once they are loaded: "
            "codes cannot be scored or changed like values; give a checkpoint of plain floats"
        )


def restore_dtypes(model: PreTrainedModel, dtypes: dict[str, torch.dtype], settings: LoadStateDictConfig) -> None:
    """Bring values to the dtype that was asked for, as which a dequantizing transformers leaves some of them stored."""
    for name, expected in dtypes.items():
        tensor = model.get_parameter_or_buffer(name)
        kept = next((dtype for part, dtype in settings.dtype_plan.items() if re.search(part, name)), None)
        dtype = kept or (expected if expected in PLAIN else settings.dtype)
        if tensor.dtype in PLAIN:
            tensor.data = tensor.to(dtype)
