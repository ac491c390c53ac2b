"""The frequencies of single tokens as the least that a model must do."""

import math

import pytest
import torch
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.unigram import baseline_warnings, unigram_nll


def corpus_of(*sequences):
    return Corpus([torch.tensor([0, *sequence]) for sequence in sequences], {})


def test_each_token_is_predicted_from_all_others():
    """Counts 3, 1 of N = 4, m = 2, V = 10: p = (2 + .2) / 5 three times, (0 + .2) / 5 once."""
    expected = -(3 * math.log(2.2 / 5) + math.log(0.2 / 5)) / 4
    assert unigram_nll(corpus_of([7, 7], [7, 8]), 10) == pytest.approx(expected, rel=1e-12)


def test_tokens_that_never_occur_twice_are_no_better_than_a_guess():
    assert unigram_nll(corpus_of(range(50)), 50) == pytest.approx(math.log(50))


def test_many_tokens_approach_the_entropy_of_their_frequencies():
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    tokens = torch.multinomial(share, 20000, replacement=True, generator=generator).tolist()
    assert unigram_nll(corpus_of(tokens), 4) == pytest.approx(1.75 * math.log(2), rel=0.01)


def test_a_model_worse_than_that_is_warned_about():
    corpus = corpus_of([7, 7, 7, 8])
    bound = unigram_nll(corpus, 10)
    assert baseline_warnings(corpus, bound, 10) == baseline_warnings(corpus, bound - 0.01, 10) == []
    (warning,) = baseline_warnings(corpus, bound + 0.01, 10)
    assert f"has a perplexity of {math.exp(bound + 0.01):.4g}, and who" in warning
    assert f"in these texts has {math.exp(bound):.4g}: " in warning
    assert "--window-bos" in warning
    (warning,) = baseline_warnings(corpus, 1e6, 10)
    assert "has a perplexity of inf, and who" in warning
