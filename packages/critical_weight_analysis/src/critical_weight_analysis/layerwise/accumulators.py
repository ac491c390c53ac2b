"""One accumulator for each sum over sequences that the metrics need, of one parameter.

With G_i = dS_i/dθ the gradient of the summed loss of sequence i, G_it the contribution of its position t to it
(G_i = Σ_t G_it), x_t what the parameter is multiplied with there, T_i the number of predicted tokens, N = Σ T_i and n
the number of sequences:

    grad = (1/N) Σ_i G_i                     fisher = (1/n) Σ_i (G_i/T_i)²
    curvature = (1/N) Σ_i G_i²               tokens = (1/N) Σ_i Σ_t G_it²
    inputs = Σ_i Σ_t x_t²

The first three are sums of whole gradients, of which each block of rows arrives by ``add_block``. The last two are sums
over positions, and take the factors of a product over tokens by ``add_positions``. What an embedding gives arrives at
each of them by ``add_rows``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

import torch
from bridge.exchange.errors import RunError
from torch import Tensor, nn

from critical_weight_analysis.layerwise.parameter_uses import Product

SQUARES = frozenset({"fisher", "curvature"})
BY_PRODUCT = frozenset({"tokens", "inputs"})  # known only where a parameter is multiplied with something

Reduce = Callable[[Tensor], None]  # adds what other processes have, in place, to a sum of this one


def wide_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's sums: float32 or wider."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(parameter.shape, dtype=wide_dtype(parameter), device=parameter.device)


class Accumulator(ABC):
    """A sum over sequences, of one parameter."""

    @abstractmethod
    def add_rows(self, i: int, ids: Tensor, gradient: Tensor) -> None:
        """Add what sequence ``i`` gives through an embedding: ids (T,), gradient at its output (T, H)."""

    @abstractmethod
    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        """The sums of all processes, scaled, by field of ``Sensitivity``."""


class GradientSum(Accumulator):
    """grad = (1/N) Σ_i G_i."""

    def __init__(self, parameter: nn.Parameter, lengths: Sequence[int]) -> None:
        self._total, self._n_tokens = _zeros(parameter), sum(lengths)

    def add_block(self, rows: slice, gradient: Tensor) -> None:
        """Add some rows of a gradient (R, C)."""
        self._total[rows].add_(gradient)

    def add_product(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """Add some rows of a gradient that is leftᵀ right, (T, R) and (T, C), without holding it."""
        self._total[rows].addmm_(left.T, right)

    def add_rows(self, i: int, ids: Tensor, gradient: Tensor) -> None:
        """Add what a sequence gives through an embedding."""
        self._total.index_add_(0, ids, gradient)

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        """``grad``."""
        reduce(self._total)
        return {"grad": self._total.div_(self._n_tokens)}


class SquareSums(Accumulator):
    """fisher = (1/n) Σ_i (G_i/T_i)² and curvature = (1/N) Σ_i G_i².

    Where all lengths are the same, one is a multiple of the other, and only one of them is summed.
    """

    def __init__(self, parameter: nn.Parameter, fields: frozenset[str], lengths: Sequence[int]) -> None:
        n, n_tokens = len(lengths), sum(lengths)
        factors = {
            "fisher": [1 / (n * length**2) for length in lengths],
            "curvature": [1 / n_tokens] * n,
        }
        self._fisher_by_curvature = None
        if fields == SQUARES and len(set(lengths)) == 1:
            self._fisher_by_curvature = factors["fisher"][0] / factors["curvature"][0]
            fields = frozenset({"curvature"})
        self._sums = [(field, _zeros(parameter), factors[field]) for field in sorted(fields)]
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by sequence: ids (R,), rows of its gradient (R, C)

    def add_block(self, i: int, rows: slice, gradient: Tensor) -> None:
        """Add the square of some rows of the gradient of sequence ``i``, (R, C)."""
        for _, total, factors in self._sums:
            total[rows].addcmul_(gradient, gradient, value=factors[i])

    def add_block_but(self, i: int, rows: slice, gradient: Tensor, ids: Tensor) -> None:
        """Likewise, but rows ``ids`` (ascending) wait for their other part: Σ_i (a_i + b_i)² needs each a_i.

        Overwrites those rows of ``gradient``.
        """
        bounds = torch.tensor([rows.start, rows.stop], device=ids.device)
        inside = ids[slice(*torch.searchsorted(ids, bounds).tolist())]
        if len(inside):
            self._waiting.setdefault(i, []).append((inside, gradient[inside - rows.start]))
            gradient.index_fill_(0, inside - rows.start, 0)
        self.add_block(i, rows, gradient)

    def add_rows(self, i: int, ids: Tensor, gradient: Tensor) -> None:
        """Add the square of what sequence ``i`` gives through an embedding, together with its rows that wait."""
        self._add_squares_of_rows(i, [(ids, gradient), *self._waiting.pop(i, [])])

    def _add_squares_of_rows(self, i: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        ids, gradient = (torch.cat(side) for side in zip(*parts, strict=True))
        rows, position = ids.unique(return_inverse=True)
        total = gradient.new_zeros(len(rows), gradient.shape[1]).index_add_(0, position, gradient)
        for _, square, factors in self._sums:
            square.index_add_(0, rows, total.square(), alpha=factors[i])

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        """``fisher`` and ``curvature``, or the one of them that is needed."""
        for i in list(self._waiting):  # whatever no embedding has completed
            self._add_squares_of_rows(i, self._waiting.pop(i))
        for _, total, _ in self._sums:
            reduce(total)
        fields = {field: total for field, total, _ in self._sums}
        if self._fisher_by_curvature is not None:
            fields["fisher"] = fields["curvature"] * self._fisher_by_curvature
        return fields


class TokenSquares(Accumulator):
    """tokens = (1/N) Σ_i Σ_t G_it²."""

    def __init__(self, parameter: nn.Parameter, lengths: Sequence[int], name: str) -> None:
        self._total, self._n_tokens, self._name = _zeros(parameter), sum(lengths), name
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by sequence: positions, what each gives to its row

    def add_positions(self, products: Sequence[Product], start: int) -> None:
        """Add Σ_t (Σ_u l_ut r_ut)² / N over the uses u of the parameter to its rows from ``start`` on."""
        dtype = self._total.dtype
        for one, two in combinations_with_replacement(products, 2):
            if len(one.left) != len(two.left):
                raise RunError(f"{self._name} meets several inputs at a position; leave it out with --exclude")
            left = one.left.to(dtype) * two.left.to(dtype)
            right = one.right.to(dtype) * two.right.to(dtype)
            rows = self._total[start : start + left.shape[1]]
            rows.addmm_(left.T, right, alpha=(1 if one is two else 2) / self._n_tokens)

    def wait_for_rows(self, i: int, product: Product, start: int, ids: Tensor) -> None:
        """Keep what each position gives to the row that its own token ``ids`` (T,) will add to, for the mixed term."""
        left, right, _ = product
        dtype = self._total.dtype
        here = ((ids >= start) & (ids < start + left.shape[1])).nonzero()[:, 0]
        own = left[here, ids[here] - start, None].to(dtype) * right[here].to(dtype)
        self._waiting.setdefault(i, []).append((here, own))

    def add_rows(self, i: int, ids: Tensor, gradient: Tensor) -> None:
        """Add what sequence ``i`` gives through an embedding: b² and, with the waiting part a of a position, 2ab."""
        self._total.index_add_(0, ids, gradient.square(), alpha=1 / self._n_tokens)
        for here, own in self._waiting.pop(i, []):
            self._total.index_add_(0, ids[here], own.mul_(gradient[here]), alpha=2 / self._n_tokens)

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        """``tokens``."""
        reduce(self._total)
        return {"tokens": self._total.clamp_(min=0)}  # a square that was added in three parts


class InputSquares(Accumulator):
    """inputs = Σ_i Σ_t x_t², of the rows and of the columns of a matrix, whichever x is multiplied with."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._dtype = wide_dtype(parameter)
        n_rows, n_columns = parameter.shape
        self._of_rows = torch.zeros(n_rows, dtype=torch.float64, device=parameter.device)
        self._of_columns = torch.zeros(n_columns, dtype=torch.float64, device=parameter.device)

    def add_positions(self, products: Sequence[Product], start: int) -> None:
        """Add the inputs of products; those of a part of the rows only once, where the rows begin."""
        if start:
            return
        for product in products:
            x, total = (product.left, self._of_rows) if product.input_is_left else (product.right, self._of_columns)
            total.add_(x.double().square().sum(0))

    def add_input(self, x: Tensor) -> None:
        """Add what the columns are multiplied with at a position without a gradient, (I,)."""
        self._of_columns.add_(x.double().square())

    def add_rows(self, i: int, ids: Tensor, gradient: Tensor) -> None:
        """Count the tokens of a sequence: an embedding multiplies its row with 1."""
        self._of_rows.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float64))

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        """``inputs``."""
        reduce(self._of_rows)
        reduce(self._of_columns)
        return {"inputs": self._of_rows.to(self._dtype)[:, None] + self._of_columns.to(self._dtype)}
