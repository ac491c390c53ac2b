"""The two commands on a tiny checkpoint: in this process, or as a person starts them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from bridge.exchange.command_line import flags as flag_reader
from bridge.exchange.tables import TOP_WEIGHTS
from safetensors.torch import load_file

PACKAGE = Path(__file__).parents[1]
SCRIPT = "run_topk_perturb.py"
TEXTS = [f"text number {n} of {'a few' * (n % 4)} words" for n in range(12)]
UP, DENSE = "gpt_neox.layers.1.mlp.dense_h_to_4h", "gpt_neox.layers.0.attention.dense"


def offline(patch):
    """No network, and no target from outside."""
    patch.delenv("TARGET_LAYER", raising=False)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def common_flags(inputs, output):
    """What every command here says."""
    return {
        "model": str(inputs / "model"),
        "data_file": str(inputs / "texts.txt"),
        "dtype": "float64",
        "device": "cpu",
        "max_length": 24,
        "output": str(output),
        "experiment_id": "x",
    }


def words_of(flags):
    """Flags as a command line; None leaves one out."""
    words = []
    for flag, value in flags.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag.replace('_', '-')}", *map(str, values)]
    return words


def load_command(script):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), PACKAGE / "scripts" / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.baseline if "baseline" in script else module.perturb


# what every run here is warned of: the model is random, and the texts are cut at 24 tokens
EXPECTED = ("WARNING: 83 of the 368 tokens", "WARNING: the unperturbed model has a perplexity of")


def call(capfd, flags, script=SCRIPT):
    """Run a command in this process: exit code, stdout, the lines of stderr that are its own, but for ``EXPECTED``."""
    try:
        flag_reader.run(load_command(script), script, words_of(flags))
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    out, err = capfd.readouterr()
    return code, out, complaints_of(script, err)


def complaints_of(script, err):
    own = [line for line in err.splitlines() if line.startswith((script, "Traceback", "WARNING:"))]
    return [line for line in own if not line.startswith(EXPECTED)]


def start(flags, launcher=(), script=SCRIPT):
    """Start a command as a person does, from the package's folder."""
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    python = [sys.executable, *launcher]
    words = [*python, f"scripts/{script}", *words_of(flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=PACKAGE, env=surroundings, stdout=pipe, stderr=pipe, text=True)


def run_of(flags, identifier="x", kind="perturb"):
    return Path(flags["output"]) / f"{kind}_{identifier}"


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


TWO_TARGETS = {"target_layer": [UP, DENSE], "k": [1, 5], "seeds": [0, 1], "perturbation": ["zero", "sign_flip"]}


def write_list(path, checkpoint, weights):
    state = load_file(checkpoint / "model.safetensors")
    rows = [
        {"rank": rank, "layer": layer, "parameter": f"{layer}.weight", "row": row, "col": col,
         "value": state[f"{layer}.weight"][row, col].item(), "score": 1 / rank}
        for rank, (layer, row, col) in enumerate(weights, start=1)
    ]  # fmt: skip
    pd.DataFrame(rows, columns=list(TOP_WEIGHTS.columns)).to_csv(path, index=False)
    return str(path)
