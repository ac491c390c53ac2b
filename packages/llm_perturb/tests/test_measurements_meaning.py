"""What a row of the table says, on models where it is easily wrong: zeros among the weights, fused experts."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from bridge.exchange.run_folder import RunOptions
from bridge.exchange.tables import MEASUREMENTS, TOP_WEIGHTS, read_table
from llm_perturb.evaluation.corpus import Corpus, CorpusOptions
from llm_perturb.evaluation.models import ModelOptions
from llm_perturb.evaluation.perplexity import Measured, summarize
from llm_perturb.intervals import perplexity_change_interval
from llm_perturb.measurement_condition import Condition, Outcome
from llm_perturb.measurements_table import row_of
from llm_perturb.perturbation import Perturbation
from llm_perturb.perturbation_options import PerturbationOptions
from llm_perturb.perturbation_run import measure_perturbations
from llm_perturb.selection import Target
from reference import naive_losses
from safetensors.torch import load_file, save_file
from scipy import stats
from tiny_models.checkpoints import save_family
from torch.nn import Parameter
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["a few words", "few a words a few", "words words a few a few", "a a few"]
DOWN, EXPERTS = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.down_proj"


def measured(folder, parameter, indices, singly=False, **options):
    """The rows of a run on a list of weights, given by flat index: all of them together, then each alone."""
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    weight = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).get_parameter(parameter).detach()
    rows = weight.view(weight.shape[0], -1)
    places = [divmod(int(index), rows.shape[1]) for index in indices]
    columns = {
        "rank": range(1, len(places) + 1), "layer": parameter.removesuffix(".weight"), "parameter": parameter,
        "row": [row for row, _ in places], "col": [col for _, col in places],
        "value": [rows[place].item() for place in places], "score": [1 / (1 + rank) for rank in range(len(places))],
    }  # fmt: skip
    pd.DataFrame(columns)[list(TOP_WEIGHTS.columns)].to_csv(folder / "list.csv", index=False)
    measure_perturbations(
        options=PerturbationOptions(target_layer=[parameter], k=[len(places)], selection=["top"], **options,
                                    weights_csv=[str(folder / "list.csv")],
                                    per_weight=str(folder / "list.csv") if singly else None),
        model_options=ModelOptions(model=str(folder), dtype="float64", device="cpu"),
        corpus_options=CorpusOptions(data_file=str(folder / "texts.txt"), max_length=16),
        batch_size=1,
        run_options=RunOptions(output=str(folder), experiment_id="x"),
    )  # fmt: skip
    return read_table(folder / "perturb_x/measurements.csv", MEASUREMENTS)


@pytest.mark.parametrize("perturbation", ["zero", "sign_flip"])
def test_n_changed_counts_the_chosen_weights_that_get_another_value(tmp_path, perturbation):
    save_family(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    state[f"{DOWN}.weight"].view(-1)[::2] = 0
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    table = measured(tmp_path, f"{DOWN}.weight", [0, 1, 2, 3, 5], singly=True, perturbation=[perturbation])
    assert list(table.columns[:8]) == [*list(MEASUREMENTS.columns)[:7], "n_changed"]
    assert table["n_weights"].tolist() == [5, *[1] * 5]
    assert table["n_changed"].tolist() == [3, 0, 1, 0, 1, 1]


def test_quantize_of_fused_experts_measures_a_grid_for_each_output_channel(tmp_path):
    model = save_family(tmp_path, "mixtral")
    with torch.no_grad():
        model.get_parameter(EXPERTS)[0, 3] *= 10
    model.save_pretrained(tmp_path)
    weight = model.get_parameter(EXPERTS)  # (E, O, I)
    table = measured(tmp_path, EXPERTS, range(weight[0].numel()), perturbation=["quantize"], n_bits=3)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sequences = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    model.set_experts_implementation("eager")  # float64
    before = naive_losses(model, sequences).sum()
    for channel in weight.detach().numpy()[0]:
        step = np.abs(channel).max() / 3
        channel[:] = np.round(channel / step) * step
    after = naive_losses(model, sequences).sum()
    assert table.delta_nll[0] == pytest.approx(float(after - before) / sum(len(ids) - 1 for ids in sequences), rel=1e-9)
    assert table.n_changed[0] < table.n_weights[0] == weight[0].numel()  # the largest of each channel stays


def test_every_interval_of_a_row_is_in_the_unit_of_its_column_the_lower_end_first():
    """Seven texts of ten tokens at 2 nats each; the change costs 0.5 nats per token, evenly spread around that."""
    effects = np.array([-3.0, -2, -1, 0, 1, 2, 3]) / 10
    corpus = Corpus([torch.zeros(11, dtype=torch.int64)] * 7, {"corpus_sha256": "c"})
    correct = torch.full((7,), 6)
    baseline = Measured(torch.full((7,), 20.0, dtype=torch.float64), correct)
    measured = Measured(baseline.losses + 10 * torch.tensor(0.5 + effects), correct - 1)
    target = Target("a", {"a.weight": Parameter(torch.ones(4))})
    condition = Condition(target, "top_obd", Perturbation("zero"), 2, None, torch.tensor([3, 1]), 0.25)
    row = row_of(Outcome(condition, measured, 1), baseline, summarize(baseline.losses, corpus), corpus, "tiny")

    half = stats.t.ppf(0.975, 6) * math.sqrt(0.28 / 6 / 7)
    ends = np.array([0.5 - half, 0.5 + half])
    assert row["delta_nll"] == pytest.approx(0.5, rel=1e-12)
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(ends.tolist(), rel=1e-9)
    assert row["ppl_ratio"] == pytest.approx(math.exp(0.5), rel=1e-12)
    assert [row["ppl_ratio_low"], row["ppl_ratio_high"]] == pytest.approx(np.exp(ends).tolist(), rel=1e-9)
    assert [row["perturbed_ppl_low"], row["perturbed_ppl_high"]] == pytest.approx(np.exp(2 + ends).tolist(), rel=1e-9)
    change = perplexity_change_interval(baseline.losses.numpy(), measured.losses.numpy(), np.full(7, 10))
    assert (row["delta_ppl_low"], row["delta_ppl_high"]) == change
    assert row["delta_ppl"] == pytest.approx(math.exp(2.5) - math.exp(2), rel=1e-12)
    assert row["delta_ppl_low"] < row["delta_ppl"] < row["delta_ppl_high"]
    assert (row["n_weights"], row["n_changed"], row["n_clusters"], row["delta_accuracy"]) == (2, 1, 7, -0.1)
