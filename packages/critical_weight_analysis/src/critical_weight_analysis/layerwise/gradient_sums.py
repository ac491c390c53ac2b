"""The sums over sequences that the metrics need, of one parameter at a time.

With G_i = dS_i/dθ the gradient of the summed loss of sequence i, G_it the contribution of its position t to it
(G_i = Σ_t G_it), x_t what the parameter is multiplied with there, T_i the number of predicted tokens, N = Σ T_i and n
the number of sequences:

    grad = (1/N) Σ_i G_i                     fisher = (1/n) Σ_i (G_i/T_i)²
    curvature = (1/N) Σ_i G_i²               tokens = (1/N) Σ_i Σ_t G_it²
    inputs = Σ_i Σ_t x_t²

The gradient of a matrix arrives as a product over tokens, in blocks of rows that stay in the processor's cache while
the gradients of several sequences are made, added and squared.
"""

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

import torch
from bridge.exchange.errors import RunError
from torch import Tensor, nn

from critical_weight_analysis.layerwise.batches import Batch
from critical_weight_analysis.layerwise.parallel import on_cores
from critical_weight_analysis.layerwise.parameter_uses import GradientPieces, Product, Recorder
from critical_weight_analysis.metrics import Sensitivity

SQUARES = frozenset({"fisher", "curvature"})
BY_PRODUCT = frozenset({"tokens", "inputs"})  # known only where a parameter is multiplied with something
BLOCK = 1 << 18  # weights of a block, on a CPU


PiecesBySequence = list[
    tuple[int, dict[str, GradientPieces]]
]  # of the sequences of a batch, by their numbers; by parameter


def _as_it_is(total: Tensor) -> None:
    """Nothing to add: one process saw every sequence."""


class GradientSums:
    """What is known so far of one parameter; every ``add_*`` is one whole gradient of one or several sequences.

    Args:
        name: of the parameter.
        parameter: itself.
        needs: which of the fields above.
        lengths: T_i of every sequence of the corpus.
        reduce: adds what other processes have, in place, to a sum of this one.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        needs: frozenset[str],
        lengths: Sequence[int],
        reduce: Callable[[Tensor], None] = _as_it_is,
    ) -> None:
        self.name, self.parameter, self._reduce = name, parameter, reduce
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
        self.tokens = self._zeros() if "tokens" in needs else None
        self.inputs = self._zero_inputs() if "inputs" in needs else None
        self.squares = [(field, self._zeros(), factors[field]) for field in squares]
        self._apart: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._paired: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @property
    def by_sequence(self) -> bool:
        """Whether sequences that were run together must be told apart: to be squared, or to leave out the padding."""
        return bool(self.squares) or self.inputs is not None

    def _zeros(self) -> Tensor:
        return torch.zeros(self.parameter.shape, dtype=self.dtype, device=self.parameter.device)

    def _zero_inputs(self) -> tuple[Tensor, Tensor]:
        device = self.parameter.device
        n_rows, n_columns = self.parameter.shape
        return (
            torch.zeros(n_rows, dtype=torch.float64, device=device),
            torch.zeros(n_columns, dtype=torch.float64, device=device),
        )

    def add(self, batch: Sequence[tuple[int, GradientPieces]]) -> None:
        """The gradients of sequences that were run together, whatever each is made of."""
        products = [(i, _joined(parts.products)) for i, parts in batch if parts.products]
        if len(products) == len(batch) and not any(parts.rows or parts.dense for _, parts in batch):
            self._count_positions(batch)
            self.add_products(products, with_positions=False)
            return
        for i, parts in batch:
            if parts.rows and not parts.products and not parts.dense:
                self.add_rows(i, *(torch.cat(side) for side in zip(*parts.rows, strict=True)))
            else:
                self.add_dense(i, self._total(parts))

    def _total(self, parts: GradientPieces) -> Tensor:
        total = sum((dense.to(self.dtype) for dense in parts.dense), self._zeros())
        for left, right, _ in parts.products:
            total.addmm_(left.to(self.dtype).T, right.to(self.dtype))
        for ids, gradient in parts.rows:
            total.index_add_(0, ids, gradient.to(self.dtype))
        return total

    def add_dense(self, i: int, gradient: Tensor) -> None:
        """The gradient of sequence ``i`` itself."""
        if self.tokens is not None or self.inputs is not None:
            raise RunError(f"{self.name} is not only multiplied with inputs; leave it out with --exclude '{self.name}'")
        self._add(i, slice(None), gradient.to(self.dtype))

    def add_products(
        self,
        batch: Sequence[tuple[int, Product]],
        start: int = 0,
        ids: dict[int, Tensor] | None = None,
        with_positions: bool = True,
    ) -> None:
        """The gradients of several sequences, or some rows of them, as leftᵀ right.

        Args:
            batch: of each sequence left (T, R) and right (T, C), for a parameter (R, C), or for its rows ``start`` to
                ``start + R``.
            start: where these rows begin.
            ids: of each sequence (T,), rows to which ``add_rows`` will bring another part of the gradient; their
                squares wait for it, because Σ_i (a_i + b_i)² needs each a_i.
            with_positions: whether what is counted by position is to be counted, too.
        """
        if with_positions:
            self._count_positions([(i, GradientPieces([product])) for i, product in batch], start)
            self._pair(batch, start, ids or {})
        if not self.squares and self.grad is None:
            return
        factors = [(i, left.to(self.dtype), right.to(self.dtype)) for i, (left, right, _) in batch]
        n_rows, n_columns = factors[0][1].shape[1], factors[0][2].shape[1]
        if self.grad is not None and not self.squares:
            for _, left, right in factors:
                self.grad[start : start + n_rows].addmm_(left.T, right)
            return
        rows_of = {} if ids is None else {i: ids[i].unique() for i, *_ in factors}
        step = max(1, BLOCK // n_columns) if self.parameter.device.type == "cpu" else n_rows
        buffer = torch.empty(min(step, n_rows), n_columns, dtype=self.dtype, device=self.parameter.device)
        for first in range(0, n_rows, step):
            rows = slice(start + first, start + min(first + step, n_rows))
            for i, left, right in factors:
                product = torch.mm(left[:, first : first + step].T, right, out=buffer[: rows.stop - rows.start])
                if self.grad is not None:
                    self.grad[rows].add_(product)
                if rows_of:
                    self._set_apart(i, rows, product, rows_of[i])
                self._add_squares(i, rows, product)

    def _set_apart(self, i: int, rows: slice, product: Tensor, apart: Tensor) -> None:
        bounds = torch.tensor([rows.start, rows.stop], device=apart.device)
        inside = apart[slice(*torch.searchsorted(apart, bounds).tolist())]
        if len(inside):
            self._apart.setdefault(i, []).append((inside, product[inside - rows.start]))
            product.index_fill_(0, inside - rows.start, 0)

    def _count_positions(self, batch: Sequence[tuple[int, GradientPieces]], start: int = 0) -> None:
        """What is summed over positions: squares of products of a row and a column, squares of the inputs."""
        for _, parts in batch:
            if self.tokens is not None:
                self._add_squares_of_positions(self.tokens, parts.products, start)
            if self.inputs is not None and start == 0:
                for product in parts.products:
                    x = product.left if product.input_is_left else product.right
                    self.inputs[0 if product.input_is_left else 1].add_(x.double().square().sum(0))

    def _add_squares_of_positions(self, tokens: Tensor, products: Sequence[Product], start: int) -> None:
        """Add Σ_t (Σ_u l_ut r_ut)² / N over the uses u of the parameter to rows of ``tokens``, from ``start`` on."""
        for one, two in combinations_with_replacement(products, 2):
            if len(one.left) != len(two.left):
                raise RunError(f"{self.name} meets several inputs at a position; leave it out with --exclude")
            left = one.left.to(self.dtype) * two.left.to(self.dtype)
            right = one.right.to(self.dtype) * two.right.to(self.dtype)
            rows = tokens[start : start + left.shape[1]]
            rows.addmm_(left.T, right, alpha=(1 if one is two else 2) / self._n_tokens)

    def _pair(self, batch: Sequence[tuple[int, Product]], start: int, ids: dict[int, Tensor]) -> None:
        """Keep what each position gives to the row that its own token will add to."""
        for i, (left, right, _) in batch if self.tokens is not None else ():
            if i in ids:
                here = ((ids[i] >= start) & (ids[i] < start + left.shape[1])).nonzero()[:, 0]
                given = left[here, ids[i][here] - start, None].to(self.dtype) * right[here].to(self.dtype)
                self._paired.setdefault(i, []).append((here, given))

    def add_input(self, x: Tensor) -> None:
        """What the columns are multiplied with at a position without a gradient, (I,)."""
        assert self.inputs is not None, "asked for of a parameter whose inputs are not summed"
        self.inputs[1].add_(x.double().square())

    def add_rows(self, i: int, ids: Tensor, gradient: Tensor) -> None:
        """The gradient of sequence ``i`` through an embedding: ids (T,), gradient at its output (T, H)."""
        ids, gradient = ids.reshape(-1), gradient.reshape(ids.numel(), -1).to(self.dtype)
        if self.grad is not None:
            self.grad.index_add_(0, ids, gradient)
        if self.tokens is not None:
            self.tokens.index_add_(0, ids, gradient.square(), alpha=1 / self._n_tokens)
            for here, given in self._paired.pop(i, []):
                self.tokens.index_add_(0, ids[here], given.mul_(gradient[here]), alpha=2 / self._n_tokens)
        if self.inputs is not None:
            self.inputs[0].index_add_(0, ids, torch.ones_like(ids, dtype=torch.float64))
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
        """The sums over the sequences of all processes, scaled.

        Raises:
            RunError: one of them is not finite.
        """
        for i in list(self._apart):  # whatever no embedding has completed
            self._square_rows(i, self._apart.pop(i))
        fields = {field: square for field, square, _ in self.squares}
        fields |= {field: total for field in ("grad", "tokens") if (total := getattr(self, field)) is not None}
        for total in [*fields.values(), *(self.inputs or ())]:
            self._reduce(total)
        for field, (other, ratio) in self._ratio.items():
            fields[field] = fields[other] * ratio
        if self.grad is not None:
            fields["grad"].div_(self._n_tokens)
        if self.tokens is not None:
            fields["tokens"].clamp_(min=0)  # a square that was added in three parts
        if self.inputs is not None:
            of_rows, of_columns = (side.to(self.dtype) for side in self.inputs)
            fields["inputs"] = of_rows[:, None] + of_columns
        for field, total in fields.items():
            if not total.sum().isfinite() and not total.isfinite().all():
                raise RunError(
                    f"{field} of {self.name} is not finite; the model's gradients overflow {self.dtype}, "
                    "load it with a wider --dtype"
                )
        return Sensitivity(self.name, self.parameter.detach(), **fields)


def pieces_by_sequence(recorder: Recorder, batch: Batch, sums: dict[str, GradientSums]) -> PiecesBySequence:
    """What a batch left in the recorder, sequence by sequence where they must be told apart."""
    if not any(s.by_sequence for s in sums.values()):
        return [(batch.members[0], recorder.pieces())]
    lengths = [len(targets) + 1 for targets in batch.targets]
    n = len(lengths)
    return [(i, recorder.pieces(row, n, lengths[row])) for row, i in enumerate(batch.members)]


def add(found: Sequence[PiecesBySequence], sums: dict[str, GradientSums], device: torch.device) -> None:
    """Add the gradients of some batches to the sums, the largest parameters first."""

    def add_to(name: str) -> None:
        for batch in found:
            sums[name].add([(i, parts[name]) for i, parts in batch])

    names = {name for batch in found for name in batch[0][1]}
    on_cores(device, add_to, sorted(names, key=lambda name: (-sums[name].parameter.numel(), name)))


def _joined(products: Sequence[Product]) -> Product:
    """The products of several uses as one."""
    if len(products) == 1:
        return products[0]
    left, right, _ = zip(*products, strict=True)
    return Product(torch.cat(left), torch.cat(right), products[0].input_is_left)
