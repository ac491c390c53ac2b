"""Measure the unperturbed model and write ``baseline.json``."""

from dataclasses import asdict
from typing import Any

from bridge.exchange import layout
from bridge.exchange.atomic_file import write_json
from bridge.exchange.errors import RequestError
from bridge.exchange.printable import say
from bridge.exchange.run_folder import Run, RunOptions, check_output, open_run

from llm_perturb.evaluation.causality import check_causal
from llm_perturb.evaluation.corpus import Corpus, CorpusOptions, read_texts, tokenize
from llm_perturb.evaluation.models import LoadedModel, ModelOptions
from llm_perturb.evaluation.perplexity import Perplexity, check_padding, sequence_losses, summarize
from llm_perturb.evaluation.processes import Processes
from llm_perturb.evaluation.unigram import baseline_warnings


def measure_baseline(
    *, model_options: ModelOptions, corpus_options: CorpusOptions, batch_size: int, run_options: RunOptions
) -> None:
    """Measure the perplexity of a model as it is, in a run folder of its own.

    Args:
        model_options: the model.
        corpus_options: the texts.
        batch_size: sequences at a time.
        run_options: the run folder.

    Raises:
        RequestError: the options cannot be carried out.
        RunError: a loss is not finite.
    """
    if batch_size < 1:
        raise RequestError(f"--batch-size must be at least 1, not {batch_size}")
    processes = Processes(model_options.device)
    output = check_output(run_options.output)
    texts = read_texts(corpus_options)
    loaded = model_options.load()
    check_causal(loaded.model, batch_size)
    corpus = tokenize(texts, loaded.tokenizer, corpus_options, loaded.max_positions)
    if processes.first:
        identity = setup_identity(model_options, corpus_options, loaded, corpus, batch_size)
        run = open_run(output, layout.BASELINE, identity, run_options.experiment_id, fingerprint=loaded.fingerprint)
        with run.recorded():
            tell_of_texts(run, corpus)
            losses = sequence_losses(loaded.model, corpus.sequences, batch_size, "baseline")
            check_padding(loaded.model, corpus.sequences, losses, batch_size)
            write_baseline(run, loaded, corpus, summarize(losses, corpus))
        say(f"baseline written to {run.folder / layout.BASELINE_FILE}")
    processes.close()


def setup_identity(
    model_options: ModelOptions, corpus_options: CorpusOptions, loaded: LoadedModel, corpus: Corpus, batch_size: int
) -> dict[str, Any]:
    """What the numbers of a run depend on beside the perturbations; the batch size, too, as it decides rounding."""
    options = asdict(model_options) | asdict(corpus_options)
    options |= {"model": loaded.metadata["id"], "batch_size": batch_size}
    del options["device"]
    return {"options": options, "model": loaded.metadata, "corpus": corpus.metadata}


def tell_of_texts(run: Run, corpus: Corpus) -> None:
    """Print what was read, and warn of what of it is not measured."""
    say(corpus.summary)
    for warning in corpus.warnings:
        run.warn(warning)


def write_baseline(run: Run, loaded: LoadedModel, corpus: Corpus, perplexity: Perplexity) -> None:
    """Write ``baseline.json``, print the perplexity, and warn of a model that predicts nothing."""
    content = {
        "model": loaded.metadata["id"],
        "revision": loaded.metadata["revision"],
        "dtype": loaded.metadata["dtype"],
        **loaded.fingerprint.totals,
        "corpus_sha256": corpus.metadata["corpus_sha256"],
        **perplexity.as_dict(),
    }
    write_json(run.folder / layout.BASELINE_FILE, content)
    say(
        f"BASELINE_PERPLEXITY: {perplexity.ppl:.6g}  ({perplexity.nll:.6f} nats per token, "
        f"{perplexity.n_tokens} tokens, {perplexity.n_sequences} sequences)"
    )
    for warning in baseline_warnings(corpus, perplexity.nll, loaded.model.config.get_text_config().vocab_size):
        run.warn(warning)
