"""The sums over sequences that the metrics need, of one parameter at a time.

With G_i = dS_i/dθ the gradient of the summed loss of sequence i, T_i its number of predicted tokens, N = Σ T_i and
n the number of sequences: grad = (1/N) Σ_i G_i, fisher = (1/n) Σ_i (G_i/T_i)², curvature = (1/N) Σ_i G_i². The
gradient of a matrix arrives as a product over tokens, in blocks of rows that stay in the processor's cache
while they are added and squared.
"""

from collections.abc import Sequence

import torch
from bridge.errors import RunError
from torch import Tensor, nn

from critical_weight_analysis.metrics import Sensitivity
from critical_weight_analysis.recorder import Parts

SQUARES = frozenset({"fisher", "curvature"})
BLOCK = 1 << 18  # weights of a block


class Sums:
    """What is known so far of one parameter; every ``add_*`` is one whole gradient of one or several sequences.

    Args:
        name: of the parameter.
        parameter: itself.
        needs: which of ``grad``, ``fisher``, ``curvature``.
        lengths: T_i of every sequence of the corpus.
    """

    def __init__(self, name: str, parameter: nn.Parameter, needs: frozenset[str], lengths: Sequence[int]) -> None:
        self.name, self.parameter = name, parameter
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._n_tokens = sum(lengths)
        n, same_length = len(lengths), len(set(lengths)) == 1
        factors = {
            "fisher": [1 / (n * length**2) for length in lengths],
            "curvature": [1 / self._n_tokens] * n,
        }
        squares = sorted(needs & SQUARES)
        self._ratio = {}  # a field that is a multiple of another, because all lengths are the same
        if len(squares) == 2 and same_length:
            self._ratio = {"fisher": ("curvature", factors["fisher"][0] / factors["curvature"][0])}
            squares = ["curvature"]
        self.grad = self._zeros() if "grad" in needs else None
        self.squares = [(field, self._zeros(), factors[field]) for field in squares]
        self._apart: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def _zeros(self) -> Tensor:
        return torch.zeros(self.parameter.shape, dtype=self.dtype, device=self.parameter.device)

    def add(self, i: int, parts: Parts) -> None:
        """The gradient of sequence ``i``, whatever it is made of."""
        if parts.products and not parts.rows and not parts.dense:
            self.add_product(
                i, *(torch.cat(side) if len(side) > 1 else side[0] for side in zip(*parts.products, strict=True))
            )
        elif parts.rows and not parts.products and not parts.dense:
            self.add_rows(i, *(torch.cat(side) for side in zip(*parts.rows, strict=True)))
        else:
            total = sum((dense.to(self.dtype) for dense in parts.dense), self._zeros())
            for left, right in parts.products:
                total.addmm_(left.to(self.dtype).T, right.to(self.dtype))
            for ids, gradient in parts.rows:
                total.index_add_(0, ids, gradient.to(self.dtype))
            self.add_dense(i, total)

    def add_dense(self, i: int, gradient: Tensor) -> None:
        """The gradient of sequence ``i`` itself."""
        self._add(i, slice(None), gradient.to(self.dtype))

    def add_product(self, i: int, left: Tensor, right: Tensor, start: int = 0, apart: Tensor | None = None) -> None:
        """The gradient of sequence ``i``, or some rows of it, as leftᵀ right.

        Args:
            i: the sequence.
            left: (T, R).
            right: (T, C), for a parameter (R, C), or for its rows ``start`` to ``start + R``.
            start: where these rows begin.
            apart: rows (sorted) of which this is only a part; their squares wait until ``add_rows`` brings the
                other part, because Σ_i (a_i + b_i)² needs each a_i.
        """
        left, right = left.to(self.dtype), right.to(self.dtype)
        if not self.squares:
            self.grad[start : start + left.shape[1]].addmm_(left.T, right)
            return
        step = max(1, BLOCK // right.shape[1])
        buffer = torch.empty(min(step, left.shape[1]), right.shape[1], dtype=self.dtype, device=right.device)
        for first in range(0, left.shape[1], step):
            part = left[:, first : first + step]
            rows = slice(start + first, start + first + part.shape[1])
            product = torch.mm(part.T, right, out=buffer[: part.shape[1]])
            if self.grad is not None:
                self.grad[rows].add_(product)
            if apart is not None:
                self._set_apart(i, rows, product, apart)
            self._add_squares(i, rows, product)

    def _set_apart(self, i: int, rows: slice, product: Tensor, apart: Tensor) -> None:
        inside = apart[slice(*torch.searchsorted(apart, torch.tensor([rows.start, rows.stop])).tolist())]
        if len(inside):
            self._apart.setdefault(i, []).append((inside, product[inside - rows.start]))
            product.index_fill_(0, inside - rows.start, 0)

    def add_rows(self, i: int, ids: Tensor, gradient: Tensor) -> None:
        """The gradient of sequence ``i`` through an embedding: ids (T,), gradient at its output (T, H)."""
        ids, gradient = ids.reshape(-1), gradient.reshape(ids.numel(), -1).to(self.dtype)
        if self.grad is not None:
            self.grad.index_add_(0, ids, gradient)
        if self.squares:
            self._square_rows(i, [(ids, gradient), *self._apart.pop(i, [])])

    def _square_rows(self, i: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        ids, gradient = (torch.cat(side) for side in zip(*parts, strict=True))
        rows, position = ids.unique(return_inverse=True)
        total = gradient.new_zeros(len(rows), gradient.shape[1]).index_add_(0, position, gradient)
        for _, square, factor in self.squares:
            square.index_add_(0, rows, total.square(), alpha=factor[i])

    def _add(self, i: int, rows: slice, gradient: Tensor) -> None:
        if self.grad is not None:
            self.grad[rows].add_(gradient)
        self._add_squares(i, rows, gradient)

    def _add_squares(self, i: int, rows: slice, gradient: Tensor) -> None:
        for _, square, factor in self.squares:
            square[rows].addcmul_(gradient, gradient, value=factor[i])

    def finish(self) -> Sensitivity:
        """The sums, scaled.

        Raises:
            RunError: one of them is not finite.
        """
        for i in list(self._apart):  # whatever no embedding has completed
            self._square_rows(i, self._apart.pop(i))
        fields = {field: square for field, square, _ in self.squares}
        for field, (other, ratio) in self._ratio.items():
            fields[field] = fields[other] * ratio
        if self.grad is not None:
            fields["grad"] = self.grad.div_(self._n_tokens)
        for field, total in fields.items():
            if not total.sum().isfinite() and not total.isfinite().all():
                raise RunError(
                    f"{field} of {self.name} is not finite; the model's gradients overflow {self.dtype}, "
                    "load it with a wider --dtype"
                )
        return Sensitivity(self.name, self.parameter.detach(), **fields)
