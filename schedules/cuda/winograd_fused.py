"""Winograd in one kernel, for half precision: nothing of the transformed domain leaves a block of threads.

A block makes `COLUMNS` output channels of 32 tiles. It walks over the input channels 16 at a time: while tensor cores
multiply the points of one step (V and U in shared memory), the threads transform the tiles of the next and fetch its
weights. Warps share out points and halves of the tiles: a warp keeps all sums of its points in registers. At the
end the sums pass through shared memory to the threads that transform them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.cuda import device_code
from tvm_structured.schedules.cuda.epilogue import finished
from tvm_structured.schedules.cuda.products import numpy_type
from tvm_structured.schedules.cuda.threads import (
    Registers,
    Shared,
    Threads,
    all_of,
    call,
    ceildiv,
    f32,
    launch,
    load_vector,
    under,
    when,
)
from tvm_structured.schedules.cuda.winograd_tiles import TileGrid, both_sides, image_index
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.winograd import Winograd, transforms

TILES, COLUMNS, DEPTH = 32, 32, 16  # of a block, and input channels of a step
GROUPS, HALVES = 4, 2  # warps: groups of points by halves of the tiles
THREADS = 32 * GROUPS * HALVES
VECTOR = 8  # half-precision numbers of 16 bytes
WIDTH = DEPTH + VECTOR  # of a row in shared memory, padded against bank conflicts


def can_fuse(grid: TileGrid, site: GpuSite) -> bool:
    """Half precision, and two steps of V and U, later the sums, in shared memory."""
    points = grid.points**2
    needed = max(2 * points * (TILES + COLUMNS) * WIDTH * 2, points * TILES * (COLUMNS + 2) * 4)
    fits = needed <= site.gpu.dynamic_shared_memory and points // GROUPS * 16 <= 160
    return site.dtype != "float32" and site.gpu.has_bfloat16 and points % GROUPS == 0 and fits


def widths(grid: TileGrid) -> list[int]:
    """Tiles across a block, those that waste least first."""
    return sorted((8, 4, 16), key=lambda across: -(-grid.across // across) * across)


def pack_fused(structure: Winograd, dtype: str) -> np.ndarray:
    """G g G^T (points^2, out, in) -> (column tiles, steps, points^2, COLUMNS, DEPTH)."""
    weight = structure.transformed_weight()
    points, out, inner = weight.shape
    tiles, steps = -(-out // COLUMNS), -(-inner // DEPTH)
    padded = np.zeros((points, tiles * COLUMNS, steps * DEPTH), np.float32)
    padded[:, :out, :inner] = weight
    cut = padded.reshape(points, tiles, COLUMNS, steps, DEPTH)
    return np.ascontiguousarray(cut.transpose(1, 3, 0, 2, 4)).astype(numpy_type(dtype))


def emit_fused(
    grid: TileGrid,
    site: GpuSite,
    across: int,
    x: Any,
    weight: Any,
    operands: Mapping[str, Any],
    y: Any,
    tensorize: bool,
) -> None:
    blocks = (
        ceildiv(grid.outs, COLUMNS),
        ceildiv(grid.across, across),
        ceildiv(grid.batch * grid.down, TILES // across),
    )
    with launch(blocks, THREADS, not tensorize) as (t, (bn, bx, by)):
        FusedBlock(t, grid, site, across, x, weight, tensorize, (bn, bx, by)).emit(operands, y)


class FusedBlock:
    """The code of one block of threads."""

    def __init__(
        self, t: Threads, grid: TileGrid, site: GpuSite, across: int, x: Any, weight: Any, tensorize: bool, where: Any
    ) -> None:
        self.t, self.grid, self.site, self.across, self.x, self.weight = t, grid, site, across, x, weight
        self.tensorize, (self.bn, self.bx, self.by) = tensorize, where
        self.points = grid.points**2
        self.share = self.points // GROUPS  # points of a warp
        self.sums = COLUMNS // 8 * 4  # of one point, for 16 tiles
        self.steps = -(-grid.channels // DEPTH)

    def emit(self, operands: Mapping[str, Any], y: Any) -> None:
        t = self.t
        # one allocation, rows of V before rows of U for each point
        self.shared = t.shared(
            (2, self.points, TILES + COLUMNS, DEPTH), self.site.dtype, padding=WIDTH - DEPTH, opaque=True
        )
        acc = t.registers(self.share * self.sums)
        with t.last_stage():
            acc.fill()
            self._fetch(0, 0)
            self._transform(0, 0)
        with I.serial(0, self.steps) as step:
            with t.stage():
                if self.tensorize:
                    call("ts_wait<0>", source=device_code.COPY)
            with t.last_stage():
                with when(step + 1 < self.steps):
                    self._fetch(step + 1, (step + 1) % 2)
                    self._transform(step + 1, (step + 1) % 2)
                self._multiply(acc, step % 2)
        if self.tensorize:
            t.barrier()  # the sums take over the storage of V and U
        sums = t.shared((self.points, TILES, COLUMNS), "float32", padding=2, opaque=True)
        with t.stage():
            self._spread(acc, sums)
        with t.last_stage():
            self._finish(sums, operands, y)

    def _place(self, tile: Any) -> tuple[Any, Any]:
        """Row (counted over all images) and column of a tile of this block."""
        return self.by * (TILES // self.across) + tile // self.across, self.bx * self.across + tile % self.across

    def _each(self, count: int, body: Any) -> None:
        assert count % THREADS == 0
        with I.serial(0, count // THREADS) as turn:
            body(turn * THREADS + self.t.tx)

    def _fetch(self, step: Any, slot: Any) -> None:
        """U of a step."""
        chunks = DEPTH // VECTOR

        def copy(chunk: Any) -> None:
            point, column, k = chunk // (COLUMNS * chunks), chunk // chunks % COLUMNS, chunk % chunks * VECTOR
            to, index = (slot, point, TILES + column, k), (self.bn, step, point, column, k)
            if self.tensorize:
                addresses = self.shared.address(*to), I.address_of(self.weight[index])
                call("ts_copy16", *addresses, tirx.const(True, "bool"), source=device_code.COPY)
            else:
                self.shared.set_vector(to, load_vector(self.weight, index, VECTOR), VECTOR)

        count = self.points * COLUMNS * chunks
        with I.serial(0, -(-count // THREADS)) as turn:
            chunk = turn * THREADS + self.t.tx
            under(True if count % THREADS == 0 else chunk < count, lambda: copy(chunk))
        if self.tensorize:
            call("ts_commit", source=device_code.COPY)

    def _transform(self, step: Any, slot: Any) -> None:
        """V of a step: a thread transforms one channel of one tile at a time."""
        grid, n, m = self.grid, self.grid.points, self.grid.tile
        b_t = [[float(c) for c in row] for row in transforms(m, grid.kernel)[2]]

        def transform(i: Any) -> None:
            # neighbouring threads read neighbours in memory
            tile, c = (i % TILES, i // TILES) if self.site.layout == "NCHW" else (i // DEPTH, i % DEPTH)
            row, column = self._place(tile)
            channel = step * DEPTH + c
            top, left = row % grid.down * m - grid.padding[0], column * m - grid.padding[1]
            known = all_of([row < grid.batch * grid.down, channel < grid.channels])

            def pixel(i: int, j: int) -> Any:
                at_y, at_x = top + i, left + j
                inside = [known, 0 <= at_y, at_y < grid.image[0], 0 <= at_x, at_x < grid.image[1]]
                value = f32(self.x[image_index(self.site.layout, row // grid.down, channel, at_y, at_x)])
                return self.t.value(tirx.if_then_else(all_of(inside), value, f32(0.0)))

            pixels = [[pixel(i, j) for j in range(n)] for i in range(n)]
            for point, value in enumerate(both_sides(self.t, b_t, pixels)):
                self.shared[slot, point, tile, c] = tirx.Cast(self.site.dtype, value)

        self._each(TILES * DEPTH, transform)

    def _corner(self) -> tuple[Any, Any]:
        """First point and first tile of this warp."""
        return self.t.warp % GROUPS * self.share, self.t.warp // GROUPS * (TILES // HALVES)

    def _multiply(self, acc: Registers, slot: Any) -> None:
        first, tile = self._corner()
        if self.tensorize:
            kind = "true" if self.site.dtype == "bfloat16" else "false"
            for p in range(self.share):
                v = self.shared.address(slot, first + p, tile, 0)
                u = self.shared.address(slot, first + p, TILES, 0)
                name = f"ts_mma<{kind}, 1, {COLUMNS // 8}, {WIDTH}>"
                call(name, acc.address(p * self.sums), v, u, source=device_code.MMA)
            return
        with I.serial(0, self.share * self.sums) as i:
            m, n = self._sum_place(i % self.sums)
            with I.serial(0, DEPTH) as k:
                v = f32(self.shared[slot, first + i // self.sums, tile + m, k])
                u = f32(self.shared[slot, first + i // self.sums, TILES + n, k])
                acc[i] = acc[i] + v * u

    def _sum_place(self, i: Any) -> tuple[Any, Any]:
        """Tile and column of a sum, as the fragments have them."""
        return i % 4 // 2 * 8 + self.t.lane // 4, i // 4 * 8 + self.t.lane % 4 * 2 + i % 2

    def _spread(self, acc: Registers, sums: Shared) -> None:
        first, tile = self._corner()
        for i in range(self.share * self.sums):
            m, n = self._sum_place(i % self.sums)
            sums[first + i // self.sums, tile + m, n] = acc[i]

    def _finish(self, sums: Shared, operands: Mapping[str, Any], y: Any) -> None:
        grid, n, m, layout = self.grid, self.grid.points, self.grid.tile, self.site.layout
        a_t = [[float(c) for c in row] for row in transforms(m, grid.kernel)[0]]

        def transform(i: Any) -> None:
            tile, c = (i % TILES, i // TILES) if layout == "NCHW" else (i // COLUMNS, i % COLUMNS)
            row, column = self._place(tile)
            channel = self.bn * COLUMNS + c
            values = [[self.t.value(sums[i * n + j, tile, c]) for j in range(n)] for i in range(n)]
            outputs = both_sides(self.t, a_t, values)
            known = all_of([row < grid.batch * grid.down, channel < grid.outs])

            def store() -> None:
                for f, value in enumerate(outputs):
                    at_y, at_x = row % grid.down * m + f // m, column * m + f % m
                    index = image_index(layout, row // grid.down, channel, at_y, at_x)

                    def one(index: Any = index, value: Any = value) -> None:
                        I.buffer_store(y, finished(value, self.site, operands, index, channel), list(index))

                    under(all_of([at_y < grid.output[0], at_x < grid.output[1]]), one)

            under(known, store)

        self._each(TILES * COLUMNS, transform)
