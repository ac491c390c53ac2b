"""Load a causal language model and its tokenizer, with metadata for the manifest."""

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import psutil
import torch
from bridge.exchange.errors import RequestError
from bridge.exchange.file_content import checked
from bridge.exchange.fingerprint import Fingerprint
from bridge.exchange.layout import ALL
from bridge.exchange.printable import check_printable, say
from bridge.exchange.yaml_file import read_yaml
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.utils.hub import resolve_revision
from transformers.utils.peft_utils import find_adapter_config_file

from llm_perturb.evaluation.checkpoint import Checkpoint
from llm_perturb.evaluation.embedded_model import embedded_checkpoint
from llm_perturb.evaluation.fingerprint import parameter_digests, persistent_buffers, tokenizer_digest, total_digest
from llm_perturb.evaluation.hub import why_unreachable
from llm_perturb.evaluation.load_errors import reason_of
from llm_perturb.evaluation.loading import bytes_in_memory, dequantize, first_names, load_model, quantization
from llm_perturb.evaluation.parameters import check_names, named_parameters, tied_groups
from llm_perturb.evaluation.progress import library_bars
from llm_perturb.evaluation.revision import revision_of

DType = Literal["float32", "bfloat16", "float16", "float64"]
Weights = Literal["auto", "resident", "streamed"]
# what configurations call the number of positions; transformers maps most of the other names to the first
_POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"),
    *("max_target_positions", "context_length"),
)
MODEL_TABLE = Path(__file__).parents[1] / "data" / "models.yaml"
RESIDENT_SHARE = 0.6  # of the free memory that weights may take without being streamed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model.

    Attributes:
        model: hub id, local folder or short name; default by TARGET_LAYER, else the embedded model.
        revision: of the hub.
        dtype: of the weights and the arithmetic.
        device: auto, cpu, cuda, cuda:1, mps.
        trust_remote_code: let a hub model run its own code.
        attn_implementation: eager, sdpa, flash_attention_2 ...; by default what the model's configuration asks for.
        allow_unused_weights: name patterns of stored tensors that the model has no place for and may be left out.
    """

    model: str | None = None
    revision: str | None = None
    dtype: DType = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    allow_unused_weights: list[str] = field(default_factory=list)

    def load(self, target_layers: Sequence[str] = (), weights: Weights = "resident") -> "LoadedModel":
        """Load the model; see ``load``."""
        options = asdict(self)
        return load(options.pop("model"), target_layers=target_layers, weights=weights, **options)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, no parameter requiring a gradient, and its tokenizer.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        metadata: name, revision, dtype, sizes and tied tensors, for the manifest.
        checkpoint: where the weights are read from when they are needed; None where the model holds them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metadata: dict[str, Any]
    checkpoint: Checkpoint | None = None

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model has positions for, None if it does not say."""
        return max_positions(self.model)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of the values and the tokenizer; taken once, when it is first asked for: before anything is perturbed."""
        held = self.checkpoint.digests() if self.checkpoint else parameter_digests(named_parameters(self.model))
        digests = held | parameter_digests(persistent_buffers(self.model))
        return Fingerprint(total_digest(digests), tokenizer_digest(self.tokenizer), self.metadata["dtype"], digests)


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that a model has positions for, as its configuration names it; None if it does not.

    Models of the RoBERTa kind count positions from the row after that of the padding token.
    """
    config = model.config.get_text_config()
    declared = (getattr(config, name, None) for name in _POSITIONS)
    positions = next((number for number in declared if isinstance(number, int) and number > 0), None)
    if positions is None:
        return None
    skipped = 0
    for module in model.modules():
        padding: object = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            skipped = padding + 1
    return positions - skipped


class ModelTable(TypedDict):
    """The table of default models and short names.

    Attributes:
        embedded: the name of the embedded model.
        by_target_layer: the default model by the first part of a TARGET_LAYER.
        short_names: the full name of a model by its short one.
    """

    embedded: str
    by_target_layer: dict[str, str]
    short_names: dict[str, str]


@cache
def model_table() -> ModelTable:
    """The table of default models and short names, ``models.yaml``.

    Raises:
        RequestError: it is damaged.
    """
    return checked(read_yaml(MODEL_TABLE), ModelTable, MODEL_TABLE)


def choose_name(name: str | None, target_layers: Sequence[str] = ()) -> str:
    """The full name of the model to load: the one passed, or the one that the first TARGET_LAYER belongs to.

    A folder comes before a short name and a hub id, as an absolute path.

    Raises:
        RequestError: a TARGET_LAYER that could be of any model, such as ``lm_head``, and no name.
    """
    table = model_table()
    if name:
        return _folder(name) or table["short_names"].get(name.lower(), name)
    family = target_layers[0].split(".")[0] if target_layers else ALL
    if family == ALL:
        chosen, why = table["embedded"], "the embedded model"
    elif family in table["by_target_layer"]:
        chosen, why = table["by_target_layer"][family], f"TARGET_LAYER begins with '{family}.'"
    else:
        known = ", ".join(f"'{family}.'" for family in table["by_target_layer"])
        raise RequestError(
            f"TARGET_LAYER '{target_layers[0]}' does not tell which model it is of (it begins with none of {known}); "
            "name it with --model"
        )
    say(f"MODEL: {chosen} (no --model given: {why})")
    return chosen if chosen == table["embedded"] else _folder(chosen) or chosen


def _folder(name: str) -> str | None:
    return str(Path(name).resolve()) if Path(name).is_dir() else None


@library_bars()
def load(
    name: str | None = None,
    *,
    target_layers: Sequence[str] = (),
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    weights: Weights = "resident",
    allow_unused_weights: Sequence[str] = (),
) -> LoadedModel:
    """Load a model by hub id, local folder, short name, or the embedded one.

    With ``weights`` "streamed" they stay in the checkpoint, see ``checkpoint``; with "auto" they do where they would
    take more than ``RESIDENT_SHARE`` of the free memory and nothing stands against it. Either way it is the same model,
    see ``loading``. Stored tensors that the model has no place for are an error, but for those whose name matches one
    of the shell patterns ``allow_unused_weights``.

    Raises:
        RequestError: no such model (or no network), a checkpoint that is not all of the model or more than it, an
            adapter, a tokenizer of another model, too little memory, no such device, a name (of the model or of a
            parameter) that is not printable.
    """
    torch_device = check_device(device)
    name = check_printable(choose_name(name, target_layers), "the model's name")
    source = str(embedded_checkpoint()) if name == model_table()["embedded"] else name
    unreachable = None if Path(source).is_dir() else why_unreachable()
    revision = resolve_revision(source, revision)
    _say_source(name, source, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    part = "configuration"
    try:
        _refuse_adapter(source, revision)
        config = AutoConfig.from_pretrained(source, **options)
        if attn_implementation:
            config._attn_implementation = attn_implementation  # also where config.json has an entry of that name
        method = quantization(config)
        if method and weights == "streamed":
            raise RequestError(_not_streamed(source, f"its weights are quantized ({method})"))
        dequantize(config)
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, **options)

        def before_reading(model: PreTrainedModel, obstacle: str | None) -> bool:
            _check_tokenizer(tokenizer, model, source)
            return _is_streamed(source, bytes_in_memory(model), obstacle, weights, torch_device)

        part = "modules and weights"
        loaded = load_model(source, config, DTYPES[dtype], torch_device, before_reading, options)
    except RequestError:
        raise
    except Exception as error:  # whatever transformers makes of a file that is not as it should be
        hint = "" if Path(source).is_dir() else f" (it is no folder here{_network(unreachable)})"
        reason = _reason(error, source)
        raise RequestError(f"model '{name}' cannot be loaded{hint}; its {part}: {reason}") from error
    unused = _allowed(source, loaded.unused, allow_unused_weights)
    model = loaded.model
    check_names(model)
    _make_ready(model, dtype, torch_device)
    metadata = {
        "id": name,
        "revision": revision_of(model, source, name, revision),
        "dtype": dtype,
        "n_parameters": sum(parameter.numel() for parameter in named_parameters(model).values()),
        "tied_groups": tied_groups(model),
        **_heads(model),
        **({"quantization": method} if method else {}),
        **({"unused_weights": unused} if unused else {}),
    }
    return LoadedModel(model, tokenizer, metadata, loaded.checkpoint)


def _make_ready(model: PreTrainedModel, dtype: str, device: torch.device) -> None:
    """Bring a loaded model into the state in which it is measured."""
    model.eval().requires_grad_(False).to(device)
    if dtype == "float64":
        model.set_experts_implementation("eager")  # the grouped products of fused experts have no float64
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # changes no result, but leaves the gradient of that row out


def _reason(error: Exception, source: str) -> str:
    reason = reason_of(error, source)
    if isinstance(error, ImportError) and "attention" in reason.lower():
        reason += " Choose a kernel that is installed: --attn-implementation eager"
    return reason


def _network(unreachable: str | None) -> str:
    return f"; {unreachable}, and the cache lacks it or a part of it" if unreachable else ""


def _say_source(name: str, source: str, revision: str | None) -> None:
    if source != name:
        where = f"the embedded {name}, in {source}"
    elif Path(source).is_dir():
        where = f"folder {source}"
    else:
        where = f"hub id {name} at revision {getattr(revision, 'resolved', None) or revision or 'main'}"
    say(f"MODEL: {where}")


def _refuse_adapter(source: str, revision: str | None) -> None:
    if find_adapter_config_file(source, revision=revision):
        raise RequestError(
            f"'{source}' holds an adapter (adapter_config.json), without which it is another model: merge it into the "
            "weights (peft: merge_and_unload, then save_pretrained) and give that folder; or take adapter_config.json "
            "away, if the model is meant without it"
        )


def _not_streamed(source: str, obstacle: str) -> str:
    return f"the weights of '{source}' cannot be read one layer at a time: {obstacle}; --weights resident"


def _is_streamed(source: str, needed: int, obstacle: str | None, weights: Weights, device: torch.device) -> bool:
    """Whether to leave weights in their files.

    Args:
        source: hub id or folder.
        needed: bytes of the weights in memory.
        obstacle: what stands against leaving them in their files.
        weights: what was asked for.
        device: where they are to be.

    Raises:
        RequestError: they are to be left there and cannot be, or are to be in memory and do not fit.
    """
    free = min(free_bytes(torch.device("cpu")), free_bytes(device))  # weights reach a GPU by way of main memory
    if weights == "streamed" and obstacle:
        raise RequestError(_not_streamed(source, obstacle))
    if weights == "streamed" or (weights == "auto" and not obstacle and needed > RESIDENT_SHARE * free):
        say(f"WEIGHTS: read from the checkpoint layer by layer (--weights {weights})")
        return True
    if needed > free:
        raise RequestError(
            f"the weights of '{source}' take {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB of memory are free: "
            "choose a smaller --dtype, or, for a discovery, --weights streamed"
        )
    return False


def _allowed(source: str, unused: list[str], patterns: Sequence[str]) -> list[str]:
    """The unused tensors, all of which must match a pattern."""
    unmatched = [name for name in unused if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if unmatched:
        raise RequestError(
            f"the checkpoint of '{source}' holds tensors that the model has no place for ({len(unmatched)}): "
            f"{first_names(unmatched)}. With them it would be another model; if they are known to be needless: "
            "--allow-unused-weights PATTERN"
        )
    if unused:
        say(f"UNUSED WEIGHTS: {first_names(unused)} (--allow-unused-weights)")
    return unused


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, source: str) -> None:
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.weight.shape[0]
    entries = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if entries > rows:
        raise RequestError(
            f"the tokenizer of '{source}' has {entries} entries, the model's embedding {rows} rows: they do not belong "
            "together, or the model was not resized when tokens were added"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that is free where a device's tensors are."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _heads(model: PreTrainedModel) -> dict[str, str | int]:
    """Model type and sizes of the attention, where the config tells: by them, fused projections are taken apart."""
    config = model.config.get_text_config()
    n_heads, width = _entry(config, "num_attention_heads"), _entry(config, "hidden_size")
    if not n_heads or not width:
        return {"model_type": config.model_type}
    return {
        "model_type": config.model_type,
        "hidden_size": width,
        "num_attention_heads": n_heads,
        "num_key_value_heads": _key_value_heads(config, n_heads),
        "head_dim": _entry(config, "head_dim") or width // n_heads,
    }


def _key_value_heads(config: PreTrainedConfig, n_heads: int) -> int:
    """How many heads of keys and values; Falcon and GPT-BigCode say so by flags of their own."""
    if hasattr(config, "multi_query") and not getattr(config, "new_decoder_architecture", False):
        return 1 if config.multi_query else n_heads
    return _entry(config, "num_key_value_heads") or _entry(config, "num_kv_heads") or n_heads


def _entry(config: PreTrainedConfig, name: str) -> int | None:
    """A number of the configuration; None where it has none, or others from layer to layer."""
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return None


def check_device(device: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` means here.

    With several processes, ``auto`` and ``cuda`` give each its own GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch_device = torch.device(device)
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError):
        raise RequestError(f"--device {device} is not available on this machine; try --device cpu") from None
    return torch_device
