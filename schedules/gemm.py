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
from tvm_structured.schedules.emit import Emitter, ceildiv, either, serial

UNROLL = 4


def register_block(cpu: Cpu, rows: Extent, out: int) -> tuple[int, int]:
    """(mr, nr): few rows take wide panels (they stream the weight), many rows a squarer block."""
    vectors = max(1, -(-out // cpu.lanes))
    many = cpu.registers >= 32
    if not isinstance(rows, int) or rows > 4:
        mr, nr = (8, 2) if many else (4, 2)
    else:
        mr, nr = rows, {1: 8, 2: 4, 3: 4, 4: 4}[max(1, rows)] if many else {1: 4, 2: 4, 3: 2, 4: 2}[max(1, rows)]
    # at least two panels to a core, else threads idle
    while nr > 1 and -(-vectors // nr) < 2 * cpu.cores:
        nr //= 2
    return mr, nr


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
) -> list[list[Any]]:
    """acc[i][q] = start(i, q) + sum_k a(i, k) * b(k, q), in registers. a is a scalar, b a vector."""
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
