"""Permuted diagonal (PermDNN): every p x p block of the weight is a diagonal, rotated by one shift.

    W[i*p + c, l*p + (c + k_il) mod p] = q[i, l, c], zero elsewhere: a p-th of the numbers, for any p.

Source: Deng et al., "PermDNN: Efficient Compressed DNN Architecture with Permuted Diagonal Matrices", MICRO 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.base import Size, Structure, as_budget, factor
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.diagonal_pattern import (
    Search,
    block_grid,
    by_tap,
    column_in_block,
    diagonal_energies,
    padded_params,
    squares_of,
    take_diagonals,
)
from tvm_structured.structures.layer import Array, Conv2d, Dense, Layer, as_layer, to_detect

INDEXINGS = ("best", "natural")
EXACT = 1e-6  # relative error below which a member counts as equal: float32 rounding of a stored weight
SMALL = 1 << 17  # numbers of a dense matrix up to which forming it costs less than a sparse product
GATHERED = 1 << 22  # numbers that numpy gathers at a time: 16 MiB of float32


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

    def __post_init__(self) -> None:
        (out, inner), p = self.shape, int(self.diagonals.shape[-1])
        rows, columns = -(-out // p), self.taps * -(-(inner // self.taps) // p)
        expected = (rows, columns, p), (rows, columns)
        if (tuple(self.diagonals.shape), tuple(self.shifts.shape)) != expected:
            raise ModelError(
                f"{self.name}: a {self.shape} matrix with {self.taps} taps and block {p} has diagonals {expected[0]} "
                f"and shifts {expected[1]}, got {tuple(self.diagonals.shape)} and {tuple(self.shifts.shape)}"
            )

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
        check_size(layer, block, indexing)
        out, inner = (int(extent) for extent in layer.matrix.shape)
        p = int(block)
        if indexing == "best":
            shifts = diagonal_energies(squares_of(layer), p).argmax(axis=2)
        else:
            shifts = natural_shifts(layer, p)
        return cls((out, inner), layer.taps, take_diagonals(by_tap(layer.matrix, layer.taps), shifts, p), shifts)

    @classmethod
    def drawn(  # type: ignore[override]
        cls, layer: Layer, rng: np.random.Generator, *, block: int, indexing: str = "best"
    ) -> Self:
        """Shifts are drawn, too, unless the indexing is natural: of a random matrix any one is best."""
        check_size(layer, block, indexing)
        out, inner = (int(extent) for extent in layer.matrix.shape)
        grid, p = block_grid(layer, int(block)), int(block)
        shifts = rng.integers(0, p, grid) if indexing == "best" else natural_shifts(layer, p)
        return cls((out, inner), layer.taps, rng.standard_normal((*grid, p), dtype=np.float32), shifts)

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        layer, tol = to_detect(layer, tol)
        if not cls.takes(layer):
            return None
        return cls._smallest(Search(layer), Budget(), tol)

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        layer, budget = as_layer(layer), as_budget(budget)
        if not cls.takes(layer):
            return None
        search = Search(layer)
        if budget.max_error is not None:
            return cls._smallest(search, budget, budget.max_error)
        return cls._smallest(search, budget, EXACT) or cls._nearest(search, budget)

    @classmethod
    def _smallest(cls, search: Search, budget: Budget, tol: float) -> Self | None:
        """The smallest member within the budget whose error is at most `tol`."""
        for p in affordable_blocks(search.layer, budget):
            if search.may_reach(p, tol):
                member = cls.from_dense(search.layer, block=p)
                if member.error(search.layer) <= tol:
                    return member
        return None

    @classmethod
    def _nearest(cls, search: Search, budget: Budget) -> Self | None:
        """The nearest member within the budget. Blocks that cannot hold enough of the weight are not tried."""
        best, kept = None, -1.0
        for p in sorted(affordable_blocks(search.layer, budget)):
            if search.bound(p) <= kept:
                break
            energy = float(diagonal_energies(search.squares, p).max(axis=2).sum())
            if energy > kept:
                best, kept = p, energy
        return None if best is None else cls.from_dense(search.layer, block=best)

    def apply(self, x: Any) -> Any:
        if x.shape[-1] != self.shape[1]:
            raise ModelError(f"{self.name} takes {self.shape[1]} features, got an input of shape {tuple(x.shape)}")
        blocks = to_blocks(x, self.taps, self.block)  # (rows of x, columns, p)
        if hasattr(x, "detach"):
            import torch

            from tvm_structured.structures.diagonal_sparse import dense_product, sparse_product

            diagonals = torch.as_tensor(self.diagonals, device=x.device)
            product = dense_product if self.shape[0] * self.shape[1] <= SMALL else sparse_product
            y: Any = product(blocks.flatten(1), diagonals, self.shifts)
        else:
            y = self._gathered(blocks)
        return y[:, : self.shape[0]].reshape((*x.shape[:-1], self.shape[0]))

    def _gathered(self, blocks: Array) -> Array:
        """Gathers the x that meets every diagonal, some block columns at a time."""
        p, count = self.block, blocks.shape[0]
        rows, columns = self.diagonals.shape[:2]
        number, within = np.arange(columns)[:, None], column_in_block(self.shifts, p)
        step = max(1, GATHERED // max(1, count * rows * p))
        y: Any = 0
        for first in range(0, columns, step):
            some = slice(first, min(first + step, columns))
            y = y + (blocks[:, number[some], within[:, some]] * self.diagonals[:, some]).sum(2)
        gathered: Array = y.reshape((count, rows * p))
        return gathered

    def dense(self) -> Any:
        """(out, in); of the kind of the diagonals, and differentiable where they are a torch tensor."""
        p, (out, inner) = self.block, self.shape
        rows, columns = self.diagonals.shape[:2]
        if hasattr(self.diagonals, "detach"):
            from tvm_structured.structures.diagonal_sparse import scattered

            full: Any = scattered(self.diagonals, self.shifts)
        else:
            full = np.zeros((rows, p, columns, p), dtype=self.diagonals.dtype)
            i, j, c = np.ogrid[:rows, :columns, :p]
            full[i, c, j, column_in_block(self.shifts, p)] = self.diagonals
        by_taps = full.reshape(rows * p, self.taps, -1)[:out, :, : inner // self.taps]
        return by_taps.reshape(out, inner)

    def flops(self, rows: int) -> int:
        return 2 * rows * self.num_params

    def describe(self) -> str:
        return f"block={self.block}"


def check_size(layer: Layer, block: Any, indexing: str) -> None:
    """Raise ModelError for a block length or an indexing that does not exist."""
    out, inner = (int(extent) for extent in layer.matrix.shape)
    largest = max(2, out, inner // layer.taps)
    if isinstance(block, bool) or not isinstance(block, (int, np.integer)) or not 2 <= block <= largest:
        raise ModelError(f"{layer.name}: block={block!r} is outside 2..{largest} for shape {layer.weight.shape}")
    if indexing not in INDEXINGS:
        raise ModelError(f"{layer.name}: indexing={indexing!r} is unknown; one of {INDEXINGS}")


def natural_shifts(layer: Layer, p: int) -> Array:
    """k_l = l mod p, blocks counted row by row (PermDNN, section III-D)."""
    rows, columns = block_grid(layer, p)
    shifts: Array = (np.arange(rows)[:, None] * columns + np.arange(columns)) % p
    return shifts


def affordable_blocks(layer: Layer, budget: Budget) -> list[int]:
    """Block lengths within the budget, smallest model first. Operations are in proportion to parameters."""
    limits = [limit * layer.num_params for limit in (budget.max_params, budget.max_flops) if limit is not None]
    blocks = [int(size["block"]) for size in PermutedDiagonal.sizes(layer)]
    return [p for p in blocks if all(padded_params(layer, p) <= limit for limit in limits)]


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
    return x.reshape((x.shape[0], taps * (x.shape[2] // p), p))
