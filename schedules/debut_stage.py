"""One stage of a butterfly chain, y[b, i, d] = sum_j F[b, i, j, d] x[b, j, d], in register blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_structured.schedules.debut_plan import Stage, Tile
from tvm_structured.schedules.emit import Emitter, row_blocks, serial
from tvm_structured.schedules.gemm import UNROLL, even_blocks, multiply_block, pack_panels

# load(row, number of the group b s + j, offset within it) -> the operand's buffer and index
Place = Callable[[Any, Any, Any], tuple[Any, tuple[Any, ...]]]
# store(vector, row, first element, the element at which lanes end; None if all lanes count)
Store = Callable[[Any, Any, Any, Any], None]


def pack_stage(grid: np.ndarray, tile: Tile, lanes: int) -> np.ndarray:
    """The grid as the stage reads it, zero-padded: (blocks, panels, s, vectors * lanes) with t = 1, else
    (blocks, vectors of d, blocks of i, s, vectors * lanes)."""
    blocks, r, s, t = grid.shape
    if t == 1:
        return np.stack([pack_panels(part, tile.vectors * lanes) for part in grid[..., 0]])
    count, width = -(-r // tile.vectors), -(-t // lanes)
    padded = np.zeros((blocks, count * tile.vectors, s, width * lanes), np.float32)
    padded[:, :r, :, :t] = grid
    split = padded.reshape(blocks, count, tile.vectors, s, width, lanes)
    return np.ascontiguousarray(split.transpose(0, 4, 1, 3, 2, 5)).reshape(
        blocks, width, count, s, tile.vectors * lanes
    )


@dataclass(frozen=True)
class StageEmitter:
    """`weight(b, ..., j, lane)` is a vector of the packed grid."""

    e: Emitter
    stage: Stage
    tile: Tile
    weight: Callable[..., Any]
    place: Place
    store: Store

    def emit(self, rows: int) -> None:
        """All outputs of `rows` input vectors. A block's weights stay in cache for all of them, and the part of a
        vector that meets them stays for all of the block's rows."""
        stage, lanes, size = self.stage, self.e.lanes, self.tile.vectors
        with serial(0, stage.blocks) as b:
            if stage.t == 1:
                panels = -(-stage.r // lanes)
                self.row_blocks(rows, lambda m, nm: row_blocks(panels, size, lambda p, n: self.on_rows(m, nm, b, p, n)))
                return
            with serial(0, -(-stage.t // lanes)) as v:
                self.row_blocks(
                    rows, lambda m, nm: row_blocks(stage.r, size, lambda i, n: self.on_diagonals(m, nm, b, v, i, n))
                )

    def row_blocks(self, rows: int, body: Callable[[Any, int], None]) -> None:
        """body(first row, count) over all input vectors, blocks of nearly equal size."""
        first = 0
        for count, size in even_blocks(rows, self.tile.rows):
            row_blocks(count * size, size, body, first)
            first += count * size

    def on_rows(self, m: Any, nm: int, b: Any, p: Any, nv: int) -> None:
        """Vectors of rows i; x is broadcast."""
        e, stage = self.e, self.stage

        def scalar(row: int, j: Any) -> Any:
            buffer, index = self.place(m + row, b * stage.s + j, 0)
            return buffer[index]

        def panel(j: Any, q: int) -> Any:
            return self.weight(b, p // self.tile.vectors, j, q * e.lanes)

        acc = multiply_block(e, nm, nv, stage.s, scalar, panel)
        end = (b + 1) * stage.r if stage.r % e.lanes else None
        for row in range(nm):
            for q in range(nv):
                self.store(acc[row][q][0], m + row, b * stage.r + (p + q) * e.lanes, end)

    def on_diagonals(self, m: Any, nm: int, b: Any, v: Any, i: Any, ni: int) -> None:
        """Vectors of positions d on the diagonals, of x and of the grid."""
        e, stage = self.e, self.stage
        acc = [e.registers(ni) for _ in range(nm)]
        for registers in acc:
            e.zero(registers)

        def step(j: Any) -> None:
            panel = [e.bind(self.weight(b, v, i // self.tile.vectors, j, q * e.lanes)) for q in range(ni)]
            for row in range(nm):
                buffer, index = self.place(m + row, b * stage.s + j, v * e.lanes)
                x = e.bind(e.load(buffer, *index))
                for q in range(ni):
                    e.set(acc[row][q], acc[row][q][0] + x * panel[q])

        with serial(0, stage.s // UNROLL) as outer:
            for inner in range(UNROLL):
                step(outer * UNROLL + inner)
        for rest in range(stage.s // UNROLL * UNROLL, stage.s):
            step(rest)
        for row in range(nm):
            for q in range(ni):
                group = b * stage.r + i + q
                end = (group + 1) * stage.t if stage.t % e.lanes else None
                self.store(acc[row][q][0], m + row, group * stage.t + v * e.lanes, end)
