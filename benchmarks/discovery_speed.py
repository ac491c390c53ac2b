"""Discovery against an ordinary backward pass: time and peak memory on the embedded model.

    packages/critical_weight_analysis/.venv/bin/python benchmarks/discovery_speed.py
    nox -s benchmark -- discovery_speed

Both run over the same windows of the shipped passages, 8 of 256 predicted tokens. Plain: Hugging Face forward and
backward, the gradient of every weight summed in ``.grad``, at its best batch size among 1, 2, 4 and 8. Discovery:
`grad_x_weight` and `grad_squared` with the exact top 500 (hence top 100) of every matrix and of all of them, at the
batch size that `phase1_runner.py` chooses; then six metrics. Of the pass with two the share of the top-K selection is
shown. The timings alternate inside one process and the fastest of each counts; the processor time, which other work on
the machine disturbs less, stands beside the time on the clock. Peak memory (VmHWM) is that of a process which does
nothing else.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not count as work; read when torch loads

import torch
from bridge.exchange.command_line import flags
from critical_weight_analysis import discovery as scoring
from critical_weight_analysis.discovery import discover, engine_for
from critical_weight_analysis.layerwise.batches import first_batch_size
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.metrics import METRICS
from critical_weight_analysis.ranking import Ranking
from llm_perturb.evaluation import models
from llm_perturb.evaluation.corpus import CorpusOptions, read_texts, tokenize
from llm_perturb.evaluation.models import LoadedModel
from llm_perturb.evaluation.parameters import in_scope
from torch import Tensor

N_SEQUENCES, N_TOKENS, K = 8, 256, 500
TWO = ["grad_x_weight", "grad_squared"]
SIX = [*TWO, "obd", "taylor2", "magnitude", "wanda"]


def windows(loaded: LoadedModel) -> list[Tensor]:
    """The sequences, each (N_TOKENS + 1,)."""
    options = CorpusOptions(packing="windows", max_length=N_TOKENS + 1, eval_limit=N_SEQUENCES)
    sequences = tokenize(read_texts(options), loaded.tokenizer, options).sequences
    assert [len(sequence) for sequence in sequences] == [N_TOKENS + 1] * N_SEQUENCES
    return sequences


def plain(loaded: LoadedModel, sequences: list[Tensor], batch_size: int) -> None:
    """Forward and backward as anyone would write it."""
    loaded.model.requires_grad_(True)
    for start in range(0, len(sequences), batch_size):
        ids = torch.stack(sequences[start : start + batch_size])
        loaded.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    loaded.model.requires_grad_(False)
    loaded.model.zero_grad(set_to_none=True)


def discovery(loaded: LoadedModel, sequences: list[Tensor], metrics: list[str]) -> None:
    """What `phase1_runner.py` does between loading and writing."""
    weights = in_scope(loaded.model)
    engine = engine_for(
        loaded.model, names=list(weights), needs=frozenset().union(*(METRICS[m].needs for m in metrics))
    )
    assert engine.name == "layerwise"
    settings = Settings(batch_size=first_batch_size(sequences, loaded.model.device))
    found = discover(engine, loaded.model, sequences, weights, metrics, K, settings=settings)
    assert all(len(ranking.top(K)) == K for ranking in found.rankings.values())


JOBS: dict[str, Callable[[LoadedModel, list[Tensor]], None]] = {
    **{f"plain, batch {b}": lambda loaded, sequences, b=b: plain(loaded, sequences, b) for b in (1, 2, 4, 8)},
    "discovery, two metrics": lambda loaded, sequences: discovery(loaded, sequences, TWO),
    "discovery, six metrics": lambda loaded, sequences: discovery(loaded, sequences, SIX),
}


def seconds(job: str, loaded: LoadedModel, sequences: list[Tensor]) -> tuple[float, float]:
    """Time on the clock, and processor time of all threads, of one run."""
    start, used = time.perf_counter(), time.process_time()
    JOBS[job](loaded, sequences)
    return time.perf_counter() - start, time.process_time() - used


def selection_share(loaded: LoadedModel, sequences: list[Tensor]) -> float:
    """Which part of a pass with two metrics goes into the selection of the top-K."""
    spent, places = [], [(scoring, "top_indices"), (Ranking, "update"), (Ranking, "top")]
    originals = [getattr(owner, name) for owner, name in places]

    def timed(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent.append(time.perf_counter() - start)
            return result

        return call

    for (owner, name), function in zip(places, originals, strict=True):
        setattr(owner, name, timed(function))
    total, _ = seconds("discovery, two metrics", loaded, sequences)
    for (owner, name), function in zip(places, originals, strict=True):
        setattr(owner, name, function)
    return sum(spent) / total


def peak_gigabytes(job: str) -> float:
    """VmHWM of a process that loads the model and does the job once."""
    command = [sys.executable, __file__, "--only", job]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def do_only(job: str) -> None:
    """The job in this process, then its peak memory as the last line."""
    loaded = models.load()
    JOBS[job](loaded, windows(loaded))
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6)


def compare(repeats: int) -> None:
    """Time everything in turn, then measure memory, and print both."""
    loaded = models.load()
    sequences = windows(loaded)
    print(f"{N_SEQUENCES} x {N_TOKENS} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    seconds("plain, batch 1", loaded, sequences[:1])  # warm up
    rounds = [{job: seconds(job, loaded, sequences) for job in JOBS} for _ in range(repeats)]
    best = {job: tuple(map(min, zip(*(one[job] for one in rounds), strict=True))) for job in JOBS}
    fastest = min((job for job in JOBS if job.startswith("plain")), key=best.get)
    print(f"{'':24} {'clock':>9} {'processor':>11}   both relative to {fastest}")
    for job, times in best.items():
        clock, processor = (mine / base for mine, base in zip(times, best[fastest], strict=True))
        print(f"{job:24} {times[0]:7.1f} s {times[1]:9.1f} s   {clock:5.2f} {processor:5.2f}")
    pairs = zip(best["discovery, six metrics"], best["discovery, two metrics"], strict=True)
    print("six metrics instead of two: " + " ".join(f"{mine / base:.2f}" for mine, base in pairs))
    print(f"selection of the top-K: {selection_share(loaded, sequences):.3f} of the pass with two metrics")
    for job in ("plain, batch 1", fastest, "discovery, two metrics"):
        print(f"{job:24} {peak_gigabytes(job):7.2f} GB peak")


def main(*, repeats: int = 2, only: str | None = None) -> None:
    """Print the ratios and peaks.

    Args:
        repeats: how often each is timed.
        only: do this one job and print its peak memory.
    """
    if only:
        do_only(only)
    else:
        compare(repeats)


if __name__ == "__main__":
    flags.run(main)
