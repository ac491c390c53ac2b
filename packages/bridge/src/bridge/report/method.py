"""What a report's numbers are: the words of its section Method."""

from bridge.report.evidence import Evidence

LOSS = (
    "Loss",
    "L = mean of −log p(token | the tokens before it) over all predicted tokens, in nats; perplexity = exp(L).",
)
EFFECT = (
    "Effect",
    "loss after minus loss before, on the same tokens; 95 % interval by t with the jackknife over texts.",
)
SCORE_OF_A_SET = ("Score of a set", "the scores of its weights added.")
CONTROL = ("Control", "as many random weights of the same target, outside every top set; one draw a seed.")
AGREEMENT = (
    "Agreement",
    "Spearman's ρ between score and effect over layers, interval by bootstrap over layers, or where all were measured "
    "over texts (jackknife); and ρ within kinds of matrix, given kind and depth, p by shuffles within kinds. Claims go "
    "by the latter where there are several kinds, because layers of one kind are alike for reasons of their own. Fewer "
    "than 6 layers show nothing.",
)
SINGLE_WEIGHTS = (
    "Single weights",
    "each perturbed alone, all metrics on the same ones; they are spread over every order of magnitude of rank by each "
    "metric, and rho over all weights of the model counts each 1 / (its probability of being drawn) times. A score is "
    "the size of a change, and taking one weight away may as well lower the loss: the agreement is that of the score "
    "with the absolute change of loss.",
)


def method(evidence: Evidence) -> list[tuple[str, str]]:
    """Name and explanation of everything that is measured."""
    items = [LOSS, EFFECT, SCORE_OF_A_SET, CONTROL, AGREEMENT]
    if len(evidence.weight_correlations):
        items.append(SINGLE_WEIGHTS)
    return items


def metric_definitions(evidence: Evidence) -> list[tuple[str, str]]:
    """Name and definition of every metric that was compared, as the discovery declared it."""
    metrics = dict.fromkeys([*evidence.metrics, *evidence.top_weights])
    return [(metric, evidence.definitions[metric].text) for metric in metrics]
