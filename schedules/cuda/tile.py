"""What a matrix product on CUDA is cut into, and how its operands are laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_structured.schedules.cuda.threads import BYTES, VECTOR_BYTES, WARP


@dataclass(frozen=True)
class Tile:
    """rows x columns of C to a block, `depth` of k at a time; warps_m x warps_n warps; tiles in flight; into how many
    parts k is split, each for a block of its own."""

    rows: int = 64
    columns: int = 64
    depth: int = 32
    warps_m: int = 2
    warps_n: int = 2
    stages: int = 3
    split: int = 1

    @classmethod
    def of(cls, config: Sequence[int]) -> Tile:
        return cls(*config)

    @property
    def threads(self) -> int:
        return WARP * self.warps_m * self.warps_n

    def __post_init__(self) -> None:
        m, n = self.rows // self.warps_m, self.columns // self.warps_n
        assert m % 16 == n % 16 == self.depth % 16 == 0, f"a warp multiplies tiles of 16 x 16 x 16, got {self}"

    def steps(self, depth: int) -> int:
        """Steps of one block."""
        return -(-depth // (self.depth * self.split))

    def shared_bytes(self, dtype: str, planes: int) -> int:
        width = self.depth + VECTOR_BYTES // BYTES[dtype]
        return self.stages * planes * (self.rows + self.columns) * width * BYTES[dtype]


@dataclass(frozen=True)
class Operand:
    """The matrices A[b] (rows x k), `planes` = 2 for complex ones.

    `at(batch, plane, row, k)` is the index in `buffer` of an element that exists. With `vectors` 16 bytes along k lie
    side by side and aligned; otherwise elements are fetched one by one. `depth` is the number of k that exist.
    """

    buffer: Any
    at: Callable[[Any, Any, Any, Any], Sequence[Any]]
    depth: int
    vectors: bool
    rows_first: bool = False  # which of its neighbours lie side by side in memory


def pack_operand(b: np.ndarray, tile: Tile, dtype: Any) -> np.ndarray:
    """(batches, planes, columns, depth) -> (batches, column tiles, depth tiles, planes, columns, depth) of a tile."""
    batches, planes, columns, depth = b.shape
    tiles_n, tiles_k = -(-columns // tile.columns), tile.steps(depth) * tile.split
    padded = np.zeros((batches, planes, tiles_n * tile.columns, tiles_k * tile.depth), np.float32)
    padded[:, :, :columns, :depth] = b
    cut = padded.reshape(batches, planes, tiles_n, tile.columns, tiles_k, tile.depth)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3, 5)).astype(dtype)
