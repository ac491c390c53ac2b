"""Load a causal language model and its tokenizer, with metadata for the manifest."""

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import Fingerprint
from bridge.exchange.printable import check_printable, say
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import resolve_revision
from transformers.utils.peft_utils import find_adapter_config_file

from llm_perturb.evaluation.checkpoint import Checkpoint
from llm_perturb.evaluation.devices import check_device
from llm_perturb.evaluation.embedded_model import embedded_checkpoint
from llm_perturb.evaluation.fingerprint import parameter_digests, persistent_buffers, tokenizer_digest, total_digest
from llm_perturb.evaluation.hub import why_unreachable
from llm_perturb.evaluation.load_errors import reason_of
from llm_perturb.evaluation.loading import bytes_in_memory, first_names, load_model
from llm_perturb.evaluation.model_names import choose_name, model_table, say_source
from llm_perturb.evaluation.model_sizes import attention_sizes, max_positions
from llm_perturb.evaluation.parameters import check_names, named_parameters, tied_groups
from llm_perturb.evaluation.progress import library_bars
from llm_perturb.evaluation.quantization import dequantize, quantization_method
from llm_perturb.evaluation.resident_or_streamed import Weights, cannot_be_streamed, is_streamed
from llm_perturb.evaluation.revision import revision_of

DType = Literal["float32", "bfloat16", "float16", "float64"]
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
    say_source(name, source, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    part_of = partial(_in_one_line, name, source, unreachable)
    with part_of("configuration"):
        config, method = _configuration(source, options, attn_implementation, weights)
    with part_of("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)

    def before_reading(model: PreTrainedModel, obstacle: str | None) -> bool:
        _check_tokenizer(tokenizer, model, source)
        return is_streamed(source, bytes_in_memory(model), obstacle, weights, torch_device)

    with part_of("modules and weights"):
        loaded = load_model(source, config, DTYPES[dtype], torch_device, before_reading, options)
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
        **attention_sizes(model),
        **({"quantization": method} if method else {}),
        **({"unused_weights": unused} if unused else {}),
    }
    return LoadedModel(model, tokenizer, metadata, loaded.checkpoint)


def _configuration(
    source: str, options: dict[str, Any], attn_implementation: str | None, weights: Weights
) -> tuple[PreTrainedConfig, str | None]:
    """The configuration that the model is built by, and the method by which its stored weights are quantized."""
    _refuse_adapter(source, options["revision"])
    config = AutoConfig.from_pretrained(source, **options)
    if attn_implementation:
        config._attn_implementation = attn_implementation  # also where config.json has an entry of that name
    method = quantization_method(config)
    if method and weights == "streamed":
        raise cannot_be_streamed(source, f"its weights are quantized ({method})")
    dequantize(config)
    return config, method


@contextmanager
def _in_one_line(name: str, source: str, unreachable: str | None, part: str) -> Iterator[None]:
    """Whatever transformers raises while it reads a part of a model becomes one line that names the part."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        hint = "" if Path(source).is_dir() else f" (it is no folder here{_network(unreachable)})"
        reason = _reason(error, source)
        raise RequestError(f"model '{name}' cannot be loaded{hint}; its {part}: {reason}") from error


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


def _refuse_adapter(source: str, revision: str | None) -> None:
    if find_adapter_config_file(source, revision=revision):
        raise RequestError(
            f"'{source}' holds an adapter (adapter_config.json), without which it is another model: merge it into the "
            "weights (peft: merge_and_unload, then save_pretrained) and give that folder; or take adapter_config.json "
            "away, if the model is meant without it"
        )


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
