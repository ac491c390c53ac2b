"""The discovery for notebooks: from a model in memory to tables, without a run folder."""

from collections.abc import Sequence

import pandas as pd
from bridge.exchange.errors import RequestError, did_you_mean
from llm_perturb.evaluation.parameters import in_scope
from torch import Tensor
from transformers import PreTrainedModel

from critical_weight_analysis import discovery
from critical_weight_analysis.layerwise.batches import first_batch_size
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.metrics import METRICS


def discover(
    model: PreTrainedModel, sequences: list[Tensor], metrics: Sequence[str] = ("grad_x_weight",), k: int = 100
) -> dict[str, pd.DataFrame]:
    """The K weights of highest score among all matrices of a model, by each metric.

    >>> import critical_weight_analysis, llm_perturb
    >>> loaded = llm_perturb.load_model(folder)
    MODEL: folder ...
    >>> corpus = llm_perturb.load_corpus(loaded, eval_limit=4, max_length=32)
    >>> top = critical_weight_analysis.discover(loaded.model, corpus.sequences, ["obd", "magnitude"], k=5)
    >>> top["obd"].columns.tolist()
    ['rank', 'layer', 'parameter', 'row', 'col', 'value', 'score']
    >>> len(top["magnitude"])
    5

    Args:
        model: in eval mode, no parameter requiring a gradient, as ``llm_perturb.load_model`` gives it.
        sequences: each (T_i + 1,) ids, which predict T_i tokens.
        metrics: names of ``metrics.METRICS``.
        k: how many weights.

    Returns:
        By metric, table TOP_WEIGHTS: rank 1 is the highest score; ties by (parameter order, row, col).

    Raises:
        RequestError: no such metric, more weights than there are, or a model that is not causal.
        RunError: a loss or a score is not finite.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise RequestError(f"no metric '{metric}'{did_you_mean(metric, METRICS)}; there are: {', '.join(METRICS)}")
    parameters = in_scope(model)
    n_weights = sum(parameter.numel() for parameter in parameters.values())
    if not 1 <= k <= n_weights:
        raise RequestError(f"k must be from 1 to {n_weights}, the number of weights, not {k}")
    needs = frozenset().union(*(METRICS[metric].needs for metric in metrics))
    engine = discovery.engine_for(model, names=list(parameters), needs=needs)
    settings = Settings(batch_size=first_batch_size(sequences, model.device))
    result = discovery.discover(
        engine, model, sequences, parameters, list(metrics), k, per_layer=False, settings=settings
    )
    return {metric: ranking.top(k) for metric, ranking in result.rankings.items()}
