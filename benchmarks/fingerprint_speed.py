"""What the fingerprint of a model costs: seconds for its parameters, its tokenizer, and for reading streamed weights.

    packages/critical_weight_analysis/.venv/bin/python benchmarks/fingerprint_speed.py
    nox -s benchmark -- fingerprint_speed

The embedded model in float32, one thread. Resident parameters are hashed before anything else has touched them, then
again. Streamed ones are read in model order, which hashes each, then again, which hashes none.
"""

import time
from collections.abc import Callable

import torch
from bridge.exchange.command_line import flags
from llm_perturb.evaluation import models
from llm_perturb.evaluation.fingerprint import parameter_digests, tokenizer_digest
from llm_perturb.evaluation.models import LoadedModel
from llm_perturb.evaluation.parameters import named_parameters


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes by the clock."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def read_all(loaded: LoadedModel) -> None:
    """Read each parameter from the checkpoint, and drop it."""
    for name in named_parameters(loaded.model):
        with loaded.checkpoint.present([name]):
            pass


def measure(*, model: str | None = None) -> None:
    """Print the seconds.

    Args:
        model: hub id, local folder or short name; default the embedded model.
    """
    torch.set_num_threads(1)
    models.load(model)  # the embedded one is converted, and its file read, before the clock starts
    begun = time.perf_counter()
    resident = models.load(model)
    loading = time.perf_counter() - begun
    parameters = named_parameters(resident.model)
    n_bytes = sum(parameter.nbytes for parameter in parameters.values())
    print(f"{n_bytes / 1e6:.0f} MB in {len(parameters)} parameters, loaded in {loading:.3f} s")
    for when in ("first", "second"):
        print(f"resident, {when} time: {seconds(lambda: parameter_digests(parameters)):.3f} s")
    print(f"tokenizer: {seconds(lambda: tokenizer_digest(resident.tokenizer)):.3f} s")
    streamed = models.load(model, weights="streamed")
    for what in ("with digests", "without"):
        print(f"streamed, read {what}: {seconds(lambda: read_all(streamed)):.3f} s")


if __name__ == "__main__":
    flags.run(measure)
