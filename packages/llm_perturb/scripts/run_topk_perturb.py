r"""Perturb the top-K, random and bottom-K weights of a layer and measure what each costs in perplexity.

    TARGET_LAYER="gpt_neox.layers.5.mlp.dense_h_to_4h" \
    accelerate launch --config_file configs/accelerate_config.yaml scripts/run_topk_perturb.py

    accelerate launch scripts/run_topk_perturb.py --target-layer transformer.h.5.attn.c_attn --k 1 10 100 \
        --perturbation zero sign_flip --seeds 0 1 2 3 4

    python scripts/run_topk_perturb.py --model gpt2 --list-layers

    python scripts/run_topk_perturb.py --model gpt2 --target-layer transformer.h.* --shard ${SLURM_ARRAY_TASK_ID}/20
"""

import os
from typing import Literal

from bridge import argv
from bridge.errors import RequestError
from llm_perturb import experiment, weights
from llm_perturb.corpus import CorpusOptions, Packing
from llm_perturb.models import DType
from llm_perturb.perturbation import Kind, Perturbation
from llm_perturb.scores import Metric
from llm_perturb.shards import read_shard


def perturb(
    *,
    target_layer: list[str] | None = None,
    k: list[int] = (100,),
    selection: list[Literal["top", "random", "bottom", "matched"]] = ("top", "random", "bottom"),
    metric: list[Metric] = ("grad_x_weight",),
    weights_csv: list[str] | None = None,
    per_weight: str | None = None,
    rows: list[int] | None = None,
    cols: list[int] | None = None,
    perturbation: list[Kind] = ("zero",),
    factor: float = 0.5,
    sigma: float = 1.0,
    bit: int | None = None,
    n_bits: int = 4,
    seeds: list[int] = (0, 1, 2),
    kl: bool = False,
    shard: str | None = None,
    list_layers: bool = False,
    model: str | None = None,
    revision: str | None = None,
    dtype: DType = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    data_file: str | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "test",
    text_column: str = "text",
    packing: Packing = "documents",
    max_length: int = 512,
    eval_limit: int | None = None,
    batch_size: int = 1,
    output: str = "outputs/",
    experiment_id: str | None = None,
) -> None:
    """Measure the change of perplexity when chosen weights of TARGET_LAYER are perturbed.

    Args:
        target_layer: layers or parameters, with or without .weight; ALL for every matrix. Default: the
            environment's TARGET_LAYER (separated by commas).
        k: how many weights; several give a curve.
        selection: top: highest scores; random: controls from the same target; bottom: lowest scores; matched:
            random weights of the same magnitudes as the top.
        metric: the score that top and bottom go by, computed for the target alone.
        weights_csv: take the top weights from these files of a discovery instead.
        per_weight: also perturb each weight of this CSV alone.
        rows: perturb these whole rows of the matrix as stored, and a random one per seed, instead of sets.
        cols: likewise columns.
        perturbation: what is done to the weights.
        factor: of scale.
        sigma: of gaussian_noise, in standard deviations of the tensor.
        bit: of bit_flip, 0 is the lowest; default the highest bit of the exponent.
        n_bits: of quantize.
        seeds: one random control (and one draw of noise) for each.
        kl: also measure the divergence of the predictions, KL(before || after), about twice the time of a loss.
        shard: i/n, from 1/n to n/n: do only this part, on a machine of its own; merge_shards.py puts them together.
        list_layers: print the parameters of the model and stop.
        model: hub id, local folder or short name; default by TARGET_LAYER.
        revision: of the hub.
        dtype: of the weights and the arithmetic.
        device: auto, cpu, cuda, cuda:1, mps.
        trust_remote_code: let a hub model run its own code.
        attn_implementation: eager, sdpa, flash_attention_2 ...; default what the model's configuration asks for.
        data_file: one text a line; default the shipped passages.
        dataset: of the Hugging Face hub, or a local json, jsonl, csv, parquet or txt file.
        dataset_config: its configuration.
        split: its split.
        text_column: its column.
        packing: documents, or windows of equal length.
        max_length: tokens of a sequence at most.
        eval_limit: sequences at most.
        batch_size: sequences at a time.
        output: where the run's folder is made.
        experiment_id: its name; give that of a killed run to resume it.
    """
    targets = target_layer or os.environ.get("TARGET_LAYER", "").split(",")
    targets = [part.strip() for part in targets if part.strip()]
    options = experiment.ModelOptions(model, revision, dtype, device, trust_remote_code, attn_implementation)
    if list_layers:
        print(weights.table(options.load(targets).model))
        return
    if min(k) < 1 or batch_size < 1:
        raise RequestError(f"--k and --batch-size must be at least 1, not {min(*k, batch_size)}")
    request = experiment.Request(
        targets, sorted(set(k)), list(selection), list(metric),
        [Perturbation(kind, factor, sigma, bit, n_bits) for kind in perturbation], list(seeds), weights_csv or [],
        per_weight, rows or [], cols or [], kl,
    )  # fmt: skip
    corpus = CorpusOptions(data_file, dataset, dataset_config, split, text_column, packing, max_length, eval_limit)
    part = read_shard(shard) if shard else None
    experiment.measure_perturbations(request, options, corpus, batch_size, output, experiment_id, part)


if __name__ == "__main__":
    argv.run(perturb)
