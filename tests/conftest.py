import os
import subprocess
from importlib import resources
from pathlib import Path

import pytest
from finished_runs import make_runs
from hypothesis import HealthCheck, Phase, settings
from tiny_models import save_checkpoint, word_tokenizer

ROOT = Path(__file__).parents[1]
PACKAGES = ROOT / "packages"
HUB_MODELS = {"gpt2": "gpt2", "EleutherAI/pythia-410m": "neox", "EleutherAI/pythia-2.8b": "neox"}

FUZZ = int(os.environ.get("FUZZ", "1"))  # times as many examples; nox -s fuzz sets it


def examples(n: int) -> settings:
    """Settings for a test by hypothesis: the same ``n`` examples each time; with nox -s fuzz more, always others."""
    return settings(
        max_examples=FUZZ * n,
        derandomize=FUZZ == 1,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a failing example is small as it is: one damage
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def fill_hub_cache(home: Path) -> None:
    """Put random checkpoints where the hub's client looks for downloaded ones, under the names of real models."""
    tokenizer = word_tokenizer(resources.files("llm_perturb").joinpath("data/eval_texts.txt").read_text())
    for seed, (name, family) in enumerate(HUB_MODELS.items()):
        place = home / "hub" / f"models--{name.replace('/', '--')}"
        commit = f"{seed:040x}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(commit)
        save_checkpoint(place / "snapshots" / commit, family, seed=seed, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def offline(tmp_path_factory):
    """An environment without a network, whose hub cache holds random models under the names of real ones."""
    home = tmp_path_factory.mktemp("huggingface")
    fill_hub_cache(home)
    environment = {key: value for key, value in os.environ.items() if key not in {"TARGET_LAYER", "PYTHONPATH"}}
    quiet = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} | quiet


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A model, texts, and in the folder ``out`` a run of every kind; nothing of it is changed."""
    folder = tmp_path_factory.mktemp("finished")
    make_runs(folder)
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with the two projects under the names of the guide; what they write stays in it."""
    place = tmp_path_factory.mktemp("workspace")
    links = {
        "critical_weight_analysis": ("critical_weight_analysis", ["phase1_runner.py", ".venv"]),
        "llm_research_project": ("llm_perturb", ["scripts", "configs", ".venv"]),
    }
    for project, (package, names) in links.items():
        (place / project).mkdir()
        for name in names:
            (place / project / name).symlink_to(PACKAGES / package / name)
    (place / "llm_research_project" / "logs").mkdir()
    return place


@pytest.fixture(scope="session")
def shell(offline):
    """Run lines of bash in a folder; the result has stdout, stderr and returncode."""

    def run(lines: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", "set -e -o pipefail\n" + lines],
            cwd=folder,
            env=offline | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run
