"""The command ``bridge``: targets, validate, correlate, report, compare.

What brings scipy and matplotlib along is imported by the commands that need it: a wrong flag is answered at once.
"""

from pathlib import Path
from typing import Literal

from bridge.analysis.targets import choose_targets, render
from bridge.exchange import flags
from bridge.exchange.discovery_run import choose_discovery
from bridge.exchange.errors import RequestError
from bridge.exchange.printable import say
from bridge.exchange.run_folder import check_output
from bridge.instrument.plan import Options

Perturbation = Literal["zero", "sign_flip", "scale", "gaussian_noise", "bit_flip", "quantize"]


def targets(
    *,
    from_: list[str],
    top: int = 5,
    by: Literal["count", "score"] = "count",
    controls: int = 0,
    metric: str | None = None,
    k: int | None = None,
    format: Literal["env", "list", "csv"] = "env",
) -> None:
    """Print the most critical layers of a discovery, ready to be used as TARGET_LAYER.

    eval "$(bridge targets --from outputs/)" in a shell, after export TARGET_LAYER, hands them to
    run_topk_perturb.py. Names that mean something to a shell are quoted.

    Args:
        from_: a folder that holds discovery runs (the newest complete one is taken), or one run's folder.
        top: how many layers.
        by: count: layers that hold most of the global top-K come first; score: those of the highest summed score.
        controls: how many further layers, drawn evenly over the whole range of the score's rank.
        metric: the sensitivity metric; by default the first one of the run.
        k: which global top-K to count in; by default the smallest one of the run.
        format: env: TARGET_LAYER="a,b"; list: one a line; csv: with counts, scores and ranks.
    """
    discovery = choose_discovery(from_)
    chosen_metric = discovery.metrics([metric] if metric else None)[0]
    available = discovery.ks(chosen_metric)
    if k is not None and k not in available:
        raise RequestError(f"--k {k}: {discovery.folder} has the global top {', '.join(map(str, available))}")
    top_weights = discovery.top_weights(chosen_metric, k or available[0])
    chosen = choose_targets(top_weights, discovery.summary(chosen_metric), top, controls, by)
    if chosen.empty:
        raise RequestError("no layer was asked for: --top 0 and --controls 0")
    say(*render(chosen, format).split("\n"))


def validate(
    *,
    from_: list[str],
    layers: int = 5,
    control_layers: int = 5,
    all_layers: bool = False,
    metrics: list[str] | None = None,
    k: list[int] | None = None,
    perturbations: list[Perturbation] = ["zero"],  # noqa: B006 (shown by --help, never changed)
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    global_set: bool = True,
    bottom: bool = False,
    single_weights: int = 0,
    factor: float | None = None,
    sigma: float | None = None,
    bit: int | None = None,
    n_bits: int | None = None,
    baseline: str | None = None,
    num_processes: int = 1,
    shard: str | None = None,
    merge: list[str] | None = None,
    output: str | None = None,
    experiment_id: str | None = None,
    perturb_python: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Measure what perturbing the discovered weights really does, and report how well the scores predict it.

    Perturbs the top-K weights of the highest-ranked layers, of control layers from the whole range, and of the
    whole model, with random weights of the same layers for comparison, on the discovery's model and corpus.
    Writes validation_<id>/ with report.html. The same command started again after a kill goes on where it was.

    Args:
        from_: a folder that holds discovery runs (the newest complete one is taken), or one run's folder.
        layers: how many of the highest-ranked layers, by their share of the first metric's global top-K.
        control_layers: how many further layers, drawn evenly over the whole range of the score's rank.
        all_layers: measure every layer instead; slower, but no range is left out.
        metrics: whose top weights are perturbed; by default all metrics of the run.
        k: how many weights of a layer are perturbed; by default the smallest K of the run.
        perturbations: zero, sign_flip, scale, gaussian_noise, bit_flip, quantize.
        seeds: of the random controls, one draw each.
        global_set: also perturb the top-K across all layers at once (target ALL).
        bottom: also perturb the K weights of the lowest score; costs gradients.
        single_weights: how many single weights to perturb one by one, of those that the discovery sampled, over
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
    from bridge.validate import TargetsFailedError
    from bridge.validate import validate as measure_and_report

    options = Options(
        places=from_,
        layers=layers,
        control_layers=control_layers,
        all_layers=all_layers,
        metrics=metrics,
        k=k,
        perturbations=perturbations,
        seeds=seeds,
        global_set=global_set,
        bottom=bottom,
        single_weights=single_weights,
        factor=factor,
        sigma=sigma,
        bit=bit,
        n_bits=n_bits,
        baseline=baseline,
        num_processes=num_processes,
        shard=shard,
        merge=merge,
        output=output,
        experiment_id=experiment_id,
        perturb_python=perturb_python,
        device=device,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    try:
        say(*measure_and_report(options))
    except TargetsFailedError as error:
        say(*error.lines)
        raise


def correlate(*, from_: list[str], seed: int = 0) -> None:
    """Compute a validation's correlations.csv again from its measurements, and print it.

    Args:
        from_: a folder that holds validations (the newest complete one is taken), or one validation's folder.
        seed: of the bootstrap and the permutations.
    """
    from bridge.validation_run import choose_validation

    correlations = choose_validation(from_).write_correlations(seed)
    say(*correlations.to_string(index=False, na_rep="", float_format="{:.4g}".format).split("\n"))


def report(*, from_: list[str]) -> None:
    """Write a validation's report again from its tables.

    Args:
        from_: a folder that holds validations (the newest complete one is taken), or one validation's folder.
    """
    from bridge.validation_run import choose_validation

    validation = choose_validation(from_)
    lines = validation.write_report()
    say(f"report: {validation.folder / 'report.html'}", *lines)


def compare(
    *, from_: list[str], metric: str | None = None, output: str = "outputs/", experiment_id: str | None = None
) -> None:
    """Compare the discoveries of several models: where their critical weights sit and how concentrated they are.

    Where a validation of a discovery lies beside it, also how robust the model is. Writes comparison_<id>/.

    Args:
        from_: two or more folders; of each, the newest complete discovery run of each model is taken.
        metric: the sensitivity metric; by default all that the runs share.
        output: the folder for the new comparison folder.
        experiment_id: names it; by default the time.
    """
    from bridge.compare import compare_folders

    compare_folders([Path(folder) for folder in from_], metric, check_output(output), experiment_id)


def main() -> None:
    """Run the command line."""
    commands = {
        "targets": targets,
        "validate": validate,
        "correlate": correlate,
        "report": report,
        "compare": compare,
    }
    flags.run(commands, name="bridge")
