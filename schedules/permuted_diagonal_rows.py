"""Permuted diagonal for many rows, any shifts: lanes are rows of x.

With `lanes` rows of x to a vector an entry of a diagonal multiplies whole vectors, and a shift is an address: each
block of x is written twice, one copy behind the other, so that (c + k) mod p for c = 0 .. p - 1 are neighbours from k
on. A chunk of block columns stays in level 1 while a group of block rows meets it; their sums wait in scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Extent, Site
from tvm_structured.schedules.diagonal_blocks import DiagonalBlocks
from tvm_structured.schedules.emit import Emitter, ceildiv, parallel, scratch, serial, when
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import most_rows
from tvm_structured.schedules.images import transpose
from tvm_structured.schedules.space import around

LEVEL1 = 24 * 1024  # bytes of x that stay there beside sums and diagonals
TIME = 1.06, 1.0, 1.33, 1.33  # of a product by vectors of rows, as measured: more save loads, but leave level 1
PIECE_BYTES = 2 << 20  # of doubled x that is made at once: level 2 of two threads


def rows_space(blocks: DiagonalBlocks, site: Site) -> Iterator[Config]:
    """`depth` entries of a diagonal by `vectors` vectors of rows in registers, `chunk` block columns in level 1."""
    lanes = site.cpu.lanes
    needed = -(-site.rows // lanes) if isinstance(site.rows, int) else 4
    shapes = []
    for vectors in range(1, min(len(TIME), needed) + 1):
        most = most_rows(site.cpu, vectors)
        depth = -(-blocks.p // -(-blocks.p // most))
        shapes.append({"way": "rows", "depth": depth, "vectors": vectors, "chunk": chunk_of(blocks, lanes, vectors)})

    def time(config: Config) -> float:
        """Of one row, with that of the lanes that have none."""
        vectors = config["vectors"]
        return TIME[vectors - 1] * (-(-needed // vectors) * vectors / needed)

    shapes.sort(key=time)
    for shape in shapes:
        yield from around(shape, {"chunk": [c for c in (shape["chunk"] // 2, shape["chunk"] * 2) if c]})


def chunk_of(blocks: DiagonalBlocks, lanes: int, vectors: int) -> int:
    """Block columns of doubled x that fit level 1."""
    return max(1, min(blocks.columns, LEVEL1 // (4 * 2 * blocks.p * lanes * vectors)))


def pieces_of(p: int, depth: int) -> list[tuple[int, int]]:
    """(first entry of a diagonal, how many) that are in registers together."""
    return [(first, min(depth, p - first)) for first in range(0, p, depth)]


def pack_rows(blocks: DiagonalBlocks, lanes: int, config: Config) -> dict[str, np.ndarray]:
    """As they are read: diagonals (groups, columns * lanes * p), a group being chunks of [row][piece][column][entry],
    and shifts (groups, columns * lanes), chunks of [row][column]."""
    groups, (columns, p), chunk = -(-blocks.rows // lanes), (blocks.columns, blocks.p), config["chunk"]
    diagonals = np.zeros((groups, lanes, columns, p), np.float32)
    diagonals.reshape(-1, columns, p)[: blocks.rows] = blocks.diagonals
    shifts = np.zeros((groups, lanes, columns), np.int32)
    shifts.reshape(-1, columns)[: blocks.rows] = blocks.shifts
    starts = range(0, columns, chunk)
    pieces = pieces_of(p, config["depth"])

    def chunk_diagonals(first: int) -> np.ndarray:
        here = diagonals[:, :, first : first + chunk]
        parts = [here[..., c : c + count].reshape(groups, lanes, -1) for c, count in pieces]
        return np.concatenate(parts, axis=2).reshape(groups, -1)

    return {
        "diagonals": np.ascontiguousarray(np.concatenate([chunk_diagonals(first) for first in starts], axis=1)),
        "shifts": np.concatenate([shifts[:, :, f : f + chunk].reshape(groups, -1) for f in starts], axis=1),
    } | blocks.column_table()


def emit_rows(
    e: Emitter,
    blocks: DiagonalBlocks,
    rows: Extent,
    x: Any,
    constants: dict[str, Any],
    writer: RowWriter,
    config: Config,
) -> None:
    tile = config["vectors"] * e.lanes
    size = 4 * blocks.columns * 2 * blocks.p * tile
    most = max(e.cpu.cores, PIECE_BYTES // size)
    tiles = ceildiv(rows, tile)
    together = min(tiles, most) if isinstance(tiles, int) else most
    work = RowTiles(
        e, blocks, rows, x, constants, writer, config, scratch((together, blocks.columns, 2 * blocks.p * tile))
    )
    if isinstance(tiles, int) and tiles <= most:
        work.run(0, tiles)
    else:
        with serial(0, ceildiv(tiles, most)) as piece:
            work.run(piece * most, tirx.min(most, tiles - piece * most))


@dataclass(frozen=True)
class RowTiles:
    """Tiles of `vectors` * lanes rows; `doubled` holds x of some of them, (tiles, columns, 2 p * tile)."""

    e: Emitter
    blocks: DiagonalBlocks
    rows: Extent
    x: Any
    constants: dict[str, Any]
    writer: RowWriter
    config: Config
    doubled: Any

    @property
    def tile(self) -> int:
        return int(self.config["vectors"]) * self.e.lanes

    def run(self, first_tile: Any, tiles: Extent) -> None:
        columns, groups = self.blocks.columns, -(-self.blocks.rows // self.e.lanes)
        with parallel(0, tiles * columns) as unit:
            tile, j = unit // columns, unit % columns
            self.double(first_tile + tile, tile, j)
        with parallel(0, tiles * groups) as unit:
            tile, group = unit // groups, unit % groups
            sums = scratch((self.e.lanes * self.blocks.p * self.tile,))
            self.multiply(tile, group, sums)
            self.finish(first_tile + tile, group, sums)

    def double(self, number: Any, tile: Any, j: Any) -> None:
        """Block column j of a tile's rows, transposed, twice. Rows behind the last one repeat it."""
        e, p, table = self.e, self.blocks.p, self.constants.get("columns")
        start = I.Bind(self.blocks.column_start(j, table))
        end = I.Bind(tirx.min(start + p, self.blocks.column_end(j)))
        for v in range(self.config["vectors"]):
            for first in range(0, p, e.lanes):
                feature = start + first
                rows = [tirx.min(number * self.tile + v * e.lanes + i, self.rows - 1) for i in range(e.lanes)]
                loaded = [e.load_or_zero(self.x, e.mask(feature, end), row, feature) for row in rows]
                for c, value in enumerate(transpose(e, loaded)[: p - first]):
                    for copy in range(2):
                        at = (copy * p + first + c) * self.tile + v * e.lanes
                        e.store(self.doubled, value, tile, j, at)

    def multiply(self, tile: Any, group: Any, sums: Any) -> None:
        """sums[i, c] = sum_j q[i, j, c] x[j, c + k_ij] for a group of block rows i, each a tile of rows."""
        e, p, lanes, chunk = self.e, self.blocks.p, self.e.lanes, self.config["chunk"]
        columns = self.blocks.columns
        with serial(0, lanes * p * self.config["vectors"]) as i:
            e.store(sums, e.splat(0.0), i * lanes)
        with serial(0, -(-columns // chunk)) as number:
            begin = number * chunk
            count = chunk if columns % chunk == 0 else tirx.min(chunk, columns - begin)
            with serial(0, lanes) as i:
                for first, depth in pieces_of(p, self.config["depth"]):
                    row = begin * lanes + i * count  # of shifts; p times as much of diagonals
                    self.add(tile, group, sums, (i, first, depth), (begin, count), (row, row * p + count * first))

    def add(
        self,
        tile: Any,
        group: Any,
        sums: Any,
        entries: tuple[Any, int, int],
        span: tuple[Any, Extent],
        places: tuple[Any, Any],
    ) -> None:
        """The products of a block row's entries (row, first, how many) with a span of block columns."""
        e, vectors, lanes = self.e, self.config["vectors"], self.e.lanes
        (i, first, depth), (begin, count), (shift_at, diagonal_at) = entries, span, places
        base = (i * self.blocks.p + first) * self.tile
        acc = [e.registers(vectors) for _ in range(depth)]
        for c in range(depth):
            for v in range(vectors):
                e.set(acc[c][v], e.load(sums, base + c * self.tile + v * lanes))
        with serial(0, count) as j:
            shift = I.Bind(self.constants["shifts"][group, shift_at + j])
            for c in range(depth):
                q = e.bind(e.splat(self.constants["diagonals"][group, diagonal_at + j * depth + c]))
                for v in range(vectors):
                    at = (shift + first + c) * self.tile + v * lanes
                    e.set(acc[c][v], acc[c][v][0] + q * e.load(self.doubled, tile, begin + j, at))
        for c in range(depth):
            for v in range(vectors):
                e.store(sums, acc[c][v][0], base + c * self.tile + v * lanes)

    def finish(self, number: Any, group: Any, sums: Any) -> None:
        """Transpose the sums of a group on their way to y."""
        e, p, lanes = self.e, self.blocks.p, self.e.lanes
        masked = self.blocks.out % (lanes * p) != 0
        square = scratch((lanes * lanes,))
        with serial(0, self.config["vectors"]) as v:
            with serial(0, p) as part:
                loaded = [e.bind(e.load(sums, (part * lanes + c) * self.tile + v * lanes)) for c in range(lanes)]
                for i, value in enumerate(transpose(e, loaded)):
                    e.store(square, value, i * lanes)
                with serial(0, lanes) as i:
                    row = number * self.tile + v * lanes + i
                    with when(row < self.rows):
                        self.writer.store(e.load(square, i * lanes), row, (group * p + part) * lanes, masked)
