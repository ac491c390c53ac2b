"""Facts about the embedded trained model, which a masking that changes nothing could not produce."""

import pytest
import torch
from critical_weight_analysis.discovery import discover, engine_for
from llm_perturb.evaluation import corpus, models, parameters, perplexity

pytestmark = pytest.mark.real_model
CRITICAL = ("model.layers.11.mlp.down_proj.weight", 507, 1229)


@pytest.fixture(scope="module")
def loaded():
    return models.load()


@pytest.fixture(scope="module")
def passages(loaded):
    options = corpus.CorpusOptions(eval_limit=16)
    return corpus.tokenize(corpus.read_texts(options), loaded.tokenizer, options)


@pytest.fixture(scope="module")
def ranking(loaded, passages):
    scope = parameters.in_scope(loaded.model)
    found = discover(
        engine_for(loaded.model), loaded.model, passages.sequences, scope, ["grad_x_weight"], 100, per_layer=False
    )
    return found.rankings["grad_x_weight"].top(100)


@pytest.fixture(scope="module")
def nll_with_zeros(loaded, passages):
    """The loss, in nats per token, with some weights (parameter, row, col) set to zero by plain indexing."""
    named = dict(loaded.model.named_parameters())

    def measure(chosen):
        saved = [named[name][row, col].item() for name, row, col in chosen]
        for name, row, col in chosen:
            named[name][row, col] = 0
        losses = perplexity.sequence_losses(loaded.model, passages.sequences)
        for (name, row, col), value in zip(chosen, saved, strict=True):
            named[name][row, col] = value
        return losses.sum().item() / passages.n_tokens

    return measure


def test_one_weight_is_critical_and_found(ranking, nll_with_zeros):
    first = [(row.parameter, row.row, row.col) for row in ranking.head(10).itertuples()]
    assert CRITICAL in first
    assert nll_with_zeros([CRITICAL]) - nll_with_zeros([]) > 1


def test_the_global_top_100_destroys_the_model_and_100_random_weights_do_not(loaded, ranking, nll_with_zeros):
    baseline = nll_with_zeros([])
    top = [(row.parameter, row.row, row.col) for row in ranking.itertuples()]
    assert perplexity.exp(nll_with_zeros(top) - baseline) > 1000
    generator = torch.Generator().manual_seed(0)
    matrices = [(name, p) for name, p in parameters.in_scope(loaded.model).items()]
    sizes = torch.tensor([p.numel() for _, p in matrices], dtype=torch.float64)
    names = [matrices[i] for i in torch.multinomial(sizes, 100, replacement=True, generator=generator)]
    drawn = [(name, *(int(torch.randint(size, (), generator=generator)) for size in p.shape)) for name, p in names]
    assert abs(nll_with_zeros(drawn) - baseline) < 0.01
