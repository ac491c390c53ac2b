#!/usr/bin/env python
"""Phase 1, global discovery: score every weight of a causal language model and write the exact top-K.

python phase1_runner.py --model pythia-2.8b --metric grad_x_weight grad_squared --topk 100 500 --stability 3
python phase1_runner.py --eval-limit 20        # the embedded model, without a network
"""

from bridge.exchange import flags
from critical_weight_analysis.run import DType, Metric, Mode, Options, Packing, Scope, Weights, run


def phase1(
    *,
    model: str | None = None,
    metric: list[Metric] = ("grad_x_weight",),
    topk: list[int] = (100,),
    eval_limit: int | None = None,
    output: str = "outputs/",
    data_file: str | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "test",
    text_column: str = "text",
    packing: Packing = "documents",
    max_length: int = 512,
    batch_size: int | None = None,
    dtype: DType = "float32",
    device: str = "auto",
    revision: str | None = None,
    scope: Scope = "matrices",
    include: list[str] = (),
    exclude: list[str] = (),
    mode: list[Mode] = ("global", "per_layer"),
    baseline: str | None = None,
    experiment_id: str | None = None,
    seed: int = 0,
    stability: int = 0,
    hutchinson_probes: int = 10,
    save_plots: bool = True,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    weights: Weights = "auto",
    allow_unused_weights: list[str] = (),
) -> None:
    """Score every weight and write the exact top-K.

    Args:
        model: hub id, local folder or short name; the embedded model if left out.
        metric: grad_x_weight, grad_squared[_batch|_token], obd, taylor2, magnitude, wanda, hutchinson_diag; or several.
        topk: how many weights a ranking keeps; several in one pass.
        eval_limit: the most sequences of the corpus to use; all if left out.
        output: the folder that the run's own folder is made in.
        data_file: a file with one text a line; without it and dataset, the shipped passages.
        dataset: a data set of the Hugging Face hub, or a local file or folder.
        dataset_config: its configuration, such as wikitext-2-raw-v1.
        split: its split.
        text_column: its column that holds the text.
        packing: documents, each text on its own; windows, all joined and cut into equal pieces.
        max_length: the most tokens of a sequence; of a window, exactly this many.
        batch_size: sequences at a time; found automatically if left out. Changes no number beyond rounding.
        dtype: of the weights and the forward pass; sums and scores are float32 or wider.
        device: auto, cpu, cuda, cuda:1, mps.
        revision: branch, tag or commit of the model on the hub.
        scope: matrices, every parameter of two or more dimensions; all, biases and norms too.
        include: name patterns such as '*.mlp.*'; only parameters that match one.
        exclude: name patterns; no parameter that matches one.
        mode: global, the top-K of all weights; per_layer, of each parameter.
        baseline: a baseline.json of run_baseline.py; stop if this run's setup, weights or loss are others.
        experiment_id: the name of the run's folder after critical_analysis_; the time if left out.
        seed: of the random control list, the halves of --stability and the signs of hutchinson_diag.
        stability: how many times to discover two random halves of the corpus and compare; one more pass each.
        hutchinson_probes: of hutchinson_diag; each costs two to three backward passes over the corpus.
        save_plots: whether to draw the plots; --no-save-plots for none.
        trust_remote_code: run the model's own code.
        attn_implementation: eager, sdpa, flash_attention_2 ...; what the model's configuration asks for if left out.
        weights: resident, in memory; streamed, read from the checkpoint one layer at a time; auto, by their size.
        allow_unused_weights: name patterns of stored tensors that the model has no place for and may be left out.
    """
    run(Options(**locals()))


if __name__ == "__main__":
    flags.run(phase1)
