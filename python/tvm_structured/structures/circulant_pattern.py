"""Partition of a matrix into n x n blocks, and the search for the n that makes all of them circulant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.layer import Array

ROUNDING = 1e-12  # relative error of a sum of squares that is found as a difference of float64 sums


@dataclass(frozen=True)
class Blocks:
    """A (out, in) matrix in blocks of `length`; its columns are `taps` groups, each padded by itself."""

    shape: tuple[int, int]
    taps: int
    length: int

    @classmethod
    def of(cls, shape: tuple[int, int], taps: int, length: int, name: str = "block_circulant") -> Self:
        """Raises ModelError for a length below 2 or taps that do not divide the columns."""
        if length < 2:
            raise ModelError(f"{name}: block {length} is no block-circulant form; give a length of 2 or more")
        if taps < 1 or shape[1] % taps:
            raise ModelError(f"{name}: {taps} taps do not divide the {shape[1]} columns of the matrix")
        return cls(shape, taps, length)

    @property
    def width(self) -> int:
        """Columns of one tap, before padding."""
        return self.shape[1] // self.taps

    @property
    def rows(self) -> int:
        """p, block rows."""
        return -(-self.shape[0] // self.length)

    @property
    def columns(self) -> int:
        """q, block columns of one tap."""
        return -(-self.width // self.length)

    @property
    def factor_shape(self) -> tuple[int, int, int]:
        """(p, taps * q, n), the shape of the defining vectors."""
        return self.rows, self.taps * self.columns, self.length

    @property
    def num_params(self) -> int:
        return self.rows * self.taps * self.columns * self.length

    @property
    def cost(self) -> tuple[int, int]:
        """Order of preference: fewest parameters, then the shorter transform."""
        return self.num_params, self.length

    def diagonal_means(self, matrix: Array) -> Array:
        """c[i, j, d] = mean of block ij over (a - b) mod n = d, float64 (p, taps * q, n).

        Only entries inside the matrix count: this is the orthogonal projection, which zeros from the
        padding would bias. A diagonal that lies in the padding altogether gets 0.
        """
        p, columns, n = self.factor_shape
        taps = matrix.reshape(self.shape[0], self.taps, self.width)
        padding = ((0, p * n - self.shape[0]), (0, 0), (0, self.columns * n - self.width))
        grid = (np.pad(taps, padding) if np.any(padding) else taps).reshape(p, n, columns, n)
        total = np.zeros((p, columns, n))
        for a in range(n):
            # backward[e] is row a at column -e mod n; diagonal d meets row a at e = d - a mod n
            backward = np.concatenate((grid[:, a, :, :1], grid[:, a, :, :0:-1]), axis=-1)
            total[..., a:] += backward[..., : n - a]
            total[..., :a] += backward[..., n - a :]
        means: Array = total / np.maximum(self.diagonal_counts(), 1)
        return means

    def diagonal_counts(self) -> Array:
        """How many entries of each wrapped diagonal lie inside the matrix, (p, taps * q, n)."""
        n, d = self.length, np.arange(self.length)
        height = np.full(self.rows, n)
        height[-1] = self.shape[0] - (self.rows - 1) * n
        breadth = np.full((self.taps, self.columns), n)
        breadth[:, -1] = self.width - (self.columns - 1) * n
        r, s = height[:, None, None], breadth.reshape(1, -1, 1)
        # rows a in [0, r) whose column a - d mod n is below s: a in [d, d + s) taken modulo n
        straight = np.maximum(np.minimum(r, d + s) - d, 0)
        counts: Array = straight + np.clip(d + s - n, 0, r)
        return counts


class CirculantPattern:
    """Squared differences between diagonal neighbours, W[a, b] - W[a + 1, b + 1], summed so that any block
    length can be judged in a fraction of a pass over the matrix.

    In a block-circulant matrix neighbours are equal except across block edges. If W is within a Frobenius
    distance e of a member, the differences of every set of neighbour pairs sum to at most 4 e^2.
    """

    def __init__(self, matrix: Array, taps: int) -> None:
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        self.taps = taps
        self.grid = matrix.reshape(self.shape[0], taps, -1)
        self.energy = float(np.einsum("ab,ab->", matrix, matrix, dtype=np.float64))
        out, _, width = self.grid.shape
        self.by_row = np.zeros(max(out - 1, 0))
        self.by_column = np.zeros(max(width - 1, 0))
        step = max(1, 2**18 // self.shape[1])
        for first in range(0, out - 1, step):
            piece = self.grid[first : first + step + 1].astype(np.float64)
            squares = (piece[1:, :, 1:] - piece[:-1, :, :-1]) ** 2
            self.by_row[first : first + step] = squares.sum(axis=(1, 2))
            self.by_column += squares.sum(axis=(0, 1))
        self.total = float(self.by_row.sum())

    def candidates(self, dense_params: int, tol: float) -> Iterator[Blocks]:
        """Partitions with fewer parameters than dense and no difference inside their blocks."""
        limit = 4 * tol**2 * self.energy + ROUNDING * self.total
        out, _, width = self.grid.shape
        for n in range(2, max(out, width) + 1):
            blocks = Blocks(self.shape, self.taps, n)
            if blocks.num_params < dense_params and self.inside(n, limit) <= limit:
                yield blocks

    def inside(self, n: int, enough: float = np.inf) -> float:
        """Sum over neighbours within a block of length n; only a lower bound where that exceeds `enough`."""
        edges = self.by_row[n - 1 :: n].sum() + self.by_column[n - 1 :: n].sum()
        if self.total - edges > enough:
            return float(self.total - edges)
        # pairs that cross a row edge and a column edge at once were taken off twice
        upper, lower = self.grid[n - 1 : -1 : n, :, n - 1 : -1 : n], self.grid[n::n, :, n::n]
        corners = (lower.astype(np.float64) - upper) ** 2
        return float(self.total - edges + corners.sum())

    def across(self, n: int) -> tuple[float, int]:
        """Sum over the neighbours that wrap round, from a block's last column to its first; and their number."""
        out, _, width = self.grid.shape
        full = width // n * n
        wrapping = np.arange(1, out) % n != 0
        last, first = self.grid[:-1, :, n - 1 : full : n], self.grid[1:, :, :full:n]
        squares = (last[wrapping].astype(np.float64) - first[wrapping]) ** 2
        return float(squares.sum()), squares.size

    def wraps(self, n: int, tol: float) -> bool:
        """Whether the last column of each block continues in its first one, a row further down."""
        return self.across(n)[0] <= 4 * tol**2 * self.energy

    def likely_lengths(self, limit: int, count: int = 3) -> list[int]:
        """The lengths up to `limit` whose blocks look most nearly circulant.

        The mean squared difference of neighbours is twice the variance along the diagonals, so half of it,
        times 1 - 1 / n for the mean that the projection keeps, estimates the squared error.
        """
        out, _, width = self.grid.shape
        scores = []
        for n in range(2, min(limit, out, width) + 1):
            across, wrapping = self.across(n)
            inner_rows = out - 1 - (out - 1) // n
            inner_columns = width - 1 - (width - 1) // n
            pairs = inner_rows * inner_columns * self.taps + wrapping
            scores.append(((self.inside(n) + across) / pairs * (1 - 1 / n), n))
        return [n for _, n in sorted(scores)[:count]]
