"""Rotated diagonals in a weight: how much of it they hold, and which block lengths are worth a look."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from tvm_structured.structures.layer import Array, Layer

SPARSE = 8  # a weight with fewer non-zeros than one in so many is searched by its non-zeros
SLACK = 1e-12  # rounding of float64 sums


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


def column_in_block(shifts: Array, p: int) -> Array:
    """(i, j) -> (i, j, c): (c + k_ij) mod p."""
    return np.asarray((shifts[:, :, None] + np.arange(p)) % p)
