"""Block-circulant for few rows, in the time domain: arithmetic is cheap on a GPU, bytes and launches are not.

    y_i[a] = sum_j sum_d c[i, j, d] x_j[(a - d) mod n]

A thread holds the defining vector of a block in registers. Blocks up to `WHOLE` are multiplied whole; of longer ones a
thread takes `PART` outputs and `PART` numbers of c at a time, which need 2 PART - 1 neighbouring numbers of x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.cuda import device_code
from tvm_structured.schedules.cuda.few_rows import Few, FewRows, pack_units
from tvm_structured.schedules.cuda.threads import Registers, all_of, call
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.structures.circulant_pattern import Blocks

WHOLE = 16
PART = 16


def parts_of(n: int) -> tuple[int, int]:
    """(parts of a block, numbers in a part)."""
    return (1, n) if n <= WHOLE else (-(-n // PART), PART)


def few_units(blocks: Blocks) -> tuple[int, int]:
    """(output units, input units)."""
    parts, _ = parts_of(blocks.length)
    rows, columns, _ = blocks.factor_shape
    return rows * parts, columns * parts


def pack_few(c: np.ndarray, few: Few, dtype: str) -> np.ndarray:
    """c (p, columns, n); all output units of a block row use the same numbers."""
    rows, columns, n = c.shape
    parts, size = parts_of(n)
    padded = np.zeros((rows, columns, parts * size), np.float32)
    padded[:, :, :n] = c
    return pack_units(padded.reshape(rows, columns * parts, size), few, dtype)


def emit_few(few: Few, blocks: Blocks, x: Any, packed: Any, writer: RowWriter, tensorize: bool) -> None:
    n, (parts, size) = blocks.length, parts_of(blocks.length)
    rows, dtype = writer.site.rows, writer.site.dtype
    kernel = FewRows(few, dtype, rows, few_units(blocks), size, size, packed, tensorize, share=parts)

    def place(unit: Any) -> tuple[Any, Any]:
        """First column of the block of x, and the number of columns that exist from there on (None: all)."""
        block = unit // parts
        if blocks.width % n == 0:
            return block * n, None
        number = block % blocks.columns
        return block // blocks.columns * blocks.width + number * n, blocks.width - number * n

    def fetch_whole(kernel: FewRows, unit: Any, row: Any) -> Registers:
        first, left = place(unit)
        return kernel.fetch_run(x, row, first, n, None if left is None else (lambda k: k < left))

    def fetch_window(kernel: FewRows, unit: Any, row: Any) -> Registers:
        first, left = place(unit)
        window = kernel.t.registers(2 * PART - 1)
        start = (kernel.group % parts - unit % parts) * PART - (PART - 1) + 2 * parts * PART // n * n + n
        for t in range(2 * PART - 1):
            index = (start + t) % n
            window[t] = kernel.fetch_one(x, row, first + index, True if left is None else index < left)
        return window

    def multiply(kernel: FewRows, acc: Registers, at: int, unit: Any, w: Registers, w_at: int, v: Registers) -> None:
        if tensorize:
            name = f"ts_circulant<{n}>" if parts == 1 else f"ts_toeplitz<{PART}, {PART}>"
            call(name, acc.address(at), w.address(w_at), v.address(), source=device_code.CIRCULANT)
            return
        with I.serial(0, size) as a:
            with I.serial(0, size) as d:
                index = (a - d + n) % n if parts == 1 else a - d + PART - 1
                acc[at + a] = acc[at + a] + w[w_at + d] * v[index]

    def store(kernel: FewRows, total: Any, row: Any, unit: Any, which: Any, conditions: list[Any]) -> None:
        within = unit % parts * size + which
        column = unit // parts * n + within
        if parts > 1 and n % PART:
            conditions.append(within < n)
        if blocks.shape[0] % n:
            conditions.append(column < blocks.shape[0])
        writer.store(total, row, column, all_of(conditions))

    kernel.emit(fetch_whole if parts == 1 else fetch_window, multiply, store)
