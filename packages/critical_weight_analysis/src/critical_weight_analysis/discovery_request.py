"""A discovery that can be carried out: its options checked, the model and the texts loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bridge.exchange import run_folder
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation import models
from llm_perturb.evaluation.corpus import Corpus, read_texts, tokenize
from llm_perturb.evaluation.models import LoadedModel
from llm_perturb.evaluation.parameters import in_scope
from torch.nn import Parameter

from critical_weight_analysis import baseline, stability
from critical_weight_analysis.discovery_options import Options


@dataclass(frozen=True)
class RequiredBaseline:
    """The baseline that ``--baseline`` names, with which the run must agree: its file, and what that says."""

    path: str
    content: dict[str, Any]

    def check(self, actual: Mapping[str, Any]) -> None:
        """Compare it with the setup of this run, and with its loss if ``actual`` has it.

        Raises:
            RequestError: something differs.
        """
        baseline.check_same(self.content, actual, self.path)


@dataclass(frozen=True)
class Request:
    """Options that can be carried out, and what they mean."""

    options: Options
    output: Path
    loaded: LoadedModel
    corpus: Corpus
    parameters: dict[str, Parameter]
    baseline: RequiredBaseline | None

    @property
    def n_weights(self) -> int:
        """Scalar weights in scope."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def prepare(options: Options) -> Request:
    """Load and check everything that the options name; cheap checks come before the model.

    Raises:
        RequestError: something is missing, impossible, or not as the baseline says.
    """
    output = run_folder.check_output(options.output)
    required = RequiredBaseline(options.baseline, baseline.read(options.baseline)) if options.baseline else None
    texts = read_texts(options.corpus())
    torch.manual_seed(options.seed)
    loaded = models.load(
        options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        attn_implementation=options.attn_implementation,
        weights=options.weights,
        allow_unused_weights=options.allow_unused_weights,
    )
    corpus = tokenize(texts, loaded.tokenizer, options.corpus(), loaded.max_positions)
    parameters = in_scope(loaded.model, options.scope, options.include, options.exclude)
    request = Request(
        options=options, output=output, loaded=loaded, corpus=corpus, parameters=parameters, baseline=required
    )
    if options.topk[-1] > request.n_weights:
        raise RequestError(f"--topk {options.topk[-1]} is more than the {request.n_weights} weights in scope")
    if options.stability and len(corpus.sequences) < stability.MIN_SEQUENCES:
        raise RequestError(
            f"--stability needs at least {stability.MIN_SEQUENCES} sequences to halve, the corpus has "
            f"{len(corpus.sequences)}"
        )
    if required:
        required.check(baseline.setup(loaded, corpus))
    return request
