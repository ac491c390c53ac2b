"""The command of the global discovery; ``phase1_runner.py`` shows how it is called."""

from bridge.exchange.command_line import flags
from bridge.exchange.run_folder import RunOptions
from llm_perturb.evaluation.corpus import CorpusOptions
from llm_perturb.evaluation.models import ModelOptions

from critical_weight_analysis.discovery_options import DiscoveryOptions, Options
from critical_weight_analysis.run import run


def phase1(*, discovery: DiscoveryOptions, model: ModelOptions, corpus: CorpusOptions, run_options: RunOptions) -> None:
    """Score every weight and write the exact top-K.

    Args:
        discovery: what is scored, and how.
        model: the model.
        corpus: the texts.
        run_options: the run folder.
    """
    run(Options(**vars(discovery), **vars(model), **vars(corpus), **vars(run_options)))


def main() -> None:
    """Run the command on the words of the command line."""
    flags.run(phase1)
