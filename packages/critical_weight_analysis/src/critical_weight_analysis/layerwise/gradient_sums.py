"""The sums over sequences of one parameter at a time: every piece of its gradient goes to the accumulators.

The gradient of a matrix arrives as a product over tokens, in blocks of rows that stay in the processor's cache while
the gradients of several sequences are made, added and squared.
"""

from collections.abc import Sequence

import torch
from bridge.exchange.errors import RunError
from torch import Tensor, nn

from critical_weight_analysis.layerwise.accumulators import (
    SQUARES,
    Accumulator,
    GradientSum,
    InputSquares,
    Reduce,
    SquareSums,
    TokenSquares,
    wide_dtype,
)
from critical_weight_analysis.layerwise.batches import Batch
from critical_weight_analysis.layerwise.parallel import on_cores
from critical_weight_analysis.layerwise.parameter_uses import GradientPieces, Product, Recorder
from critical_weight_analysis.metrics import Sensitivity

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
        needs: which of the fields of ``Sensitivity`` that the accumulators give.
        lengths: T_i of every sequence of the corpus.
        reduce: adds what other processes have, in place, to a sum of this one.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        needs: frozenset[str],
        lengths: Sequence[int],
        reduce: Reduce = _as_it_is,
    ) -> None:
        self.name, self.parameter, self._reduce = name, parameter, reduce
        self.dtype = wide_dtype(parameter)
        self.grad = GradientSum(parameter, lengths) if "grad" in needs else None
        self.squares = SquareSums(parameter, needs & SQUARES, lengths) if needs & SQUARES else None
        self.tokens = TokenSquares(parameter, lengths, name) if "tokens" in needs else None
        self.inputs = InputSquares(parameter) if "inputs" in needs else None

    @property
    def by_sequence(self) -> bool:
        """Whether sequences that were run together must be told apart: to be squared, or to leave out the padding."""
        return self.squares is not None or self.inputs is not None

    def _accumulators(self) -> list[Accumulator]:
        return [one for one in (self.squares, self.grad, self.tokens, self.inputs) if one]

    def add(self, batch: Sequence[tuple[int, GradientPieces]]) -> None:
        """The gradients of sequences that were run together, whatever each is made of."""
        if all(pieces.products and not pieces.rows and not pieces.dense for _, pieces in batch):
            for _, pieces in batch:
                self._add_positions(pieces.products)
            self._add_products([(i, _joined(pieces.products)) for i, pieces in batch])
            return
        for i, pieces in batch:
            if pieces.rows and not pieces.products and not pieces.dense:
                self.add_rows(i, *(torch.cat(side) for side in zip(*pieces.rows, strict=True)))
            else:
                self.add_dense(i, self._total(pieces))

    def _total(self, pieces: GradientPieces) -> Tensor:
        zeros = torch.zeros(self.parameter.shape, dtype=self.dtype, device=self.parameter.device)
        total = sum((dense.to(self.dtype) for dense in pieces.dense), zeros)
        for left, right, _ in pieces.products:
            total.addmm_(left.to(self.dtype).T, right.to(self.dtype))
        for ids, gradient in pieces.rows:
            total.index_add_(0, ids, gradient.to(self.dtype))
        return total

    def add_dense(self, i: int, gradient: Tensor) -> None:
        """The gradient of sequence ``i`` itself."""
        if self.tokens or self.inputs:
            raise RunError(f"{self.name} is not only multiplied with inputs; leave it out with --exclude '{self.name}'")
        gradient = gradient.to(self.dtype)
        if self.grad:
            self.grad.add_block(slice(None), gradient)
        if self.squares:
            self.squares.add_block(i, slice(None), gradient)

    def add_products(self, batch: Sequence[tuple[int, Product]], start: int, ids: dict[int, Tensor] | None) -> None:
        """The gradients of several sequences, or some rows of them, as leftᵀ right.

        Args:
            batch: of each sequence left (T, R) and right (T, C), for a parameter (R, C), or for its rows ``start`` to
                ``start + R``.
            start: where these rows begin.
            ids: of each sequence (T,), rows to which ``add_rows`` will bring another part of the gradient; their
                squares wait for it; None for none.
        """
        for i, product in batch:
            self._add_positions([product], start)
            if self.tokens and ids is not None:
                self.tokens.wait_for_rows(i, product, start, ids[i])
        self._add_products(batch, start, ids)

    def _add_positions(self, products: Sequence[Product], start: int = 0) -> None:
        """What is summed over positions needs the uses of a parameter one by one."""
        if self.tokens:
            self.tokens.add_positions(products, start)
        if self.inputs:
            self.inputs.add_positions(products, start)

    def _add_products(
        self, batch: Sequence[tuple[int, Product]], start: int = 0, ids: dict[int, Tensor] | None = None
    ) -> None:
        """What is summed over sequences: the gradient, and its square."""
        if self.squares:
            self._add_blocks(self.squares, batch, start, ids)
        elif self.grad:
            for _, (left, right, _) in batch:
                rows = slice(start, start + left.shape[1])
                self.grad.add_product(rows, left.to(self.dtype), right.to(self.dtype))

    def _add_blocks(
        self, squares: SquareSums, batch: Sequence[tuple[int, Product]], start: int, ids: dict[int, Tensor] | None
    ) -> None:
        """Make the gradients block by block, and add each to the sum and to the squares."""
        factors = [(i, left.to(self.dtype), right.to(self.dtype)) for i, (left, right, _) in batch]
        n_rows, n_columns = factors[0][1].shape[1], factors[0][2].shape[1]
        waiting = None if ids is None else {i: ids[i].unique() for i, *_ in factors}
        step = max(1, BLOCK // n_columns) if self.parameter.device.type == "cpu" else n_rows
        buffer = torch.empty(min(step, n_rows), n_columns, dtype=self.dtype, device=self.parameter.device)
        for first in range(0, n_rows, step):
            rows = slice(start + first, start + min(first + step, n_rows))
            for i, left, right in factors:
                gradient = torch.mm(left[:, first : first + step].T, right, out=buffer[: rows.stop - rows.start])
                if self.grad:
                    self.grad.add_block(rows, gradient)
                if waiting is None:
                    squares.add_block(i, rows, gradient)
                else:
                    squares.add_block_but(i, rows, gradient, waiting[i])

    def add_rows(self, i: int, ids: Tensor, gradient: Tensor) -> None:
        """The gradient of sequence ``i`` through an embedding: ids (T,), gradient at its output (T, H)."""
        ids, gradient = ids.reshape(-1), gradient.reshape(ids.numel(), -1).to(self.dtype)
        for one in self._accumulators():
            one.add_rows(i, ids, gradient)

    def finish(self) -> Sensitivity:
        """The sums over the sequences of all processes, scaled.

        Raises:
            RunError: one of them is not finite.
        """
        fields: dict[str, Tensor] = {}
        for one in self._accumulators():
            fields |= one.finish(self._reduce)
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
    """The products of several uses as one, for what does not ask which side is the input."""
    if len(products) == 1:
        return products[0]
    left, right, _ = zip(*products, strict=True)
    return Product(torch.cat(left), torch.cat(right))
