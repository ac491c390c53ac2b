"""What a top-K is to be compared with: weights drawn at random, and the exact global bottom-K.

As in ``ranking`` only arrays of a few K entries are kept, never an object per weight.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from critical_weight_analysis.highest_scores import top_indices, where
from critical_weight_analysis.layerwise.saved_state import State, StateError, nested, within
from critical_weight_analysis.metrics import Sensitivity
from critical_weight_analysis.ranking import Entries, Ranking, gather

PURPOSE = "random control list"


class Controls:
    """Collects the random list and the bottom lists of a run.

    Which weights are in a top-K is known only at the end, and the values pass by only once. So the draw is made
    beforehand, in order and without repetition, of as many weights as all top-Ks together could strike out and
    K besides; ``random`` takes the first K that are in none. That is a uniform draw from the weights outside.

    Args:
        shapes: the shape of every parameter to come, in parameter order.
        metrics: the metrics of the run; the random list shows the scores of the first.
        k: the most that will be asked for.
        seed: of the draw.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], metrics: Sequence[str], k: int, seed: int) -> None:
        self._first = metrics[0]
        self._lowest = {metric: Ranking(shapes, k, per_layer=False) for metric in metrics}
        self._number = {name: number for number, name in enumerate(shapes)}
        ends = torch.tensor([int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()]).cumsum(0)
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
        drawn = _draw(int(ends[-1]), k * (1 + len(self._lowest)), seed)
        number = torch.searchsorted(ends, drawn, right=True)
        unknown = torch.full(drawn.shape, torch.nan, dtype=torch.float64)
        self._drawn = Entries(number, drawn - self._starts[number], unknown, unknown.clone())

    def update(self, metric: str, sensitivity: Sensitivity, scores: Tensor) -> None:
        """Take in the scores of one parameter by one metric, of its stored shape. Once for each of both."""
        lowest, flat = self._lowest[metric], scores.reshape(-1)
        if lowest.bound == -torch.inf:
            index = top_indices(-flat, lowest.k)
        else:
            reached = flat.amin() <= -lowest.bound
            index = where(operator.le, flat, -lowest.bound) if reached else torch.empty(0, dtype=torch.int64)
            index = index[top_indices(-flat[index], lowest.k).to(index.device)].cpu()
        if len(index):
            lowest.add(sensitivity.name, index, gather(sensitivity.weight, index), -gather(scores, index))
        if metric == self._first:
            here = (self._drawn.parameter == self._number[sensitivity.name]).nonzero()[:, 0]
            self._drawn.value[here] = gather(sensitivity.weight, self._drawn.index[here])
            self._drawn.score[here] = gather(scores, self._drawn.index[here])

    def state(self) -> State:
        """The bottom lists so far, and the drawn weights with what is known of them."""
        lowest = {f"lowest/{metric}": ranking.state() for metric, ranking in self._lowest.items()}
        return nested({"drawn": self._drawn.state(), **lowest})

    def restore(self, state: State) -> None:
        """Replace all of it by a state's.

        Raises:
            StateError: the state is of other parameters, metrics or draws.
        """
        drawn = Entries.of_state(within(state, "drawn"))
        if not torch.equal(drawn.parameter, self._drawn.parameter) or not torch.equal(drawn.index, self._drawn.index):
            raise StateError("other control weights were drawn then")
        for metric, ranking in self._lowest.items():
            ranking.restore(within(state, f"lowest/{metric}"))
        self._drawn = drawn

    def bottom(self, metric: str, k: int) -> pd.DataFrame:
        """The K lowest of all weights, lowest first, as rows of TOP_WEIGHTS; ties by (parameter order, row, col)."""
        frame = self._lowest[metric].top(k)
        return frame.assign(score=-frame["score"])

    def random(self, k: int, rankings: Iterable[Ranking]) -> pd.DataFrame:
        """K weights drawn uniformly from those in no ranking's largest top-K, as rows of TOP_WEIGHTS.

        ``rank`` is the order of the draw, so the list of a smaller K is the beginning of that of a larger one;
        ``score`` is by the first metric. Fewer rows where there are not so many weights outside.
        """
        tops = [self._position(ranking.best(ranking.k)) for ranking in rankings]
        outside = ~torch.isin(self._position(self._drawn), torch.cat(tops))
        chosen = self._drawn.take(outside.nonzero()[:k, 0])
        return self._lowest[self._first].rows(chosen, np.arange(1, len(chosen) + 1))

    def _position(self, entries: Entries) -> Tensor:
        """Positions in the line of all parameters laid end to end."""
        return self._starts[entries.parameter] + entries.index


def _draw(n_weights: int, n: int, seed: int) -> Tensor:
    """``n`` different positions of ``n_weights``, or all, in random order."""
    generator = np.random.default_rng([seed, *PURPOSE.encode()])
    return torch.from_numpy(generator.choice(n_weights, size=min(n, n_weights), replace=False))
