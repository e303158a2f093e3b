"""Transposition and rotation of small tiles that lie in vector registers.

A tile is a list of p vectors of `lanes` elements. Column by column it reads v[c][lane]; row by row, flat, it is
p vectors again: element lane * p + c. Works for any p; the cost is p log p shuffles where p is a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.emit import Emitter


def interleave(e: Emitter, columns: Sequence[Any]) -> list[Any]:
    """Columns -> flat: out[lane * p + c] = columns[c][lane]."""
    p, lanes = len(columns), e.lanes
    if p == 1:
        return list(columns)
    if p % 2:
        order = [divmod(position, p) for position in range(p * lanes)]  # (lane, column)
        wanted = [(column, lane) for lane, column in order]
        return [merge(e, columns, wanted[q * lanes : (q + 1) * lanes]) for q in range(p)]
    flat = []
    for even, odd in zip(interleave(e, columns[0::2]), interleave(e, columns[1::2]), strict=True):
        for half in (0, lanes // 2):
            flat.append(e.bind(e.shuffle(even, odd, [half + i // 2 + i % 2 * lanes for i in range(lanes)])))
    return flat


def deinterleave(e: Emitter, flat: Sequence[Any]) -> list[Any]:
    """Flat -> columns: out[c][lane] = flat[lane * p + c]."""
    p, lanes = len(flat), e.lanes
    if p == 1:
        return list(flat)
    if p % 2:
        return [merge(e, flat, [divmod(lane * p + c, lanes) for lane in range(lanes)]) for c in range(p)]
    columns: list[Any] = [None] * p
    for parity in (0, 1):
        every_second = [2 * i + parity for i in range(lanes)]
        half = [e.bind(e.shuffle(flat[2 * n], flat[2 * n + 1], every_second)) for n in range(p // 2)]
        columns[parity::2] = deinterleave(e, half)
    return columns


def merge(e: Emitter, vectors: Sequence[Any], wanted: Sequence[tuple[int, int]]) -> Any:
    """out[i] = vectors[v][lane] for (v, lane) = wanted[i]: one shuffle for each vector that takes part."""
    merged = None
    for source in sorted({v for v, _ in wanted}):
        if merged is None:
            lanes = [lane if v == source else 0 for v, lane in wanted]
            merged = e.bind(e.shuffle(vectors[source], vectors[source], lanes))
            continue
        lanes = [e.lanes + lane if v == source else i for i, (v, lane) in enumerate(wanted)]
        merged = e.bind(e.shuffle(merged, vectors[source], lanes))
    return merged


def rotate(e: Emitter, vectors: Sequence[Any], bits: Sequence[Any]) -> list[Any]:
    """out[c][lane] = vectors[(c + k[lane]) % p][lane]; bits[b] is an int32 vector, zero where bit b of k is not set."""
    p, current = len(vectors), list(vectors)
    none = I.broadcast(I.int32(0), e.lanes)
    for b, bit in enumerate(bits):
        # the comparison is written out each time: TVM cannot bind a vector of booleans, LLVM computes it once
        moved = [tirx.Select(tirx.NE(bit, none), current[(c + (1 << b)) % p], current[c]) for c in range(p)]
        current = [e.bind(value) for value in moved]
    return current
