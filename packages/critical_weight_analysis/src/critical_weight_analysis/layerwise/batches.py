"""Sequences that are run together, and how far their forward and backward pass has come."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from llm_perturb.evaluation.decoder import Call
from torch import Tensor

from critical_weight_analysis.layerwise.activation_cache import ActivationCache
from critical_weight_analysis.layerwise.parallel import n_cores

_CPU_TOKENS = 512
_GPU_SEQUENCES = 64


@dataclass
class Batch:
    """Some sequences that are run together, padded on the right to the longest.

    The last token of a sequence is run too, as in every other loss of this project, though nothing is predicted there:
    what the model computes may depend on how long a sequence is.

    Attributes:
        members: their numbers in the corpus.
        ids: (B, T), sequences of T_i + 1 tokens, padded.
        targets: of each member, (T_i,): all but the first token.
        cache: results of linear maps, saved for the second forward pass of a layer.
        calls: what each decoder layer is called with, by layer; the hidden state in it is not to be used.
        hidden: (B, T, H), the hidden state that the forward pass has reached.
        gradient: d Σ S_i / d hidden state (B, T, H), where the backward pass has arrived.
    """

    members: list[int]
    ids: Tensor
    targets: list[Tensor]
    cache: ActivationCache
    calls: dict[str, Call] = field(default_factory=dict)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))

    def forget_hidden(self) -> None:
        """Free the hidden state, which the backward pass does not need."""
        self.hidden = torch.empty(0)

    def groups(self, n_tokens: int) -> Iterator[list[int]]:
        """Its rows, as many together as have that many real tokens; one at least."""
        group: list[int] = []
        for row, targets in enumerate(self.targets):
            if group and sum(len(self.targets[other]) for other in group) + len(targets) > n_tokens:
                yield group
                group = []
            group.append(row)
        yield group


def members_of(sequences: list[Tensor], batch_size: int) -> list[list[int]]:
    """Which sequences go together, in as few batches as possible: those of like length, the longest first."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    return [part.tolist() for part in np.array_split(order, -(-len(order) // batch_size))]


def first_batch_size(sequences: list[Tensor], device: torch.device) -> int:
    """How many sequences to try at a time: on the CPU about five hundred tokens for each core."""
    if device.type == "cpu":
        most, at_a_time = max(1, _CPU_TOKENS // (max(map(len, sequences)) - 1)), n_cores(device)
        n_batches = -(-len(sequences) // most)
        n_rounds = -(-n_batches // at_a_time)
        return -(-len(sequences) // (n_rounds * at_a_time))  # so that the last round leaves no core without a batch
    return min(len(sequences), _GPU_SEQUENCES)


def make_batch(members: list[int], sequences: list[Tensor], device: torch.device, cache: ActivationCache) -> Batch:
    """A batch of these sequences, the longest of them first; the padding repeats the last token."""
    length = len(sequences[members[0]])
    ids = torch.stack([F.pad(sequences[i], (0, length))[:length] for i in members])
    for row, i in enumerate(members):
        ids[row, len(sequences[i]) :] = sequences[i][-1]
    targets = [sequences[i][1:].to(device) for i in members]
    return Batch(members=members, ids=ids.to(device), targets=targets, cache=cache)
