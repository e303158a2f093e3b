"""Permuted diagonal with blocks of any length, on any CPU: lanes are the rows of a block.

Each block of x is written twice, one copy behind the other. Then x[(c + k) mod p] for c = 0 .. p - 1 is the slice that
begins at k, and a block costs one multiplication of whole vectors for each `lanes` of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Extent, Site
from tvm_structured.schedules.diagonal_blocks import DiagonalBlocks
from tvm_structured.schedules.emit import Emitter, ceildiv, parallel, row_blocks, scratch, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.space import around

ROWS_PER_UNIT = 32  # rows of doubled x that stay in L2


def slices_space(blocks: DiagonalBlocks, site: Site) -> Iterator[Config]:
    """`rows` rows of x by `vectors` vectors of a diagonal in registers."""
    vectors = -(-blocks.p // site.cpu.lanes)
    room = site.cpu.registers // 2
    most = site.rows if isinstance(site.rows, int) else 8
    widths = [-(-vectors // -(-vectors // limit)) for limit in (room // 4, room // 8, room)]  # strips of equal width
    default = {"way": "slices", "vectors": widths[0], "rows": max(1, min(most, room // widths[0], 8))}
    default |= {"chunk": ROWS_PER_UNIT}
    axes = {
        "vectors": widths,
        "rows": range(1, max(1, min(most, 16)) + 1),
        "chunk": (8, 16, 64, 128) if not isinstance(site.rows, int) or site.rows > 8 else (ROWS_PER_UNIT,),
    }
    yield from around(default, axes, lambda config: config["vectors"] * (config["rows"] + 1) < site.cpu.registers)


def pack_slices(blocks: DiagonalBlocks, lanes: int, config: Config) -> dict[str, np.ndarray]:
    """diagonals (block rows, columns, p in whole vectors); shifts (block rows, columns)."""
    padding = -blocks.p % lanes
    return {
        "diagonals": np.pad(blocks.diagonals, ((0, 0), (0, 0), (0, padding))).astype(np.float32),
        "shifts": blocks.shifts.astype(np.int32),
    } | blocks.column_table()


def emit_slices(
    e: Emitter,
    blocks: DiagonalBlocks,
    rows: Extent,
    x: Any,
    constants: dict[str, Any],
    writer: RowWriter,
    config: Config,
) -> None:
    p, lanes, wide = blocks.p, e.lanes, config["vectors"]
    q, shifts, table = constants["diagonals"], constants["shifts"], constants.get("columns")
    vectors = -(-p // lanes)
    # a slice starts below p and has whole vectors; what it reads behind 2p meets zeros of q and must be finite
    doubled = scratch((rows, blocks.columns, 2 * vectors * lanes))
    double_blocks(e, blocks, rows, x, doubled, table)
    strips = -(-vectors // wide)

    def strip(i: Any, first_vector: Any, row: Any, count: int) -> None:
        acc = [e.registers(wide) for _ in range(count)]
        for registers in acc:
            e.zero(registers)
        with serial(0, blocks.columns) as j:
            shift = I.Bind(shifts[i, j])
            for v in range(wide):
                position = tirx.min(first_vector + v, vectors - 1) * lanes
                diagonal = e.bind(e.load(q, i, j, position))
                for r in range(count):
                    e.set(acc[r][v], acc[r][v][0] + diagonal * e.load(doubled, row + r, j, shift + position))
        end = tirx.min(i * p + p, blocks.out)
        for r in range(count):
            for v in range(wide):
                writer.store(acc[r][v][0], row + r, i * p + (first_vector + v) * lanes, limit=end)

    units = blocks.rows * strips
    most = config["chunk"]
    with parallel(0, units * ceildiv(rows, most)) as unit:
        first = unit // units * most
        count = rows if isinstance(rows, int) and rows <= most else tirx.min(most, rows - first)
        i, strip_number = unit % units // strips, unit % strips
        row_blocks(count, config["rows"], lambda row, n: strip(i, strip_number * wide, row, n), first)


def double_blocks(e: Emitter, blocks: DiagonalBlocks, rows: Extent, x: Any, doubled: Any, table: Any) -> None:
    """doubled[row, j] = block j of x, twice, then zeros (or what finite values come after it in memory)."""
    p, lanes = blocks.p, e.lanes
    vectors = -(-p // lanes)

    def copy(row: Any) -> None:
        with serial(0, blocks.columns) as j:
            start = I.Bind(blocks.column_start(j, table))
            end = I.Bind(tirx.min(start + p, blocks.column_end(j)))
            for v in range(vectors, 2 * vectors):
                e.store(doubled, e.splat(0.0), row, j, v * lanes)
            # in this order: the second copy overwrites what the first one's last vector has behind p
            for offset in (0, p):
                with serial(0, vectors) as v:
                    mask = e.bind_mask(start + v * lanes, end)
                    # two statements: inside the Select TVM would take the load's mask for true
                    loaded = e.bind(e.load_masked(x, mask, row, start + v * lanes))
                    e.store(doubled, tirx.Select(mask, loaded, e.splat(0.0)), row, j, offset + v * lanes)

    with parallel(0, rows) as row:
        copy(row)
