"""The command ``bridge``: targets, validate, correlate, report, compare.

The commands import scipy and matplotlib only when they run, so that a wrong flag is answered at once.
"""

from pathlib import Path
from typing import Literal

from bridge.analysis.targets import choose_targets, render
from bridge.exchange.command_line import flags
from bridge.exchange.command_line.flag_table import FilePath
from bridge.exchange.command_line.perturbation_numbers import check_seeds
from bridge.exchange.discovery_run import choose_discovery
from bridge.exchange.errors import RequestError
from bridge.exchange.layout import REPORT_HTML
from bridge.exchange.printable import say
from bridge.exchange.run_folder import RunOptions, check_output
from bridge.instrument.validation_options import ValidationOptions


def targets(
    *,
    from_: list[FilePath],
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
        controls: how many further layers, drawn at random over all kinds of matrix and the whole range of the score.
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


def validate(*, options: ValidationOptions) -> None:
    """Measure what perturbing the discovered weights really does, and report how well the scores predict it.

    Perturbs the top-K weights of the highest-ranked layers, of control layers from the whole range, and of the
    whole model, with random weights of the same layers for comparison, on the discovery's model, and on its texts or
    on others (--eval-data-file).
    Writes validation_<id>/ with report.html. The same command started again after a kill resumes the run.
    """
    from bridge.validate import TargetsFailedError
    from bridge.validate import validate as measure_and_report

    try:
        say(*measure_and_report(options))
    except TargetsFailedError as error:
        say(*error.lines)
        raise


def correlate(*, from_: list[FilePath], seed: int = 0) -> None:
    """Compute a validation's correlations.csv again from its measurements, and print it.

    Args:
        from_: a folder that holds validations (the newest complete one is taken), or one validation's folder.
        seed: of the bootstrap and the permutations.
    """
    from bridge.analysis.correlation import write_correlations
    from bridge.exchange.validation_run import choose_validation

    check_seeds([seed], "--seed")
    correlations = write_correlations(choose_validation(from_), seed)
    say(*correlations.to_string(index=False, na_rep="", float_format="{:.4g}".format).split("\n"))


def report(*, from_: list[FilePath]) -> None:
    """Write a validation's report again from its tables.

    Args:
        from_: a folder that holds validations (the newest complete one is taken), or one validation's folder.
    """
    from bridge.exchange.validation_run import choose_validation
    from bridge.report.html import write_report

    validation = choose_validation(from_)
    lines = write_report(validation)
    say(f"report: {validation.folder / REPORT_HTML}", *lines)


def compare(*, from_: list[FilePath], metric: str | None = None, run: RunOptions) -> None:
    """Compare the discoveries of several models: where their critical weights sit and how concentrated they are.

    Where a validation of a discovery lies beside it, also how robust the model is. Writes comparison_<id>/.

    Args:
        from_: two or more folders; of each, the newest complete discovery run of each model is taken.
        metric: the sensitivity metric; by default all that the runs share.
        run: the comparison's folder.
    """
    from bridge.compare import compare_folders

    compare_folders([Path(folder) for folder in from_], metric, check_output(run.output), run.experiment_id)


def main() -> None:
    """Run the command line."""
    commands: dict[str, flags.Command] = {
        "targets": targets,
        "validate": validate,
        "correlate": correlate,
        "report": report,
        "compare": compare,
    }
    flags.run(commands, name="bridge")
