"""A run of every kind of a tiny model, the commands in this process, and pickles that tell when they are loaded."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from bridge import cli
from bridge.exchange.command_line import flags
from tiny_models import save_checkpoint

PACKAGES = Path(__file__).parents[1] / "packages"
SCRIPTS = {
    "phase1": PACKAGES / "critical_weight_analysis/phase1_runner.py",
    "baseline": PACKAGES / "llm_perturb/scripts/run_baseline.py",
    "perturb": PACKAGES / "llm_perturb/scripts/run_topk_perturb.py",
    "merge": PACKAGES / "llm_perturb/scripts/merge_shards.py",
}
LAYER = "gpt_neox.layers.1.mlp.dense_h_to_4h"
METRIC = "grad_x_weight"
DISCOVERY, VALIDATION = "critical_analysis_x", "validation_x"
RANKING, PER_LAYER = f"top_3_weights_{METRIC}.csv", f"top_3_per_layer_{METRIC}.csv"
SUMMARY = f"layer_summary_{METRIC}.csv"
CONDITIONS = ["--target-layer", LAYER, "--k", 1, 2, "--seeds", 0]
VALIDATE = ["--layers", 1, "--control-layers", 1, "--seeds", 0, "--k", 1, "--single-weights", 3, "--no-global-set"]
VALIDATE += ["--perturb-python", sys.executable, "--experiment-id", "x", "--device", "cpu"]


class Touch:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def plant(path: Path, marker: Path, form: str = "text") -> None:
    """Put a pickle under a file's name: as lines of text, or as torch saves it."""
    path.parent.mkdir(exist_ok=True, parents=True)
    if form == "torch":
        torch.save(Touch(marker), path)
    else:
        path.write_text(f"cos\nsystem\n(S'touch {marker}'\ntR.\n")


def command_of(name: str) -> flags.Command:
    """The function of a command: of ``bridge``, or of a script."""
    if name not in SCRIPTS:
        return getattr(cli, name)
    spec = importlib.util.spec_from_file_location(name, SCRIPTS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def run(command: str, *words: object) -> int:
    """Run a command in this process; its exit code."""
    name = SCRIPTS[command].name if command in SCRIPTS else f"bridge {command}"
    try:
        flags.run(command_of(command), name, list(map(str, words)))
    except SystemExit as stop:
        return stop.code
    return 0


def setup(folder: Path) -> list[object]:
    """The flags that name the model and the texts of ``make_runs``."""
    return ["--model", folder / "model", "--data-file", folder / "texts.txt", "--max-length", 32, "--device", "cpu"]


def surroundings(patch: pytest.MonkeyPatch) -> None:
    """No network, no threads that wait for each other, no target from outside."""
    patch.delenv("TARGET_LAYER", raising=False)
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr(torch, "set_num_threads", lambda n: None)


def unfinished(folder: Path) -> None:
    """Leave a run as a kill would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))


def make_runs(folder: Path) -> None:
    """Write a model, texts, and in the folder ``out`` a run of every kind."""
    save_checkpoint(folder / "model", "neox", n_layers=2)
    (folder / "texts.txt").write_text("".join(f"text number {n}\n" for n in range(4)))
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch)
        out = [*setup(folder), "--output", folder / "out", "--experiment-id", "x"]
        assert run("phase1", *out, "--topk", 3, "--no-save-plots") == 0
        assert run("baseline", *out) == 0
        assert run("perturb", *out, *CONDITIONS) == 0
        for number in (1, 2):
            assert run("perturb", *out, *CONDITIONS, "--shard", f"{number}/2") == 0
        assert run("validate", "--from", folder / "out", *VALIDATE) == 0
