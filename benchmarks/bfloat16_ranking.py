"""What `--dtype bfloat16` does to a ranking: overlap and order of the top weights, and the loss, against float32.

    packages/critical_weight_analysis/.venv/bin/python benchmarks/bfloat16_ranking.py
    nox -s benchmark -- bfloat16_ranking

The embedded model, 20 of the shipped passages, every metric of the pass. The weights and the products are rounded to
bfloat16, sums and scores are float32 in both. Of each metric and K: how many of the K weights both rankings name,
their Jaccard overlap |A ∩ B| / |A ∪ B|, and Spearman's rho of the ranks of those that both name.
"""

import time

import torch
from bridge.exchange.command_line import flags
from critical_weight_analysis import stability
from critical_weight_analysis.discovery import Discovery, discover, engine_for
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.metrics import METRICS
from llm_perturb.evaluation import models
from llm_perturb.evaluation.corpus import CorpusOptions, count_tokens, read_texts, tokenize
from llm_perturb.evaluation.parameters import in_scope

KS = (100, 500)


def ranked(dtype: str, options: CorpusOptions, batch_size: int) -> tuple[Discovery, int]:
    """The discovery with weights of that dtype, and the number of predicted tokens."""
    loaded = models.load(dtype=dtype)
    sequences = tokenize(read_texts(options), loaded.tokenizer, options).sequences
    engine = engine_for(loaded.model)
    metrics = [metric for metric in METRICS if METRICS[metric].needs <= engine.gives]
    weights, start = in_scope(loaded.model), time.perf_counter()
    found = discover(
        engine,
        loaded.model,
        sequences,
        weights,
        metrics,
        max(KS),
        per_layer=False,
        settings=Settings(batch_size=batch_size),
    )
    print(f"{dtype}: {time.perf_counter() - start:.1f} s, {engine.name} engine", flush=True)
    return found, count_tokens(sequences)


def main(*, texts: int = 20, max_length: int = 512, batch_size: int = 1) -> None:
    """Print the table.

    Args:
        texts: how many of the shipped passages.
        max_length: tokens of a text, at most.
        batch_size: sequences at a time.
    """
    options = CorpusOptions(max_length=max_length, eval_limit=texts)
    wide, n_tokens = ranked("float32", options, batch_size)
    narrow, _ = ranked("bfloat16", options, batch_size)
    nlls = [found.losses.sum().item() / n_tokens for found in (wide, narrow)]
    apart = ((narrow.losses - wide.losses).abs() / wide.losses).max().item()
    print(f"{texts} texts, {n_tokens} predicted tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"loss {nlls[0]:.5f} and {nlls[1]:.5f} nats per token, a difference of {nlls[1] - nlls[0]:+.5f}; ", end="")
    print(f"of one text at most {apart:.2%}")
    print(f"{'metric':20} {'K':>4} {'in common':>9} {'Jaccard':>8} {'rho':>6} {'same first':>11}")
    for metric in wide.rankings:
        for k in KS:
            one, two = (stability.places(found.rankings[metric], k) for found in (wide, narrow))
            row = stability.overlap(one, two)
            first = "yes" if torch.equal(one[0], two[0]) else "no"
            numbers = f"{row['n_common']:9} {row['jaccard']:8.3f} {row['rank_correlation']:6.3f}"
            print(f"{metric:20} {k:4} {numbers} {first:>11}")


if __name__ == "__main__":
    flags.run(main)
