"""Permuted diagonal (PermDNN): every p x p block of the weight is a diagonal, rotated by one shift.

    W[i*p + c, l*p + (c + k_il) mod p] = q[i, l, c], zero elsewhere: a p-th of the numbers, for any p.

Source: Deng et al., "PermDNN: Efficient Compressed DNN Architecture with Permuted Diagonal Matrices", MICRO 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.base import Size, Structure, as_budget, factor
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.layer import Array, Conv2d, Dense, Layer, as_layer

INDEXINGS = ("best", "natural")
EXACT = 1e-6  # relative error below which a member counts as equal: float32 rounding of a stored weight
GATHERED = 1 << 22  # numbers that `apply` gathers at a time: 16 MiB of float32
SPARSE = 8  # a weight with fewer non-zeros than one in so many is searched by its non-zeros
SLACK = 1e-12  # rounding of float64 sums


@dataclass(frozen=True, eq=False)
class PermutedDiagonal(Structure):
    """y[i*p + c] = sum_l q[i, l, c] * x[l*p + (c + k_il) mod p].

    diagonals: q, (ceil(out / p), taps * ceil(in / taps / p), p); shifts: k, int64, the first two extents.
    The columns of each tap are padded to a multiple of p on their own (taps = 1: at the end).
    """

    name: ClassVar[str] = "permuted_diagonal"
    accepts: ClassVar[tuple[type[Layer], ...]] = (Dense, Conv2d)
    is_frobenius_optimal: ClassVar[bool] = True

    taps: int
    diagonals: Any = factor()
    shifts: Any = factor(trainable=False)

    @property
    def block(self) -> int:
        return int(self.diagonals.shape[2])

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        """Every block length with fewer numbers than the dense matrix."""
        out, inner = layer.matrix.shape
        count = {p: padded_params(layer, p) for p in range(2, max(out, inner // layer.taps) + 1)}
        for p in sorted(count, key=lambda p: (count[p], -p)):
            if count[p] < layer.num_params:
                yield {"block": p}

    @classmethod
    def from_dense(cls, layer: Layer, *, block: int, indexing: str = "best") -> Self:  # type: ignore[override]
        """The nearest member: with `indexing="best"` each block keeps its strongest diagonal, with "natural"
        the one whose shift is the block's number modulo p (PermDNN, section III-D).

        Raises ModelError for a block length or an indexing that does not exist.
        """
        layer = as_layer(layer)
        out, inner = (int(extent) for extent in layer.matrix.shape)
        largest = max(2, out, inner // layer.taps)
        if isinstance(block, bool) or not isinstance(block, (int, np.integer)) or not 2 <= block <= largest:
            raise ModelError(f"{layer.name}: block={block!r} is outside 2..{largest} for shape {layer.weight.shape}")
        if indexing not in INDEXINGS:
            raise ModelError(f"{layer.name}: indexing={indexing!r} is unknown; one of {INDEXINGS}")
        p = int(block)
        if indexing == "best":
            shifts = diagonal_energies(squares_of(layer), p).argmax(axis=2)
        else:
            rows, columns = block_grid(layer, p)
            shifts = (np.arange(rows)[:, None] * columns + np.arange(columns)) % p
        return cls((out, inner), layer.taps, take_diagonals(by_tap(layer.matrix, layer.taps), shifts, p), shifts)

    @classmethod
    def detect(cls, layer: Any, tol: float = 1e-5) -> Self | None:
        layer = as_layer(layer)
        if not cls.takes(layer):
            return None
        return cls._smallest(layer, Budget(), tol)

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        layer, budget = as_layer(layer), as_budget(budget)
        if not cls.takes(layer):
            return None
        if budget.max_error is not None:
            return cls._smallest(layer, budget, budget.max_error)
        return cls._smallest(layer, budget, EXACT) or cls._nearest(layer, budget)

    @classmethod
    def _smallest(cls, layer: Layer, budget: Budget, tol: float) -> Self | None:
        """The smallest member within the budget whose error is at most `tol`."""
        search = Search(layer)
        for p in affordable_blocks(layer, budget):
            if search.may_reach(p, tol):
                member = cls.from_dense(layer, block=p)
                if member.error(layer) <= tol:
                    return member
        return None

    @classmethod
    def _nearest(cls, layer: Layer, budget: Budget) -> Self | None:
        """The nearest member within the budget. Blocks that cannot hold enough of the weight are not tried."""
        search = Search(layer)
        best, kept = None, -1.0
        for p in sorted(affordable_blocks(layer, budget)):
            if search.bound(p) <= kept:
                break
            energy = float(diagonal_energies(search.squares, p).max(axis=2).sum())
            if energy > kept:
                best, kept = p, energy
        return None if best is None else cls.from_dense(layer, block=best)

    def apply(self, x: Any) -> Any:
        """Gathers the x that meets every diagonal, some block columns at a time."""
        p, lead = self.block, x.shape[:-1]
        rows, columns = self.diagonals.shape[:2]
        blocks = to_blocks(x, self.taps, p)  # (rows of x, columns, p)
        number = np.arange(columns)[:, None]
        within = column_in_block(self.shifts, p)
        step = max(1, GATHERED // max(1, blocks.shape[0] * rows * p))
        y: Any = 0
        for first in range(0, columns, step):
            some = slice(first, min(first + step, columns))
            met = blocks[:, as_index(number[some], x), as_index(within[:, some], x)]
            y = y + (met * self.diagonals[:, some]).sum(2)
        return y.reshape((blocks.shape[0], rows * p))[:, : self.shape[0]].reshape((*lead, self.shape[0]))

    def dense(self) -> Array:
        p, (out, inner) = self.block, self.shape
        rows, columns = self.diagonals.shape[:2]
        full: Array = np.zeros((rows, p, columns, p), dtype=self.diagonals.dtype)
        i, j, c = np.ogrid[:rows, :columns, :p]
        full[i, c, j, column_in_block(self.shifts, p)] = self.diagonals
        by_taps = full.reshape(rows * p, self.taps, -1)[:out, :, : inner // self.taps]
        return np.ascontiguousarray(by_taps.reshape(out, inner))

    def flops(self, rows: int) -> int:
        return 2 * rows * self.num_params

    def describe(self) -> str:
        return f"block={self.block}"


class Search:
    """What is known of a weight before any block length is tried.

    A member keeps at most one entry of a row to each block column. So it keeps no more than the row's
    largest entries, that many: an upper bound that rules most block lengths out, without looking at blocks.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        smallest_first = np.sort(np.abs(layer.matrix), axis=1)
        squares = np.square(smallest_first[:, ::-1], dtype=np.float64).sum(axis=0)
        self.held: Array = np.cumsum(squares)  # energy of the 1, 2, ... largest entries of all rows
        self.total = float(self.held[-1])
        self._large: dict[float, tuple[Array, Array, Array, Array, float]] = {}

    @cached_property
    def squares(self) -> Array:
        return squares_of(self.layer)

    def bound(self, p: int) -> float:
        """No member with blocks of p holds more energy (squared norm) than this."""
        columns = block_grid(self.layer, p)[1]
        return float(self.held[min(columns, len(self.held)) - 1]) * (1 + SLACK)

    def may_reach(self, p: int, tol: float) -> bool:
        """Whether a member with blocks of p can have a relative error of at most `tol`: no false denial."""
        needed = (1 - tol**2) * self.total * (1 - SLACK)
        return self.bound(p) >= needed and self.bound_of_sparse(p, tol) >= needed

    def bound_of_sparse(self, p: int, tol: float) -> float:
        """A closer upper bound from the few large entries of a sparse weight: the small ones count as kept."""
        row, tap, column, energy, rest = self.large_entries(tol)
        if not len(row):
            return self.total
        columns = block_grid(self.layer, p)[1]
        block = row // p * columns + tap * (columns // self.layer.taps) + column // p
        diagonal, entry = np.unique(block * p + (column - row) % p, return_inverse=True)
        first = np.flatnonzero(np.diff(diagonal // p, prepend=-1))  # where the diagonals of a block begin
        return float(np.maximum.reduceat(np.bincount(entry, weights=energy), first).sum()) + rest

    def large_entries(self, tol: float) -> tuple[Array, Array, Array, Array, float]:
        """(row, tap, column, energy) of the entries that together hold all but a little of the energy, and that
        little. None where they are too many for a sparse search to pay."""
        if tol not in self._large:
            floor = 0.01 * tol**2 * self.total / self.squares.size
            large = self.squares > floor
            if np.count_nonzero(large) > self.squares.size // SPARSE:
                large = np.zeros_like(large)
            row, tap, column = np.nonzero(large)
            energy = self.squares[row, tap, column]
            self._large[tol] = row, tap, column, energy, self.total - float(energy.sum())
        return self._large[tol]


def affordable_blocks(layer: Layer, budget: Budget) -> list[int]:
    """Block lengths within the budget, smallest model first. Operations are in proportion to parameters."""
    limits = [limit * layer.num_params for limit in (budget.max_params, budget.max_flops) if limit is not None]
    blocks = [int(size["block"]) for size in PermutedDiagonal.sizes(layer)]
    return [p for p in blocks if all(padded_params(layer, p) <= limit for limit in limits)]


def block_grid(layer: Layer, p: int) -> tuple[int, int]:
    """Blocks (down, across) of the padded matrix."""
    out, inner = layer.matrix.shape
    return -(-int(out) // p), layer.taps * -(-int(inner) // layer.taps // p)


def padded_params(layer: Layer, p: int) -> int:
    rows, columns = block_grid(layer, p)
    return rows * columns * p


def by_tap(matrix: Array, taps: int) -> Array:
    """(out, in) -> (out, taps, in / taps)."""
    return matrix.reshape(matrix.shape[0], taps, -1)


def squares_of(layer: Layer) -> Array:
    """Squared entries (out, taps, in / taps), in float64 so that none under- or overflows."""
    return np.square(by_tap(layer.matrix, layer.taps), dtype=np.float64)


def diagonal_energies(squares: Array, p: int) -> Array:
    """E[i, l, k]: energy of the diagonal with shift k in block (i, l)."""
    padded = pad(squares, p)
    rows, taps, width = padded.shape[0] // p, padded.shape[1], padded.shape[2]
    flat = padded.reshape(rows, p, taps * width)
    base, column = np.arange(taps * width) // p * p, np.arange(taps * width) % p
    total = np.zeros((rows, taps * width))
    for c in range(p):
        total += np.take(flat[:, c], base + (column + c) % p, axis=1)
    return total.reshape(rows, -1, p)


def take_diagonals(matrix: Array, shifts: Array, p: int) -> Array:
    """The diagonals of a (out, taps, in / taps) matrix at the given shifts."""
    padded = pad(matrix, p)
    rows, columns = shifts.shape
    i, j, c = np.ogrid[:rows, :columns, :p]
    return np.ascontiguousarray(padded.reshape(rows, p, columns, p)[i, c, j, column_in_block(shifts, p)])


def pad(matrix: Array, p: int) -> Array:
    """Rows, and the columns of each tap, filled up with zeros to multiples of p."""
    out, _, width = matrix.shape
    return np.pad(matrix, ((0, -out % p), (0, 0), (0, -width % p)))


def column_in_block(shifts: Any, p: int) -> Any:
    """(i, l) -> (i, l, c): (c + k_il) mod p, as a numpy array."""
    if hasattr(shifts, "detach"):
        shifts = shifts.detach().cpu().numpy()
    return (shifts[:, :, None] + np.arange(p)) % p


def as_index(index: Array, x: Any) -> Any:
    """An index array of the kind and on the device of x."""
    if not hasattr(x, "detach"):
        return index
    import torch

    return torch.as_tensor(index, device=x.device)


def to_blocks(x: Any, taps: int, p: int) -> Any:
    """(..., in) -> (rows, taps * blocks, p), each tap zero-padded to whole blocks; numpy or torch."""
    width = x.shape[-1] // taps
    x = x.reshape((-1, taps, width))
    if width % p:
        shape = (x.shape[0], taps, -width % p)
        if hasattr(x, "detach"):
            import torch

            x = torch.cat([x, x.new_zeros(shape)], dim=2)
        else:
            x = np.concatenate([x, np.zeros(shape, dtype=x.dtype)], axis=2)
    return x.reshape((x.shape[0], -1, p))
