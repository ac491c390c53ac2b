"""Discovery against the predecessor's procedure on the predecessor's own workload: 50 short texts, two metrics.

    packages/critical_weight_analysis/.venv/bin/python benchmarks/predecessor_speed.py
    nox -s benchmark -- predecessor_speed

The predecessor's procedure, written anew here: for each of `grad_x_weight` and `grad_squared` a pass of its own over
the texts, one text at a time, ``model(input_ids, labels).loss.backward()`` into ``.grad``; then, for every weight of
every matrix, a Python tuple (score, name, index), and the K highest of them. (Its gradient is of the mean of the texts'
means and its square that of the mean gradient: the time is compared here, not the result.) The tuples go through
``heapq.nlargest``, which keeps K of them; a list of all, sorted, would need more than 15 GB here.

Ours: `phase1_runner.py`'s `discover` with both metrics in one pass, the exact top-K of all weights. The passages that
are shipped are cut to ``--max-length`` tokens. Both run once, in one process. ``--share`` below 1 gives that share of
each matrix's weights to the Python top-K and multiplies its time accordingly; the output says so.
"""

import heapq
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from bridge.exchange.command_line import flags
from critical_weight_analysis.discovery import discover, engine_for
from critical_weight_analysis.layerwise.batches import first_batch_size
from critical_weight_analysis.layerwise.pass_settings import Settings
from llm_perturb.evaluation import models
from llm_perturb.evaluation.corpus import CorpusOptions, count_tokens, read_texts, tokenize
from llm_perturb.evaluation.models import LoadedModel
from llm_perturb.evaluation.parameters import in_scope
from torch import Tensor
from torch.nn import Parameter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not count as work; read when torch loads

METRICS = {"grad_x_weight": lambda w: (w * w.grad).abs(), "grad_squared": lambda w: w.grad.square()}
K = 100


def timed(function: Callable, *arguments: object) -> np.ndarray:
    """Seconds on the clock, and processor time of all threads, which other work on the machine disturbs less."""
    start, used = time.perf_counter(), time.process_time()
    function(*arguments)
    return np.array([time.perf_counter() - start, time.process_time() - used])


def accumulate(loaded: LoadedModel, sequences: list[Tensor]) -> None:
    """One text at a time, the gradients of the mean losses summed in ``.grad``."""
    loaded.model.requires_grad_(True)
    loaded.model.zero_grad(set_to_none=True)
    for sequence in sequences:
        loaded.model(input_ids=sequence[None], labels=sequence[None]).loss.backward()
    loaded.model.requires_grad_(False)


def tuples(parameters: dict[str, Parameter], metric: str, share: float) -> Iterator[tuple[float, str, int]]:
    """One Python object for each weight, or for the first ``share`` of each matrix."""
    for name, parameter in parameters.items():
        scores = METRICS[metric](parameter).flatten()
        for index, score in enumerate(scores[: round(share * len(scores))].tolist()):
            yield score, name, index


def predecessor(loaded: LoadedModel, sequences: list[Tensor], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the passes, and of the top-K in Python, both metrics together."""
    parameters, passes, selection = in_scope(loaded.model), np.zeros(2), np.zeros(2)
    for metric in METRICS:
        passes += timed(accumulate, loaded, sequences)
        selection += timed(heapq.nlargest, K, tuples(parameters, metric, share)) / share
    loaded.model.zero_grad(set_to_none=True)
    return passes, selection


def ours(loaded: LoadedModel, sequences: list[Tensor], batch_size: int) -> None:
    """Both metrics in one pass."""
    engine = engine_for(loaded.model)
    discover(
        engine,
        loaded.model,
        sequences,
        in_scope(loaded.model),
        list(METRICS),
        K,
        settings=Settings(batch_size=batch_size),
    )


def main(*, texts: int = 50, max_length: int = 32, batch_size: int | None = None, share: float = 1.0) -> None:
    """Print both times and the ratio.

    Args:
        texts: how many.
        max_length: tokens of a text, at most.
        batch_size: of our pass, by default what `phase1_runner.py` chooses; the predecessor's is 1.
        share: of the weights that go through the top-K in Python; its time is scaled up.
    """
    loaded = models.load()
    options = CorpusOptions(max_length=max_length, eval_limit=texts)
    sequences = tokenize(read_texts(options), loaded.tokenizer, options).sequences
    n_weights = sum(parameter.numel() for parameter in in_scope(loaded.model).values())
    words = len(sequences), count_tokens(sequences), n_weights, torch.get_num_threads(), torch.__version__
    print("{} texts, {} predicted tokens, {} weights, {} threads, torch {}".format(*words), flush=True)
    batch_size = batch_size or first_batch_size(sequences, loaded.model.device)
    accumulate(loaded, sequences[:2])  # warm up
    loaded.model.zero_grad(set_to_none=True)
    new = timed(ours, loaded, sequences, batch_size)
    passes, selection = predecessor(loaded, sequences, share)
    scaled = "" if share == 1 else f", extrapolated from {share:g} of each matrix's weights"
    print(f"{'':40} {'clock':>9} {'processor':>11}")
    rows = {
        f"both metrics in one pass, batch size {batch_size}": new,
        "predecessor's procedure, two passes": passes,
        f"... and the top {K} in Python{scaled}": selection,
    }
    for words, (clock, processor) in rows.items():
        print(f"{words:40} {clock:7.1f} s {processor:9.1f} s")
    print("times faster: {:.1f} by the clock, {:.1f} by the processor".format(*(passes + selection) / new))
    print("of the passes alone: {:.1f} by the clock, {:.1f} by the processor".format(*passes / new))


if __name__ == "__main__":
    flags.run(main)
