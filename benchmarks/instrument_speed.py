"""The measuring instrument against ordinary forward passes and against one process per layer, on the embedded model.

    packages/llm_perturb/.venv/bin/python benchmarks/instrument_speed.py
    packages/llm_perturb/.venv/bin/python benchmarks/instrument_speed.py --figures single-weights --weights 64
    nox -s benchmark -- instrument_speed

All on windows of the shipped passages. The yardstick is Hugging Face's own ``model(input_ids, labels=...)`` at its
best batch size among 1, 2, 4 and 8, taken before, in the middle of and after each job; jobs of hundreds of passes
are compared with that many times the time of one. Processor time, which other work on the machine disturbs less,
stands beside the time on the clock; both count all threads of this process.

sweep: the top 100 weights by grad_x_weight and three random sets of every linear layer, gradients included.
processes: the same measurements by one process per layer that loads the model and measures it twice.
single-weights: weights spread over all linear layers set to zero alone, and compared with explicit zeroing.
loss: tokens per second of the unperturbed loss.
two-processes: the command on one target, under accelerate with two processes of one thread, against one of two.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not count as work; read when torch loads

import torch
from bridge.exchange.command_line import flags
from llm_perturb.batched_single_weights import group, linear_maps
from llm_perturb.choose_weights import choose_weights
from llm_perturb.evaluation import models
from llm_perturb.evaluation.corpus import Corpus, CorpusOptions, read_texts, tokenize
from llm_perturb.evaluation.decoder import Decoder
from llm_perturb.evaluation.parameters import layer_of, named_parameters
from llm_perturb.evaluation.perplexity import measure
from llm_perturb.measurement_condition import Condition
from llm_perturb.measurement_plan import Plan
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Target, draw
from llm_perturb.sweep import sweep

Figure = Literal["sweep", "processes", "single-weights", "loss", "two-processes"]
PACKAGE = Path(__file__).parents[1] / "packages" / "llm_perturb"
ZERO = Perturbation("zero")
ONE_LAYER = """
import sys, torch
from llm_perturb.evaluation import models
from llm_perturb.evaluation.corpus import CorpusOptions, read_texts, tokenize
loaded = models.load()
options = CorpusOptions(packing="windows", max_length={length}, eval_limit={number})
ids = torch.stack(tokenize(read_texts(options), loaded.tokenizer, options).sequences)
def loss():
    with torch.no_grad():
        return [loaded.model(input_ids=b, labels=b, use_cache=False).loss.item() for b in ids.split({batch})]
before = loss()
loaded.model.get_parameter("{name}").view(-1)[torch.randperm(100)] = 0
print(sum(loss()) - sum(before))
"""


@dataclass(frozen=True)
class Seconds:
    """Time on the clock, and processor time of all threads."""

    clock: float
    processor: float

    def __truediv__(self, other: "Seconds | float") -> "Seconds":
        clock, processor = (other.clock, other.processor) if isinstance(other, Seconds) else (other, other)
        return Seconds(self.clock / clock, self.processor / processor)

    def __str__(self) -> str:
        return f"{self.clock:8.3f} {self.processor:8.3f}"


def time_of(job: Callable[[], object]) -> Seconds:
    """One run of a job."""
    start, used = time.perf_counter(), time.process_time()
    job()
    return Seconds(time.perf_counter() - start, time.process_time() - used)


def middle(times: Iterable[Seconds]) -> Seconds:
    """The median of each."""
    times = list(times)
    return Seconds(statistics.median(t.clock for t in times), statistics.median(t.processor for t in times))


def windows(loaded: models.LoadedModel, number: int, n_tokens: int) -> Corpus:
    """A corpus of ``number`` sequences that each predict ``n_tokens``."""
    options = CorpusOptions(packing="windows", max_length=n_tokens + 1, eval_limit=number)
    corpus = tokenize(read_texts(options), loaded.tokenizer, options)
    assert len(corpus.sequences) == number, f"the passages hold {len(corpus.sequences)} windows of {n_tokens} tokens"
    return corpus


@torch.no_grad()
def plain(loaded: models.LoadedModel, corpus: Corpus, batch_size: int) -> None:
    """The loss as anyone would write it."""
    for ids in torch.stack(corpus.sequences).split(batch_size):
        loaded.model(input_ids=ids, labels=ids, use_cache=False).loss.item()


class Yardstick:
    """One full pass of Hugging Face over a corpus, timed now and again."""

    def __init__(self, loaded: models.LoadedModel, corpus: Corpus) -> None:
        self.loaded, self.corpus = loaded, corpus
        sizes = [b for b in (1, 2, 4, 8) if b <= len(corpus.sequences)]
        plain(loaded, corpus, 1)
        by_size = {b: middle(self._time(b) for _ in range(3)) for b in sizes}
        self.batch_size = min(sizes, key=lambda b: by_size[b].processor)
        self.times = [by_size[self.batch_size]]

    def _time(self, batch_size: int) -> Seconds:
        return time_of(lambda: plain(self.loaded, self.corpus, batch_size))

    def again(self) -> None:
        """One more timing."""
        self.times.append(self._time(self.batch_size))

    @property
    def pass_(self) -> Seconds:
        """The median of all timings."""
        return middle(self.times)


def report(what: str, seconds: Seconds, ratio: Seconds | None, goal: str = "") -> None:
    """A line: clock and processor time, and what they are relative to the yardstick."""
    relative = f"   ratio {ratio.clock:6.3f} {ratio.processor:6.3f}   {goal}" if ratio else ""
    print(f"{what:58} {seconds} s{relative}", flush=True)


def linear_layers(loaded: models.LoadedModel, step: int = 1) -> list[Target]:
    """Every linear layer of every ``step``-th decoder layer, in model order."""
    named, path = named_parameters(loaded.model), Decoder.of(loaded.model).path
    names = [name for name in named if name in linear_maps(loaded.model)]
    numbers = [int(name[len(path) :].split(".")[1]) for name in names]
    chosen = [name for name, number in zip(names, numbers, strict=True) if number % step == step // 2]
    return [Target(layer_of(name), {name: named[name]}) for name in chosen]


def figure_sweep(loaded: models.LoadedModel, corpus: Corpus, step: int) -> tuple[Seconds, Yardstick]:
    """Top and random sets of the layers in one sweep; gives the time of one measurement."""
    targets = linear_layers(loaded, step)
    plan = Plan(
        targets=targets,
        lists=[],
        ks=[100],
        selections=["top", "random"],
        metrics=["grad_x_weight"],
        perturbations=[ZERO],
        seeds=[0, 1, 2],
    )
    yardstick, own, size = Yardstick(loaded, corpus), [], len(corpus.sequences)
    n = len(plan.conditions())

    def job() -> None:
        baseline = measure(loaded.model, corpus.sequences, size)
        conditions = choose_weights(plan, plan.conditions(), loaded.model, corpus)
        assert sum(1 for _ in sweep(loaded.model, corpus, conditions, baseline.losses, size)) == n

    own.append(time_of(lambda: measure(loaded.model, corpus.sequences, size)))
    whole = time_of(job)
    for _ in range(3):
        yardstick.again()
        own.append(time_of(lambda: measure(loaded.model, corpus.sequences, size)))
    report("one full pass, Hugging Face", yardstick.pass_, None)
    report("one full pass, this instrument", middle(own), middle(own) / yardstick.pass_)
    each = whole / n
    report(f"sweep of {len(targets)} layers x 4 conditions, per measurement", each, each / yardstick.pass_, "<= 0.45")
    report("   the same against full passes of this instrument", each, each / middle(own))
    return each, yardstick


def figure_processes(loaded: models.LoadedModel, corpus: Corpus, each: Seconds, yardstick: Yardstick) -> None:
    """One process per layer, for three layers, against a measurement in the sweep."""
    layers = linear_layers(loaded)[::70]
    length, number = len(corpus.sequences[0]), len(corpus.sequences)
    times = []
    for target in layers:
        (name,) = target.parameters
        code = ONE_LAYER.format(length=length, number=number, batch=yardstick.batch_size, name=name)
        start, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = os.times()
        used = sum(after[2:4]) - sum(before[2:4])  # of children
        times.append(Seconds(time.perf_counter() - start, used))
    report("one process per layer, per measurement", middle(times), middle(times) / each, ">= 5")


def figure_single_weights(loaded: models.LoadedModel, corpus: Corpus, n_weights: int) -> None:
    """Weights over all linear layers, each set to zero alone."""
    targets = linear_layers(loaded)
    nothing = torch.empty(0, dtype=torch.int64)
    conditions = []
    for number in range(n_weights):
        target = targets[number * len(targets) // n_weights]
        position = draw(target.n_weights, 1, nothing, ["benchmark", number])
        conditions.append(Condition(target, "weight", ZERO, 1, None, position, row=number))
    yardstick = Yardstick(loaded, corpus)
    baseline = measure(loaded.model, corpus.sequences)
    found = {}

    def job() -> None:
        for outcome in sweep(loaded.model, corpus, group(loaded.model, conditions), baseline.losses):
            found[outcome.condition.key] = outcome.losses

    whole = time_of(job)
    for _ in range(3):
        yardstick.again()
    each = whole / n_weights
    report("one full pass, Hugging Face", yardstick.pass_, None)
    report(f"{n_weights} single weights, per weight", each, yardstick.pass_ / each, ">= 2.3")
    chosen, alone, worst = conditions[:: max(1, n_weights // 32)], {}, 0.0
    seconds = time_of(
        lambda: alone.update({o.condition.key: o.losses for o in sweep(loaded.model, corpus, chosen, baseline.losses)})
    )
    for key, losses in alone.items():
        worst = max(worst, abs((losses - found[key]).sum().item()) / corpus.n_tokens)
    report(f"{len(chosen)} of them by explicit zeroing, per weight", seconds / len(chosen), None)
    print(f"{'largest difference from explicit zeroing':58} {worst:.2e} nats per token   <= 1e-5", flush=True)


def figure_loss(loaded: models.LoadedModel, corpus: Corpus, repeats: int) -> None:
    """The unperturbed loss of the corpus."""
    yardstick = Yardstick(loaded, corpus)
    sizes = [b for b in (1, 2, 4, 8) if b <= len(corpus.sequences)]
    times: dict[int, list[Seconds]] = {b: [] for b in sizes}
    for _ in range(repeats):
        for b in sizes:
            times[b].append(time_of(lambda b=b: measure(loaded.model, corpus.sequences, b)))
        yardstick.again()
    best = min(sizes, key=lambda b: middle(times[b]).processor)
    for what, size, seconds in [
        ("Hugging Face", yardstick.batch_size, yardstick.pass_),
        ("instrument", best, middle(times[best])),
        ("instrument", 1, middle(times[1])),
    ]:
        speed = f"{corpus.n_tokens / seconds.clock:.0f} tokens per second"
        report(f"loss, {what}, batch {size}, {speed}", seconds, yardstick.pass_ / seconds, ">= 1.5")


def figure_two_processes(number: int, n_tokens: int) -> None:
    """The command on one target, its model loading included."""
    options = f"--packing windows --max-length {n_tokens + 1} --eval-limit {number} --k 100 --selection random"
    options += " --target-layer model.layers.12.mlp.down_proj --seeds " + " ".join(map(str, range(30)))
    times = {}
    for what, n, threads in [("one process of two threads", 1, 2), ("two processes of one thread", 2, 1)]:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate_config.yaml"]
        folder = tempfile.mkdtemp()
        words = [*launcher, "--num_processes", str(n), "scripts/run_topk_perturb.py", *options.split()]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        start, before = time.perf_counter(), os.times()
        command = [sys.executable, *words, "--output", folder]
        subprocess.run(command, check=True, capture_output=True, cwd=PACKAGE, env=environment)
        after = os.times()
        times[n] = Seconds(time.perf_counter() - start, sum(after[2:4]) - sum(before[2:4]))
        report(what, times[n], times[n] / times[1], "<= 1.1")
        shutil.rmtree(folder)


def main(
    *,
    figures: list[Figure] = ("sweep", "processes", "single-weights", "loss", "two-processes"),
    sequences: int = 4,
    tokens: int = 256,
    step: int = 1,
    weights: int = 256,
    repeats: int = 3,
) -> None:
    """Print the ratios, each beside its goal.

    Args:
        figures: which ones.
        sequences: of the corpus.
        tokens: that each of them predicts.
        step: the linear layers of every step-th decoder layer in the sweep; 7 for a quick look.
        weights: single weights to be measured.
        repeats: how often the loss is timed.
    """
    loaded = models.load()
    corpus = windows(loaded, sequences, tokens)
    print(f"{sequences} x {tokens} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':58} {'clock':>8} {'processor':>9}")
    if "loss" in figures:
        figure_loss(loaded, corpus, repeats)
    if "sweep" in figures or "processes" in figures:
        each, yardstick = figure_sweep(loaded, corpus, step)
        if "processes" in figures:
            figure_processes(loaded, corpus, each, yardstick)
    if "single-weights" in figures:
        figure_single_weights(loaded, corpus, weights)
    if "two-processes" in figures:
        figure_two_processes(sequences, tokens)


if __name__ == "__main__":
    flags.run(main)
