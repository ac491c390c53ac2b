"""The least that a language model must do: predict better than the frequencies of single tokens."""

import math

import torch

from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.perplexity import exp


def unigram_nll(corpus: Corpus, vocabulary: int) -> float:
    """Nats per token of who knows only how often each token occurs in these texts, and never sees the one to predict.

    Each token is predicted from all others, what was not seen by Witten and Bell's rule (1991, IEEE Trans. Inf. Theory
    37, 1085): with c its count, N all predicted tokens, m different ones among them and V in the vocabulary,

        p = (c - 1 + m / V) / (N - 1 + m).

    Frequencies that include the token itself would flatter: in a short text every token would seem frequent. Where this
    is worse than a guess, log V is returned.

    Args:
        corpus: the texts.
        vocabulary: V, the tokens that a model chooses among.
    """
    predicted = torch.cat([sequence[1:] for sequence in corpus.sequences])
    counts = predicted.unique(return_counts=True)[1].double()  # (m,)
    n, m = counts.sum(), len(counts)
    p = (counts - 1 + m / vocabulary) / (n - 1 + m)
    nll: float = (-(counts / n) * p.log()).sum().item()
    return min(nll, math.log(vocabulary))


def baseline_warnings(corpus: Corpus, nll: float, vocabulary: int) -> list[str]:
    """What is wrong with a model that predicts worse than the frequencies of single tokens; empty if it does not.

    Args:
        corpus: the texts.
        nll: nats per token of the unperturbed model.
        vocabulary: the tokens that it chooses among.
    """
    bound = unigram_nll(corpus, vocabulary)
    if nll <= bound:
        return []
    return [
        f"the unperturbed model has a perplexity of {exp(nll):.4g}, and who knows only how often each token occurs in "
        f"these texts has {exp(bound):.4g}: the model is untrained or broken, the texts are not of its kind, or it "
        "needs a BOS token (--window-bos always)"
    ]
