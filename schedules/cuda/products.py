"""How products are run: for how many rows, in which tiles. The defaults are what an H200 was measured to prefer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cuda.threads import BYTES, VECTOR_BYTES
from tvm_structured.schedules.cuda.tile import Operand, Tile
from tvm_structured.schedules.gpu import GpuSite

# rows, columns, depth, warps along rows, along columns, tiles in flight
SMALL = ((16, 64, 64, 1, 4, 4), (16, 128, 64, 1, 4, 4), (32, 64, 64, 1, 4, 4))
LARGE = (
    (64, 64, 32, 2, 2, 4),
    (128, 64, 32, 2, 2, 4),
    (128, 64, 32, 4, 2, 4),
    (64, 128, 32, 2, 2, 4),
    (64, 128, 64, 2, 4, 3),
    (128, 128, 32, 2, 2, 4),
    (128, 128, 32, 4, 2, 4),
    (128, 128, 64, 4, 2, 3),
)
LARGE_FLOAT32 = ((64, 64, 16, 2, 2, 3), (128, 64, 16, 4, 2, 3), (128, 128, 16, 4, 2, 3))
FEW_ROWS = 32
# of one multiprocessor and clock: bytes from L2, multiply-adds; clocks for a step, a block, another kernel
FETCH, TENSOR_FMAS, FMAS, STEP, BLOCK, LAUNCH = 30, 1200, 100, 200, 2000, 3000
FEWEST_STEPS, USUAL_DEPTH = 4, 512
MANY = 8  # rows from which tiles on tensor cores were measured to win (block-circulant 16, 4096 x 4096, H200)

MOST_SUMS = 64  # in a thread's registers
ROOM = 8192  # partial sums of a block: 32 KB of shared memory


def prefers_few(site: GpuSite, many: int = MANY) -> bool:
    """Whether the rows are too few for tiles; an unknown number counts as many."""
    return isinstance(site.rows, int) and site.rows < many


def few_space(
    site: GpuSite, out_units: int, in_units: int, sums: int = 1, group: int | None = None
) -> Iterator[tuple[int, ...]]:
    """Settings of `few_rows`, the default first: four blocks to a multiprocessor."""
    rows = site.rows if isinstance(site.rows, int) else 1
    together = next(r for r in (4, 2, 1) if r <= max(rows, 1) and (r == 1 or r * sums <= MOST_SUMS))
    wanted = 4 * site.gpu.multiprocessors / -(-rows // together)
    useful = [threads for threads in (128, 64, 32) if threads <= max(in_units, 32)]
    for threads in (*useful, 256):
        for g in sorted((1, 2, 4, 8) if group is None else (group,), key=lambda g: abs(out_units / g - wanted)):
            if g == 1 or (
                g <= out_units and g * together * sums <= MOST_SUMS and g * together * sums * threads <= ROOM
            ):
                yield (threads, g, together)


def tiles(
    site: GpuSite, rows: Extent, columns: int, planes: int = 1, batches: int = 1, depth: int = 0
) -> Iterator[tuple[int, ...]]:
    """Tiles for a product of that size, the best first by a model of the card: bytes from L2, arithmetic, and a fixed
    price for a block. Given its `depth`, a single product may also be split along it."""
    large = LARGE_FLOAT32 if site.dtype == "float32" else LARGE
    most = 64 if site.dtype == "float32" else 128  # sums of a thread; float32 needs many registers for operands
    count = rows if isinstance(rows, int) else 64
    speed = FMAS if site.dtype == "float32" else TENSOR_FMAS

    def is_possible(tile: Tile) -> bool:
        fits = tile.shared_bytes(site.dtype, planes) <= site.gpu.dynamic_shared_memory
        fits = fits and tile.rows * tile.columns * planes // tile.threads <= most
        splits = tile.split == 1 or tile.steps(depth) >= FEWEST_STEPS
        return fits and splits and (count > FEW_ROWS or tile.rows <= FEW_ROWS)

    def cost(tile: Tile) -> float:
        blocks = batches * tile.split * -(-count // tile.rows) * -(-columns // tile.columns)
        fetched = planes * (tile.rows + tile.columns) * tile.depth * BYTES[site.dtype] / FETCH
        multiplied = planes**2 * tile.rows * tile.columns * tile.depth / speed
        one = tile.steps(depth or USUAL_DEPTH) * (fetched + multiplied + STEP) + BLOCK
        parts = 2 * tile.split * count * columns * 4 / FETCH / site.gpu.multiprocessors + LAUNCH
        return max(1.0, blocks / site.gpu.multiprocessors) * one + (parts if tile.split > 1 else 0)

    ways = [Tile.of((*t, split)) for t in (*SMALL, *large) for split in ((1, 2, 4, 8) if depth else (1,))]
    for tile in sorted((way for way in ways if is_possible(way)), key=cost):
        yield dataclasses.astuple(tile)


def matrix(buffer: Any, depth: int, dtype: str) -> Operand:
    """A whole matrix (rows, depth) as the left operand."""
    vectors = depth % (VECTOR_BYTES // BYTES[dtype]) == 0
    return Operand(buffer, lambda batch, plane, row, k: (row, k), depth, vectors)
