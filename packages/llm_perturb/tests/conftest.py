import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from bridge.exchange.run_folder import RunOptions
from bridge.exchange.tables import TOP_WEIGHTS
from llm_perturb.evaluation.corpus import CorpusOptions
from llm_perturb.evaluation.models import ModelOptions
from llm_perturb.perturbation_options import PerturbationOptions
from llm_perturb.perturbation_run import measure_perturbations
from perturbation_commands import DENSE, TEXTS, UP, common_flags, offline, write_list
from safetensors.torch import load_file
from tiny_models import BUILDERS, build, random_sequences, save_checkpoint

# The last bit of a sum depends on how many threads share it, and tables are compared byte for byte. A command that
# runs in this process would take all cores, also for the tests after it, if nobody had chosen a number.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(params=sorted(BUILDERS))
def model(request):
    """Each tiny model in float64, in eval mode, no parameter requiring a gradient."""
    return build(request.param)


@pytest.fixture
def sequences():
    """Eight random sequences of 2 to 12 tokens, two of the same length."""
    return random_sequences()


@pytest.fixture(scope="session")
def tiny_command(tmp_path_factory):
    """Measure sets of two layers and nine single weights of a tiny checkpoint; gives the output folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder / "model", "neox", n_layers=2)
    (folder / "texts.txt").write_text("".join(f"text number {n} of {'a few' * (n % 4)} words\n" for n in range(12)))
    state = load_file(folder / "model/model.safetensors")
    rows = [
        {"rank": i, "layer": layer, "parameter": f"{layer}.weight", "row": i, "col": i + 1,
         "value": state[f"{layer}.weight"][i, i + 1].item(), "score": 1 / (i + 1)}
        for layer in (UP, DENSE, "gpt_neox.embed_in") for i in range(3)
    ]  # fmt: skip
    pd.DataFrame(rows, columns=list(TOP_WEIGHTS.columns)).to_csv(folder / "single.csv", index=False)

    def run(output, experiment_id, shard=None, **changes):
        chosen = {"target_layer": [UP, DENSE], "k": [1, 5], "per_weight": str(folder / "single.csv"), **changes}
        measure_perturbations(
            options=PerturbationOptions(**chosen, shard=shard),
            model_options=ModelOptions(model=str(folder / "model"), dtype="float64", device="cpu"),
            corpus_options=CorpusOptions(data_file=str(folder / "texts.txt"), max_length=24),
            batch_size=1,
            run_options=RunOptions(output=str(output), experiment_id=experiment_id),
        )
        return Path(output)

    return run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a checkpoint and a corpus, nothing of which any test changes."""
    folder = tmp_path_factory.mktemp("inputs")
    save_checkpoint(folder / "model", "neox", n_layers=2)
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    write_list(folder / "single.csv", folder / "model", [(layer, i, 2) for layer in (UP, DENSE) for i in range(3)])
    return folder


@pytest.fixture
def quiet_surroundings(monkeypatch):
    offline(monkeypatch)


@pytest.fixture
def flags(inputs, tmp_path):
    return common_flags(inputs, tmp_path / "out")
