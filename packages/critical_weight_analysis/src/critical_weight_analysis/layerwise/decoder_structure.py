"""What the layer-by-layer engine needs to know of a model's decoder, as ``probe`` has seen it."""

from dataclasses import dataclass

from llm_perturb.evaluation.decoder import Decoder
from torch import nn


@dataclass(frozen=True)
class Structure:
    """A decoder: what is before its layers, the layers, what is after them, the output head.

    Attributes:
        decoder: the walk through the layers.
        head: the output head; its weight may be the embedding's.
        plain_head: whether the logits are what the head returns for the last hidden state, and nothing else.
        causal: whether what follows a token leaves its hidden state as it is, so that padding on the right does.
        by_batch: the parameters whose gradients can be told apart by sequence when several are run as a batch.
        by_product: the parameters that act as the weight of a linear map or the table of an embedding, and not else.
        before: the parameters that act before the first layer.
        unneeded: the weights (by id) of the layers' linear maps whose results no gradient depends on.
    """

    decoder: Decoder
    head: nn.Linear
    plain_head: bool
    causal: bool
    by_batch: frozenset[str]
    by_product: frozenset[str]
    before: frozenset[str]
    unneeded: frozenset[int]
