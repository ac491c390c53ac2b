"""The command that measures the unperturbed model; ``scripts/run_baseline.py`` shows how it is called."""

from bridge.exchange.command_line import flags
from bridge.exchange.run_folder import RunOptions

from llm_perturb.baseline_run import measure_baseline
from llm_perturb.evaluation.corpus import CorpusOptions
from llm_perturb.evaluation.models import ModelOptions


def baseline(*, model: ModelOptions, corpus: CorpusOptions, batch_size: int = 1, run: RunOptions) -> None:
    """Measure the perplexity of the unperturbed model and write baseline.json.

    Args:
        model: the model.
        corpus: the texts.
        batch_size: sequences at a time.
        run: the run folder.
    """
    measure_baseline(model_options=model, corpus_options=corpus, batch_size=batch_size, run_options=run)


def main() -> None:
    """Run the command on the words of the command line."""
    flags.run(baseline)


if __name__ == "__main__":
    main()
