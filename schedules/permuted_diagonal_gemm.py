"""Permuted diagonal whose shifts separate, k_ij = (f_i + g_j) mod p, as p dense products.

With s = (c + f_i) mod p the entry of x that row c of block i meets in block column j is x[j*p + (s + g_j) mod p]:
it depends on i through s alone. So for each s

    Y_s = X_s W_s^T,   X_s[row, j] = x[row, j*p + (s + g_j) mod p],   W_s[i, j] = q[i, j, (s - f_i) mod p]

and y[i*p + c] = Y_s[i] with s = (c + f_i) mod p. Both permutations are transpositions and rotations of registers.
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
from tvm_structured.schedules.gemm import multiply_block, pack_panels, register_block
from tvm_structured.schedules.shuffles import deinterleave, interleave, rotate
from tvm_structured.schedules.space import around, block_rows, fits_registers

MAX_GEMM_BLOCK = 16  # the rotations are straight-line code over p vectors
ROWS_PER_UNIT = 128  # rows of Y that one thread keeps in L2 until all p products of a panel are done
PAD = 16  # keeps rows of X_s from falling onto the same cache sets


def gemm_space(blocks: DiagonalBlocks, site: Site) -> Iterator[Config]:
    mr, nr = register_block(site.cpu, site.rows, blocks.rows)
    default = {"way": "gemm", "mr": mr, "nr": nr, "chunk": ROWS_PER_UNIT}
    vectors = -(-blocks.rows // site.cpu.lanes)
    axes = {
        "mr": block_rows(site.rows, 14 if site.cpu.registers >= 32 else 6),
        "nr": [count for count in (nr // 2 or 1, 1, 2, 3, 4, 6) if count <= vectors],
        "chunk": (32, 64, 256) if not isinstance(site.rows, int) or site.rows > 32 else (ROWS_PER_UNIT,),
    }
    yield from around(default, axes, fits_registers(site.cpu))


def pack_gemm(blocks: DiagonalBlocks, lanes: int, config: Config) -> dict[str, np.ndarray]:
    """weights (panels, p, columns, panel width): W_s, panel by panel; the bits of f and g as lane vectors."""
    assert blocks.separated is not None
    (f, g), p = blocks.separated, blocks.p
    i, j = np.ogrid[: blocks.rows, : blocks.columns]
    products = [blocks.diagonals[i, j, ((s - f) % p)[:, None]] for s in range(p)]
    panels = np.stack([pack_panels(product, config["nr"] * lanes) for product in products], axis=1)
    g_by_tap = np.pad(g.reshape(blocks.taps, -1), ((0, 0), (0, -blocks.per_tap % lanes)))
    return {
        "weights": np.ascontiguousarray(panels),
        "row_shifts": np.pad(f, (0, panels.shape[0] * config["nr"] * lanes - blocks.rows)).astype(np.int32),
        "column_shifts": g_by_tap.reshape(-1).astype(np.int32),
    }


def emit_gemm(
    e: Emitter,
    blocks: DiagonalBlocks,
    rows: Extent,
    x: Any,
    constants: dict[str, Any],
    writer: RowWriter,
    config: Config,
) -> None:
    columns = blocks.columns + e.lanes + PAD
    xs = scratch((blocks.p, rows, columns))
    spread_input(e, blocks, rows, x, constants["column_shifts"], xs)
    multiply_and_gather(e, blocks, rows, xs, constants, writer, config)


def bits_of(e: Emitter, shifts: Any, first: Any, p: int) -> list[Any]:
    """Bit by bit, `lanes` shifts below p as vectors that are zero where the bit is not set."""
    bits = []
    for b in range((p - 1).bit_length()):
        slot = I.alloc_buffer((1,), f"int32x{e.lanes}")
        e.set(slot, e.load(shifts, first) & I.broadcast(I.int32(1 << b), e.lanes))
        bits.append(slot[0])
    return bits


def spread_input(e: Emitter, blocks: DiagonalBlocks, rows: Extent, x: Any, shifts: Any, xs: Any) -> None:
    """xs[s, row, j] = x[row, j*p + (s + g_j) mod p], `lanes` block columns at a time.

    The last vector of a tap runs into the next one's place (or the padding), which is filled after it.
    """
    p, lanes = blocks.p, e.lanes
    groups = -(-blocks.per_tap // lanes)
    ragged = blocks.width % (p * lanes) != 0

    def group(row: Any, tap: Any, number: Any) -> None:
        bits = bits_of(e, shifts, (tap * groups + number) * lanes, p)
        start, end = tap * blocks.width + number * (p * lanes), (tap + 1) * blocks.width
        flat = []
        for n in range(p):
            if not ragged:
                flat.append(e.bind(e.load(x, row, start + n * lanes)))
                continue
            mask = e.bind_mask(start + n * lanes, end)
            value = e.load_masked(x, mask, row, start + n * lanes)
            flat.append(e.bind(tirx.Select(mask, value, e.splat(0.0))))
        for s, value in enumerate(rotate(e, deinterleave(e, flat), bits)):
            e.store(xs, value, s, row, tap * blocks.per_tap + number * lanes)

    with parallel(0, rows) as row:
        with serial(0, blocks.taps) as tap:
            with serial(0, groups) as number:
                group(row, tap, number)


def multiply_and_gather(
    e: Emitter,
    blocks: DiagonalBlocks,
    rows: Extent,
    xs: Any,
    constants: dict[str, Any],
    writer: RowWriter,
    config: Config,
) -> None:
    """All p products of one panel of block rows, kept in scratch, then rotated and interleaved into y."""
    p, lanes, (mr, nr) = blocks.p, e.lanes, (config["mr"], config["nr"])
    weights, shifts = constants["weights"], constants["row_shifts"]
    panels, width = -(-blocks.rows // (nr * lanes)), nr * lanes
    masked = blocks.out % (p * width) != 0
    most = config["chunk"]
    held = rows if isinstance(rows, int) and rows < most else most

    def gather(ys: Any, panel: Any, first_row: Any, count: Extent) -> None:
        for v in range(nr):
            bits = bits_of(e, shifts, panel * width + v * lanes, p)
            with serial(0, count) as row:
                products = [e.bind(ys[row, s, v]) for s in range(p)]
                for n, value in enumerate(interleave(e, rotate(e, products, bits))):
                    feature = (panel * width + v * lanes) * p + n * lanes
                    writer.store(value, first_row + row, feature, masked)

    with parallel(0, panels * ceildiv(rows, most)) as unit:
        panel, first_row = unit % panels, unit // panels * most
        count = rows if held is rows else tirx.min(most, rows - first_row)
        ys = scratch((held, p, nr), e.dtype)
        with serial(0, p) as s:

            def block(row: Any, block_rows: int) -> None:
                acc = multiply_block(
                    e,
                    block_rows,
                    nr,
                    blocks.columns,
                    lambda i, k: xs[s, first_row + row + i, k],
                    lambda k, v: e.load(weights, panel, s, k, v * lanes),
                )
                for i in range(block_rows):
                    for v in range(nr):
                        I.buffer_store(ys, acc[i][v][0], [row + i, s, v])

            row_blocks(count, mr, block)
        gather(ys, panel, first_row, count)
