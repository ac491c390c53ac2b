"""Measure the perplexity of a model as it is, and keep it for the runs that must agree with it.

accelerate launch --config_file configs/accelerate_config.yaml scripts/run_baseline.py --model gpt2
"""

from bridge import argv
from bridge.errors import RequestError
from llm_perturb import experiment
from llm_perturb.corpus import CorpusOptions, Packing
from llm_perturb.models import DType


def baseline(
    *,
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
    """Measure the perplexity of the unperturbed model and write baseline.json.

    Args:
        model: hub id, local folder or short name; default the embedded model.
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
        experiment_id: its name; default the time.
    """
    if batch_size < 1:
        raise RequestError(f"--batch-size must be at least 1, not {batch_size}")
    options = experiment.ModelOptions(model, revision, dtype, device, trust_remote_code, attn_implementation)
    corpus = CorpusOptions(data_file, dataset, dataset_config, split, text_column, packing, max_length, eval_limit)
    experiment.measure_baseline(options, corpus, batch_size, output, experiment_id)


if __name__ == "__main__":
    argv.run(baseline)
