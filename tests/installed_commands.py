"""Every command of the installed packages, on tiny models made here; ``nox -s wheels`` runs this."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import bridge
import critical_weight_analysis
import llm_perturb
from tiny_models import save_checkpoint

PROGRAMS = Path(sys.executable).parent
HELP = [
    "phase1-runner",
    "run-baseline",
    "run-topk-perturb",
    "merge-shards",
    "bridge",
    *(f"bridge {command}" for command in ("targets", "validate", "correlate", "report", "compare")),
]
CORPUS = "--eval-limit 8 --max-length 64"
PERTURB = f"run-topk-perturb --model models/gpt2 {CORPUS} --target-layer transformer.h.*.mlp.c_fc --k 3"
RUNS = [
    *(f"phase1-runner --model models/{name} {CORPUS} --metric grad_x_weight magnitude --topk 5 --output {name} "
      "--experiment-id d" for name in ("gpt2", "llama")),
    f"run-baseline --model models/gpt2 {CORPUS} --output gpt2 --experiment-id b",
    *(f"{PERTURB} --shard {i}/2 --output shards --experiment-id s" for i in (1, 2)),
    "merge-shards --from shards --output merged --experiment-id m",
    "bridge targets --from gpt2 --top 2",
    "bridge validate --from gpt2 --layers 2 --control-layers 2 --single-weights 6 --num-processes 2 "
    "--baseline gpt2/baseline_b/baseline.json --experiment-id v",
    "bridge correlate --from gpt2",
    "bridge report --from gpt2",
    "bridge compare --from gpt2 llama --output compared --experiment-id c",
]  # fmt: skip
WRITTEN = [
    "gpt2/critical_analysis_d/top_5_weights_grad_x_weight.csv",
    "gpt2/baseline_b/baseline.json",
    "merged/perturb_m/measurements.csv",
    "gpt2/validation_v/report.html",
    "compared/comparison_c/comparison.csv",
]


def run(line: str, folder: Path) -> str:
    """Run a command in a folder, away from the source; what it writes to stdout."""
    print(f"> {line}", flush=True)
    program, *words = line.split()
    away = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "TARGET_LAYER"}}
    done = subprocess.run(
        [str(PROGRAMS / program), *words],
        cwd=folder,
        env=away | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{line}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def main() -> None:
    """Ask every command for its help, then give each a small job."""
    for package in (bridge, critical_weight_analysis, llm_perturb):
        assert Path(package.__file__).is_relative_to(sys.prefix), f"{package.__file__} is not the installed one"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for line in HELP:
            assert run(f"{line} --help", folder), f"{line} --help says nothing"
        for family in ("gpt2", "llama"):
            save_checkpoint(folder / "models" / family, family, n_layers=2)
        for line in RUNS:
            run(line, folder)
        missing = [path for path in WRITTEN if not (folder / path).is_file()]
        assert not missing, f"not written: {missing}"
    print("every command runs from its wheel")


if __name__ == "__main__":
    main()
