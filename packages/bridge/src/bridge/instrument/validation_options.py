"""The flags of ``bridge validate``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from bridge.analysis.layer_sample import DEFAULT_LAYERS
from bridge.exchange.command_line.flag_table import FilePath
from bridge.exchange.command_line.perturbation_numbers import PERTURBATION_OF, check_seeds, numbers_set
from bridge.exchange.errors import RequestError
from bridge.instrument.texts import EvaluationTexts

Perturbation = Literal["zero", "sign_flip", "scale", "gaussian_noise", "bit_flip", "quantize"]


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(EvaluationTexts):
    """The validation.

    Attributes:
        from_: a folder that holds discovery runs (the newest complete one is taken), or one run's folder.
        layers: how many of the highest-ranked layers, by their share of the first metric's global top-K, are certain.
        control_layers: how many further layers, drawn at random over all kinds of matrix and the whole range of the
            score; all where there are no more. A rho of 0.5 within 7 kinds is shown by 40 in 85 %, by 20 in 46 %.
        all_layers: measure every layer instead; slower, but nothing has to be estimated.
        draw_seed: of the draw of layers and of single weights.
        metrics: whose top weights are perturbed; by default all metrics of the run.
        primary: whose agreement is the primary analysis, at the first k and under the first perturbation; all else is
            exploratory. By default the first of the metrics that is not the baseline.
        k: how many weights of a layer are perturbed; by default the smallest K of the run.
        perturbations: what is done to the weights.
        seeds: of the random controls, one draw each.
        global_set: also perturb the top-K across all layers at once (target ALL).
        bottom: also perturb the K weights of the lowest score; costs gradients.
        single_weights: how many single weights to perturb one by one, drawn of those that the discovery sampled, over
            every order of magnitude of rank by each of the metrics; compares all on the same weights.
        factor: of the perturbation scale; by default the instrument's own.
        sigma: of gaussian_noise, in standard deviations of the tensor; likewise.
        bit: of bit_flip, 0 is the lowest; by default the highest bit of the exponent.
        n_bits: of quantize.
        baseline: a baseline.json of run_baseline.py; refuse if the discovery's setup or loss differs from it.
        num_processes: how many processes share the measurements, each on its own GPU where there are any.
        shard: i/n, measure only the i-th of n parts, of which each may be on another machine; see merge.
        merge: the folders that hold all finished parts: put them together and report, instead of measuring.
        output: the folder for the new validation folder; by default where the discovery run's folder is.
        experiment_id: names the folder; by default the time, or the unfinished run of the same request.
        perturb_python: the Python that has llm_perturb; by default its own environment.
        device: auto, cpu, cuda, cuda:1, mps.
        batch_size: sequences at once.
        trust_remote_code: run code that comes with the model, if the discovery did.
    """

    from_: list[FilePath]
    layers: int = 0
    control_layers: int = DEFAULT_LAYERS
    all_layers: bool = False
    draw_seed: int = 0
    metrics: list[str] | None = None
    primary: str | None = None
    k: list[int] | None = None
    perturbations: list[Perturbation] = field(default_factory=lambda: ["zero"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    global_set: bool = True
    bottom: bool = False
    single_weights: int = 0
    factor: float | None = None
    sigma: float | None = None
    bit: int | None = None
    n_bits: int | None = None
    baseline: str | None = None
    num_processes: int = 1
    shard: str | None = None
    merge: list[FilePath] | None = None
    output: str | None = None
    experiment_id: str | None = None
    perturb_python: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    trust_remote_code: bool = False

    def check_ranges(self) -> None:
        """Check what no table is needed for.

        Raises:
            RequestError: a number is out of its range.
        """
        check_seeds(self.seeds)
        if self.batch_size is not None:
            _check_at_least("batch-size", [self.batch_size], 1)
        _check_at_least("single-weights", [self.single_weights], 0)
        _check_at_least("draw-seed", [self.draw_seed], 0)

    def numbers(self) -> dict[str, float]:
        """The parameters of the perturbations, as far as they were set.

        Raises:
            RequestError: one is of a perturbation that was not asked for.
        """
        values = {name: getattr(self, name) for name in PERTURBATION_OF}
        return numbers_set(values, self.perturbations, "--perturbations")


def _check_at_least(flag: str, values: Sequence[int], least: int) -> None:
    if min(values) < least:
        raise RequestError(f"--{flag} must be at least {least}, not {min(values)}")
