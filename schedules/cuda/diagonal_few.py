"""Permuted-diagonal for few rows: y[i*p + c] = sum_j q[i, j, c] x[j*p + (c + k_ij) mod p].

turn     k_ij = a_i + j (mod p), as natural indexing has it. A thread takes every block column j with the same
         j mod p, multiplies q (packed in the order of x) by x element by element, and turns its p sums once, at
         the end.
gather   any shifts, any p. A unit is 16 bytes of a diagonal; its numbers of x are fetched one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.cuda import device_code
from tvm_structured.schedules.cuda.few_rows import Few, FewRows, pack_units
from tvm_structured.schedules.cuda.threads import BYTES, VECTOR_BYTES, Registers, all_of, call, i32
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.schedules.diagonal_blocks import DiagonalBlocks

LONGEST_TURN = 32  # sums of a thread


def turning_offsets(blocks: DiagonalBlocks) -> np.ndarray | None:
    """a (rows,) with k_ij = (a_i + j) mod p, None where the shifts have no such form or p is too large."""
    separated = blocks.separated if blocks.p <= LONGEST_TURN else None
    if separated is None:
        return None
    f, g = separated
    used = blocks.diagonals.any(axis=(0, 2))
    offset = (g - np.arange(blocks.columns)) % blocks.p
    first = int(offset[used][0]) if used.any() else 0
    return (f + first) % blocks.p if (offset[used] == first).all() else None


def pack_turn(blocks: DiagonalBlocks, offsets: np.ndarray, few: Few, dtype: str) -> dict[str, np.ndarray]:
    place = (np.arange(blocks.p) - offsets[:, None, None] - np.arange(blocks.columns)[:, None]) % blocks.p
    turned = np.take_along_axis(blocks.diagonals, place, axis=2)
    padded = np.zeros(-(-blocks.rows // few.group) * few.group, np.int32)
    padded[: blocks.rows] = offsets
    return {"diagonals": pack_units(turned, few, dtype), "offsets": padded}


def emit_turn(
    few: Few, blocks: DiagonalBlocks, x: Any, packed: Any, offsets: Any, writer: RowWriter, fast: bool
) -> None:
    p, units = blocks.p, (blocks.rows, blocks.columns)
    stride = max(few.threads // p * p, p)
    kernel = FewRows(few, writer.site.dtype, writer.site.rows, units, p, p, packed, fast, stride=stride)

    def fetch(kernel: FewRows, unit: Any, row: Any) -> Registers:
        return fetch_block(kernel, blocks, x, unit, row)

    def multiply(kernel: FewRows, acc: Registers, at: int, unit: Any, w: Registers, w_at: int, v: Registers) -> None:
        scale(fast, acc, at, w, w_at, v, p)

    def turned(kernel: FewRows, g: int, which: int) -> Any:
        offset = offsets[kernel.group * few.group + g]
        return (which + (p - (kernel.t.tx + offset) % p)) % p

    kernel.emit(fetch, multiply, row_store(blocks, writer, p), turned)


def pack_gather(blocks: DiagonalBlocks, few: Few, dtype: str) -> dict[str, np.ndarray]:
    """Diagonals in pieces of 16 bytes; shifts (output units of a group of one, block columns)."""
    size = VECTOR_BYTES // BYTES[dtype]
    pieces = -(-blocks.p // size)
    padded = np.zeros((blocks.rows, blocks.columns, pieces * size), np.float32)
    padded[:, :, : blocks.p] = blocks.diagonals
    units = padded.reshape(blocks.rows, blocks.columns, pieces, size).transpose(0, 2, 1, 3)
    units = units.reshape(blocks.rows * pieces, blocks.columns, size)
    shifts = np.zeros((-(-len(units) // few.group) * few.group, blocks.columns), np.int32)
    shifts[: len(units)] = np.repeat(blocks.shifts, pieces, axis=0)
    return {"diagonals": pack_units(units, few, dtype), "shifts": shifts.astype(np.int16)}


def emit_gather(
    few: Few, blocks: DiagonalBlocks, x: Any, packed: Any, shifts: Any, writer: RowWriter, fast: bool
) -> None:
    p, size = blocks.p, VECTOR_BYTES // BYTES[writer.site.dtype]
    pieces = -(-p // size)
    units = blocks.rows * pieces, blocks.columns
    kernel = FewRows(few, writer.site.dtype, writer.site.rows, units, size, size, packed, fast)

    def fetch(kernel: FewRows, unit: Any, row: Any) -> Any:
        return row

    def multiply(kernel: FewRows, acc: Registers, at: int, unit: Any, w: Registers, w_at: int, row: Any) -> None:
        g = at // (few.rows * size)
        out_unit = kernel.group * few.group + g
        shift = kernel.t.value(i32(shifts[out_unit, unit]), "int32")
        values = kernel.t.registers(size)
        first, left = block_place(blocks, unit)
        for k in range(size):
            index = (out_unit % pieces * size + k + shift) % p
            values[k] = kernel.fetch_one(x, row, first + index, True if left is None else index < left)
        scale(fast, acc, at, w, w_at, values, size)

    def store(kernel: FewRows, total: Any, row: Any, unit: Any, which: Any, conditions: list[Any]) -> None:
        within = unit % pieces * size + which
        column = unit // pieces * p + within
        if p % size:
            conditions.append(within < p)
        if blocks.out % p:
            conditions.append(column < blocks.out)
        writer.store(total, row, column, all_of(conditions))

    kernel.emit(fetch, multiply, store)


def block_place(blocks: DiagonalBlocks, unit: Any) -> tuple[Any, Any]:
    """First column of a block of x, and how many columns exist from there on (None: the whole block)."""
    if blocks.width % blocks.p == 0:
        return unit * blocks.p, None
    number = unit % blocks.per_tap
    return unit // blocks.per_tap * blocks.width + number * blocks.p, blocks.width - number * blocks.p


def fetch_block(kernel: FewRows, blocks: DiagonalBlocks, x: Any, unit: Any, row: Any) -> Registers:
    first, left = block_place(blocks, unit)
    return kernel.fetch_run(x, row, first, blocks.p, None if left is None else (lambda k: k < left))


def row_store(blocks: DiagonalBlocks, writer: RowWriter, p: int) -> Any:
    def store(kernel: FewRows, total: Any, row: Any, unit: Any, which: Any, conditions: list[Any]) -> None:
        column = unit * p + which
        writer.store(total, row, column, all_of([*conditions, True if blocks.out % p == 0 else column < blocks.out]))

    return store


def scale(fast: bool, acc: Registers, at: int, w: Registers, w_at: int, v: Registers, count: int) -> None:
    """acc[at + k] += w[w_at + k] v[k]."""
    if fast:
        call(f"ts_scale<{count}>", acc.address(at), w.address(w_at), v.address(), source=device_code.DOT)
        return
    with I.serial(0, count) as k:
        acc[at + k] = acc[at + k] + w[w_at + k] * v[k]
