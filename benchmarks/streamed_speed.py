"""Discovery of models whose weights stay in the checkpoint: time, peak memory, share of the matrix-product rate.

    packages/critical_weight_analysis/.venv/bin/python benchmarks/streamed_speed.py
    packages/critical_weight_analysis/.venv/bin/python benchmarks/streamed_speed.py --shape pythia-6.9b --n-sequences 2
    nox -s benchmark -- streamed_speed

Writes a GPT-NeoX checkpoint of the exact shape of a Pythia model with random weights, in the dtype of the hub's (or
--stored). Then every matrix weight is scored by `grad_x_weight` and `grad_squared` with the exact top 500, in float32,
in a process of its own. The matrix products that a forward and backward pass cannot do without are three for each
weight and token; their share is how fast they would be done at the rate of this processor's float32 product, measured
in the same process, divided by the time the whole pass took. Peak memory is VmHWM.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
from bridge.exchange.command_line import flags
from critical_weight_analysis.discovery import discover, engine_for
from critical_weight_analysis.layerwise.batches import first_batch_size
from critical_weight_analysis.layerwise.pass_settings import Settings
from llm_perturb.evaluation.loading import load_model
from llm_perturb.evaluation.models import DTYPES
from llm_perturb.evaluation.parameters import in_scope
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SIZES = {  # hidden size, layers, heads, inner size, vocabulary, stored dtype
    "pythia-160m": (768, 12, 12, 3072, 50304, "float16"),
    "pythia-2.8b": (2560, 32, 32, 10240, 50304, "float16"),
    "pythia-6.9b": (4096, 32, 32, 16384, 50432, "bfloat16"),
}
METRICS = ["grad_x_weight", "grad_squared"]


def config_of(shape: str) -> GPTNeoXConfig:
    """The configuration of the model on the hub."""
    hidden, layers, heads, inner, vocabulary, _ = SIZES[shape]
    return GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        use_parallel_residual=True,
        tie_word_embeddings=False,
    )


def write_checkpoint(shape: str, dtype: torch.dtype, folder: Path) -> int:
    """Random weights, one file a layer; returns the number of parameters."""
    config = config_of(shape)
    config.architectures = ["GPTNeoXForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator, places, by_file, total = torch.Generator().manual_seed(0), {}, {}, 0
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        by_file.setdefault(f"model-{layer[1] if layer else 'ends'}.safetensors", []).append((name, parameter))
    for file, parameters in by_file.items():
        tensors = {}
        for name, parameter in parameters:
            value = torch.empty(parameter.shape).normal_(0, 0.02, generator=generator)
            tensors[name] = (value + 1 if "norm" in name and name.endswith("weight") else value).to(dtype)
            places[name] = file
            total += parameter.numel()
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def product_rate(hidden: int, inner: int) -> float:
    """The best of a few float32 matrix products of the model's own shape, in operations a second."""
    x, weight, best = torch.randn(512, hidden), torch.randn(inner, hidden), 0.0
    for _ in range(8):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = max(best, 2 * 512 * hidden * inner / (time.perf_counter() - start))
    return best


def measure(shape: str, folder: str, n_sequences: int, n_tokens: int) -> None:
    """The pass, in this process; prints its figures as JSON in the last line."""
    rate = product_rate(SIZES[shape][0], SIZES[shape][3])
    config = AutoConfig.from_pretrained(folder)
    loaded = load_model(folder, config, torch.float32, torch.device("cpu"), lambda model, obstacle: True, {})
    model, checkpoint = loaded.model, loaded.checkpoint
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(SIZES[shape][4], (n_tokens + 1,), generator=generator) for _ in range(n_sequences)]
    settings = Settings(batch_size=first_batch_size(sequences, model.device), progress=True, checkpoint=checkpoint)
    start = time.perf_counter()
    engine = engine_for(model, settings)
    found = discover(engine, model, sequences, in_scope(model), METRICS, 500, settings=settings)
    seconds = time.perf_counter() - start
    assert len(found.rankings[METRICS[0]].top(500)) == 500
    products = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_in" not in name)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    figures = {
        "seconds": seconds,
        "peak_gib": int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20,
        "rate": rate,
        "share": 3 * 2 * products * n_sequences * n_tokens / rate / seconds,
    }
    print(json.dumps(figures))


def main(
    *,
    shape: Literal[*SIZES] = "pythia-2.8b",
    n_sequences: int = 8,
    n_tokens: int = 256,
    stored: Literal[*DTYPES] | None = None,
    folder: str | None = None,
    only: bool = False,
) -> None:
    """Print time, peak memory and share.

    Args:
        shape: which Pythia model.
        n_sequences: how many sequences.
        n_tokens: predicted tokens of each.
        stored: dtype of the checkpoint; that of the hub if left out.
        folder: keep the checkpoint there, or use the one that is there; a temporary one if left out.
        only: the checkpoint is there, do nothing but the pass.
    """
    if only:
        measure(shape, folder, n_sequences, n_tokens)
        return
    place = Path(folder or tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    try:
        if not (place / "config.json").exists():
            dtype = stored or SIZES[shape][5]
            n = write_checkpoint(shape, DTYPES[dtype], place)
            print(f"{shape}: {n / 1e9:.2f} billion parameters, {n * 4 / 2**30:.1f} GiB in float32, stored as {dtype}")
        command = [sys.executable, __file__, "--only", "--shape", shape, "--folder", str(place)]
        command += ["--n-sequences", str(n_sequences), "--n-tokens", str(n_tokens)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        if folder is None:
            shutil.rmtree(place)
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{n_sequences} x {n_tokens} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{figures['seconds']:.0f} s, peak {figures['peak_gib']:.2f} GiB")
    print(f"matrix products at {figures['share']:.2f} of {figures['rate'] / 1e9:.0f} billion operations a second")


if __name__ == "__main__":
    flags.run(main)
