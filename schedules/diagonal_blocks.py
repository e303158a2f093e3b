"""A permuted-diagonal weight as kernels see it: the grid of blocks, where its columns lie, how its shifts factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_structured.structures.base import Structure


@dataclass(frozen=True, eq=False)
class DiagonalBlocks:
    """diagonals (rows, columns, p), zero where they fall into padding; shifts (rows, columns).

    `columns` counts block columns; each of the `taps` has `per_tap` of them over `width` columns of x.
    """

    diagonals: np.ndarray
    shifts: np.ndarray
    out: int
    inner: int
    taps: int

    @classmethod
    def of(cls, structure: Structure) -> DiagonalBlocks:
        diagonals, shifts = (np.asarray(factor) for factor in structure.factors.values())
        (out, inner), taps = structure.shape, structure.sizes_of["taps"]
        rows, columns, p = diagonals.shape
        column = (shifts[:, :, None] + np.arange(p)) % p + np.arange(columns)[None, :, None] % (columns // taps) * p
        row = np.arange(rows)[:, None, None] * p + np.arange(p)
        inside = (row < out) & (column < inner // taps)
        return cls(np.where(inside, diagonals, 0).astype(np.float32), shifts % p, out, inner, taps)

    @property
    def rows(self) -> int:
        return int(self.diagonals.shape[0])

    @property
    def columns(self) -> int:
        return int(self.diagonals.shape[1])

    @property
    def p(self) -> int:
        return int(self.diagonals.shape[2])

    @property
    def per_tap(self) -> int:
        return self.columns // self.taps

    @property
    def width(self) -> int:
        return self.inner // self.taps

    @property
    def is_regular(self) -> bool:
        """Whether block column j begins at column j * p."""
        return self.taps == 1 or self.width % self.p == 0

    def column_table(self) -> dict[str, np.ndarray]:
        """The constant `columns`, where block columns begin; none where that is j * p."""
        if self.is_regular:
            return {}
        tap, number = np.divmod(np.arange(self.columns), self.per_tap)
        return {"columns": (tap * self.width + number * self.p).astype(np.int32)}

    def column_start(self, j: Any, table: Any) -> Any:
        """The column of x at which block column j begins."""
        return j * self.p if table is None else table[j]

    def column_end(self, j: Any) -> Any:
        """The column behind the tap of block column j."""
        return self.inner if self.taps == 1 else (j // self.per_tap + 1) * self.width

    def columns_inside(self, lanes: int) -> int:
        """How many block columns, from the first, can be read with whole vectors: x has no room behind its end."""
        starts = self.column_table().get("columns", np.arange(self.columns) * self.p)
        return int((starts + lanes <= self.inner).sum())

    @property
    def separated(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(f, g) with k_ij = (f_i + g_j) mod p for every block that is not zero; None where there are none.

        Natural indexing separates. Found by walking from block to block: each one that is not zero ties f_i to g_j.
        """
        used = self.diagonals.any(axis=2)
        f, g = np.full(self.rows, -1), np.full(self.columns, -1)
        for seed in range(self.rows):
            if f[seed] >= 0:
                continue
            f[seed], new = 0, np.array([seed])
            while len(new):
                known = len(new)
                fresh = np.flatnonzero(used[new].any(axis=0) & (g < 0))
                witness = new[used[np.ix_(new, fresh)].argmax(axis=0)]
                g[fresh] = (self.shifts[witness, fresh] - f[witness]) % self.p
                new = np.flatnonzero(used[:, fresh].any(axis=1) & (f < 0))
                witness = fresh[used[np.ix_(new, fresh)].argmax(axis=1)] if known and len(new) else new
                f[new] = (self.shifts[new, witness] - g[witness]) % self.p
        g = np.maximum(g, 0)
        holds = ((f[:, None] + g) % self.p == self.shifts) | ~used
        return (f, g) if holds.all() else None
