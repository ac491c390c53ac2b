"""What a notebook needs: a model, texts, the perplexity, and weights that are perturbed for a while.

The examples are run by the tests with ``folder``, a local checkpoint; a hub id such as ``"gpt2"`` does as well.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from bridge.exchange import layout
from bridge.exchange.errors import RequestError
from bridge.exchange.printable import say
from torch import Tensor
from transformers import PreTrainedModel

from llm_perturb import perturbation as perturbations
from llm_perturb.evaluation.corpus import Corpus, CorpusOptions, Texts, read_texts, tokenize
from llm_perturb.evaluation.models import LoadedModel, ModelOptions
from llm_perturb.evaluation.parameters import all_names, named_parameters
from llm_perturb.evaluation.perplexity import Perplexity, sequence_losses, summarize
from llm_perturb.measurement_condition import values_under
from llm_perturb.perturbation import Kind, Perturbation
from llm_perturb.weights_csv import flat_indices, read_weight_list

Weights: TypeAlias = pd.DataFrame | Mapping[str, Tensor] | str | Path


def load_model(model: str | None = None, **options: Any) -> LoadedModel:  # noqa: ANN401 - typed by ModelOptions
    """Load a causal language model and its tokenizer; the embedded model by default.

    Args:
        model: hub id, local folder or short name.
        options: of ``ModelOptions``: revision, dtype, device, trust_remote_code, allow_unused_weights.

    Raises:
        RequestError: no such model, or a checkpoint that is not all of it or more than it.

    >>> import llm_perturb
    >>> loaded = llm_perturb.load_model(folder, dtype="float64", device="cpu")
    MODEL: folder ...
    >>> loaded.metadata["dtype"], loaded.model.training
    ('float64', False)
    """
    return ModelOptions(model=model, **options).load()


def load_corpus(
    loaded: LoadedModel,
    texts: Sequence[str] | None = None,
    **options: Any,  # noqa: ANN401 - typed by CorpusOptions
) -> Corpus:
    """Tokenize texts for a model: those passed, those that the options name, or the shipped passages.

    Args:
        loaded: the model and its tokenizer.
        texts: each a sequence of its own with the default packing.
        options: of ``CorpusOptions``: data_file, dataset, packing, max_length, eval_limit and others.

    Raises:
        RequestError: options that contradict each other, no text, or one too short to predict a token.

    >>> loaded = llm_perturb.load_model(folder, device="cpu")
    MODEL: folder ...
    >>> corpus = llm_perturb.load_corpus(loaded, ["A first text.", "A second, longer text."], max_length=16)
    >>> len(corpus.sequences)
    2
    """
    corpus_options = CorpusOptions(**options)
    if texts is None:
        read = read_texts(corpus_options)
    elif corpus_options.data_file or corpus_options.dataset:
        raise RequestError("texts and the options data_file and dataset exclude each other")
    else:
        read = Texts(list(texts), "the texts passed")
    corpus = tokenize(read, loaded.tokenizer, corpus_options, loaded.max_positions)
    for warning in corpus.warnings:
        say(f"WARNING: {warning}", stream=sys.stderr)
    return corpus


def perplexity(model: PreTrainedModel, corpus: Corpus, batch_size: int = 1) -> Perplexity:
    """The token-weighted perplexity of a model as it is now: exp(Σ_i S_i / Σ_i T_i), with the loss in nats beside it.

    Args:
        model: a causal language model in eval mode.
        corpus: the sequences, from ``load_corpus``.
        batch_size: sequences at a time.

    Raises:
        RunError: a loss is not finite.

    >>> loaded = llm_perturb.load_model(folder, device="cpu")
    MODEL: folder ...
    >>> corpus = llm_perturb.load_corpus(loaded, ["A first text."])
    >>> measured = llm_perturb.perplexity(loaded.model, corpus)
    >>> measured.n_tokens, measured.ppl > 1
    (12, True)
    """
    return summarize(sequence_losses(model, corpus.sequences, batch_size), corpus)


@contextmanager
def perturbed(
    model: PreTrainedModel, weights: Weights, perturbation: Kind | Perturbation = "zero", seed: int = 0
) -> Iterator[int]:
    """While the block runs, the chosen weights have other values; afterwards they have the same bits as before.

    Args:
        model: the model that is written to.
        weights: a table with the columns ``parameter``, ``row`` and ``col`` (as a discovery's top weights have them;
            ``col`` is empty for a vector), the path of such a CSV of a discovery, or a boolean mask of the stored
            shape for each parameter.
        perturbation: its kind (``zero``, ``sign_flip``, ``scale``, ``gaussian_noise``, ``bit_flip``, ``quantize``),
            or a ``Perturbation`` with numbers of its own.
        seed: of ``gaussian_noise``.

    Yields:
        How many weights have another value than before.

    Raises:
        RequestError: an unknown parameter, an index out of range, a mask of another shape, no weight at all.
        RunError: a weight did not take its new value, or was not restored; both are checked bit by bit.

    >>> import pandas as pd
    >>> model = llm_perturb.load_model(folder, device="cpu").model
    MODEL: folder ...
    >>> name = "gpt_neox.layers.0.attention.dense.weight"
    >>> table = pd.DataFrame({"parameter": [name, name], "row": [0, 2], "col": [1, 3]})
    >>> before = model.get_parameter(name).detach().clone()
    >>> with llm_perturb.perturbed(model, table, "zero") as n_changed:
    ...     n_changed, model.get_parameter(name)[2, 3].item()
    (2, 0.0)
    >>> bool((model.get_parameter(name) == before).all())
    True
    """
    if isinstance(perturbation, str):
        perturbation = Perturbation(kind=perturbation)
    perturbation.check(model.dtype)
    parameters = named_parameters(model)
    chosen = _chosen(model, weights)
    with perturbations.perturbed(parameters, chosen, values_under(perturbation, seed, model)) as n_changed:
        yield n_changed


def _chosen(model: PreTrainedModel, weights: Weights) -> dict[str, Tensor]:
    """For each parameter that has any of the weights, their flat indices, int64 (m,), ascending, each once."""
    parameters, first_names = named_parameters(model), all_names(model)
    if isinstance(weights, str | Path):
        listed = read_weight_list(str(weights), parameters)
        table = pd.DataFrame({"name": listed.names, "index": listed.indices})
    elif isinstance(weights, pd.DataFrame):
        missing = [column for column in layout.WEIGHT_KEY if column not in weights]
        if missing:
            raise RequestError(f"the table of weights lacks the column {', '.join(missing)}")
        rows = weights.reset_index(drop=True)
        rows["parameter"] = rows["parameter"].map(lambda name: first_names.get(name, name))
        table = pd.DataFrame({"name": rows["parameter"], "index": flat_indices(rows, parameters, "the table")})
    else:
        return _of_masks(weights, parameters, first_names)
    if table.empty:
        raise RequestError("there is no weight to perturb")
    return {
        str(name): torch.tensor(sorted(set(group["index"])), dtype=torch.int64)
        for name, group in table.groupby("name", sort=False)
    }


def _of_masks(
    masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor], first_names: Mapping[str, str]
) -> dict[str, Tensor]:
    chosen = {}
    for name, mask in masks.items():
        if name not in first_names:
            raise RequestError(f"the model has no parameter '{name}'")
        expected = parameters[first_names[name]].shape
        if mask.dtype != torch.bool or mask.shape != expected:
            raise RequestError(
                f"the mask of {name} must be boolean of shape {tuple(expected)}, "
                f"not {mask.dtype} of {tuple(mask.shape)}"
            )
        index = mask.reshape(-1).nonzero()[:, 0].cpu()  # (m,)
        if len(index):
            chosen[first_names[name]] = index
    if not chosen:
        raise RequestError("there is no weight to perturb")
    return chosen
