"""Permuted-diagonal with separable shifts for many rows: p independent dense products between two permutations.

With k_ij = (f_i + g_j) mod p and s = (c + f_i) mod p:
    y[i*p + c] = sum_j q[i, j, c] x[j*p + (s + g_j) mod p], a product for each s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.cuda.diagonal_few import block_place
from tvm_structured.schedules.cuda.spectral import Domain, emit_domain, pack_domain
from tvm_structured.schedules.cuda.threads import Threads, f32
from tvm_structured.schedules.cuda.tile import Tile
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.schedules.diagonal_blocks import DiagonalBlocks


def pack_many(blocks: DiagonalBlocks, tile: Tile, dtype: str) -> dict[str, np.ndarray]:
    """Products (p, 1, rows, columns), f (rows,) and g (columns,)."""
    separated = blocks.separated
    assert separated is not None
    f, g = separated
    place = (np.arange(blocks.p)[:, None] - f) % blocks.p  # (s, i) -> c
    weight = blocks.diagonals[np.arange(blocks.rows), :, place]  # (s, i, j)
    packed = pack_domain(np.ascontiguousarray(weight[:, None]), tile, dtype)
    return {"diagonals": packed, "f": f.astype(np.int32), "g": g.astype(np.int32)}


def emit_many(
    tile: Tile,
    blocks: DiagonalBlocks,
    x: Any,
    weight: Any,
    f: Any,
    g: Any,
    writer: RowWriter,
    tensorize: bool,
) -> None:
    p = blocks.p

    def forward(t: Threads, row: Any, unit: Any) -> dict[tuple[int, int], Any]:
        first, left = block_place(blocks, unit)
        values = {}
        for s in range(p):
            index = (s + g[unit]) % p
            exists = unit < blocks.columns
            if left is not None:
                exists = tirx.all(exists, index < left)
            values[s, 0] = tirx.if_then_else(exists, f32(x[row, first + index]), f32(0.0))
        return values

    def inverse(t: Threads, load: Any, unit: Any) -> list[Any]:
        return [t.value(load((c + f[unit]) % p, 0)) for c in range(p)]

    domain = Domain(p, 1, (blocks.rows, blocks.columns), forward, inverse)
    emit_domain(domain, tile, weight, writer, lambda unit: unit * p, tensorize)
