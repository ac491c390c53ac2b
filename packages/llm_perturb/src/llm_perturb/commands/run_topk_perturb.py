"""The command that measures what chosen weights cost; ``scripts/run_topk_perturb.py`` shows how it is called."""

from bridge.exchange.command_line import flags
from bridge.exchange.printable import say
from bridge.exchange.run_folder import RunOptions

from llm_perturb.evaluation import parameters
from llm_perturb.evaluation.corpus import CorpusOptions
from llm_perturb.evaluation.models import ModelOptions
from llm_perturb.perturbation_options import PerturbationOptions
from llm_perturb.perturbation_run import measure_perturbations


def perturb(
    *, options: PerturbationOptions, model: ModelOptions, corpus: CorpusOptions, batch_size: int = 1, run: RunOptions
) -> None:
    """Measure the change of perplexity when chosen weights of TARGET_LAYER are perturbed.

    Args:
        options: what is perturbed, and how.
        model: the model.
        corpus: the texts.
        batch_size: sequences at a time.
        run: the run folder.
    """
    if options.list_layers:
        say(*parameters.table(model.load(options.target_layers).model).split("\n"))
        return
    measure_perturbations(
        options=options, model_options=model, corpus_options=corpus, batch_size=batch_size, run_options=run
    )


def main() -> None:
    """Run the command on the words of the command line."""
    flags.run(perturb)


if __name__ == "__main__":
    main()
