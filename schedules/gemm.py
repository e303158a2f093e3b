"""The register-blocked GEMM that dense, low-rank, spectral and Winograd kernels share.

C[m, n] = sum_k A[m, k] B[k, n] with B packed in panels [N / nb][K][nb], nb = nr * lanes: a block of mr rows
by nr vectors stays in registers, B is read in order, A is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, ceildiv, either, held, serial

UNROLL = 4
MANY_ROWS = 48


def register_block(cpu: Cpu, rows: Extent, out: int) -> tuple[int, int]:
    """(mr, nr). At most 8 rows: more of them, a power of two apart, would fall onto the same cache sets.

    Few rows need several vectors, for eight multiply-adds have to be on their way at any time. Many rows take a
    squarer block: fewer loads, and a piece of its panel is met by all of them.
    """
    known = isinstance(rows, int) and rows > 0
    most = 8 if cpu.registers >= 32 else 6
    # (mr, nr) -> how much slower than the best one for equal work, as measured
    blocks = {(even_blocks(rows, most)[0][1] if known else most, nr): cost for nr, cost in ((2, 1.0), (1, 1.4))}
    if cpu.registers >= 32 and known and rows < 4:
        blocks[rows, 4] = 0.99
    if cpu.registers >= 32 and known and rows >= MANY_ROWS:
        blocks[6, 4] = 0.95
    vectors = max(1, -(-out // cpu.lanes))

    def time(block: tuple[int, int]) -> float:
        """Of the busiest core."""
        panels = -(-vectors // block[1])
        return -(-panels // cpu.cores) * block[1] * blocks[block]

    return min(blocks, key=time)


def even_blocks(rows: int, most: int) -> list[tuple[int, int]]:
    """[(how many, size), ...]: as few blocks of at most `most` rows as possible, their sizes one apart."""
    blocks = -(-rows // most)
    small, larger = divmod(rows, max(1, blocks))
    return [(count, size) for count, size in ((larger, small + 1), (blocks - larger, small)) if count and size]


def each_block(rows: Extent, most: int, body: Callable[[Any, int, Any], None], start: Any = 0) -> None:
    """body(first row, size, number of the block) over all rows; of an unknown number the rest is halved again and
    again."""
    if isinstance(rows, int):
        first = number = 0
        for count, size in even_blocks(rows, most):
            if count == 1:
                body(start + first, size, number)
            else:
                with serial(0, count) as i:
                    body(start + first + i * size, size, number + i)
            first, number = first + count * size, number + count
        return
    size, first, left = most, start, rows
    while size:
        with serial(0, left // size) as i:
            body(held(first + i * size), size, i)
        first, left = first + left // size * size, left % size
        size = size // 2


def most_rows(cpu: Cpu, nr: int) -> int:
    """Rows of a block whose sums fit the registers beside nr vectors and a broadcast scalar.

    With no register left for the scalar it would be loaded anew for each of the nr vectors.
    """
    return max(1, (cpu.registers - nr - 1) // nr)


def pack_panels(matrix: np.ndarray, width: int) -> np.ndarray:
    """(out, in) -> (ceil(out / width), in, width), zero-padded."""
    out, inner = matrix.shape
    panels = -(-out // width)
    padded = np.zeros((panels * width, inner), dtype=np.float32)
    padded[:out] = matrix
    return np.ascontiguousarray(padded.reshape(panels, width, inner).transpose(0, 2, 1))


def multiply_block(
    e: Emitter,
    rows: int,
    nr: int,
    depth: Extent,
    a: Callable[[int, Any], Any],
    b: Callable[[Any, int], Any],
    start: Callable[[int, int], Any] | None = None,
    prefetch: Callable[[Any], None] | None = None,
    each_group: Callable[[Any], None] | None = None,
) -> list[list[Any]]:
    """acc[i][q] = start(i, q) + sum_k a(i, k) * b(k, q), in registers. a is a scalar, b a vector.

    `prefetch(k)` is called for every k, `each_group(g)` once for every UNROLL of them.
    """
    acc = [e.registers(nr) for _ in range(rows)]
    for i in range(rows):
        for q in range(nr):
            e.set(acc[i][q], e.splat(0.0) if start is None else start(i, q))

    def step(k: Any) -> None:
        panel = [e.bind(b(k, q)) for q in range(nr)]
        if prefetch is not None:
            prefetch(k)
        for i in range(rows):
            scalar = e.bind(e.splat(a(i, k)))
            for q in range(nr):
                e.set(acc[i][q], acc[i][q][0] + scalar * panel[q])

    with serial(0, depth // UNROLL) as outer:
        if each_group is not None:
            each_group(outer)
        for inner in range(UNROLL):
            step(outer * UNROLL + inner)
    rest = depth % UNROLL
    if not isinstance(rest, int):
        with serial(0, rest) as inner:
            step(depth // UNROLL * UNROLL + inner)
        return acc
    for inner in range(rest):
        step(depth // UNROLL * UNROLL + inner)
    return acc


def chunked(e: Emitter, depth: int, chunk: int, body: Callable[[Any, Extent, bool | Any, bool | Any], None]) -> None:
    """body(first_k, count, is_first, is_last) over nearly equal chunks of the reduction."""
    pieces = max(1, -(-depth // chunk))
    if pieces == 1:
        body(0, depth, True, True)
        return
    size = ceildiv(ceildiv(depth, pieces), UNROLL) * UNROLL
    pieces = -(-depth // size)
    with serial(0, pieces) as piece:
        first = piece * size
        body(first, tirx.min(size, depth - first), piece == 0, piece == pieces - 1)


def branch(condition: bool | Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """`either` that is decided at compile time where it can be."""
    if isinstance(condition, bool):
        (then if condition else otherwise)()
    else:
        either(condition, then, otherwise)
