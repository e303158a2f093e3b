"""Complex Fourier transforms of long vectors: straight-line transforms of both factors of the length, in lanes.

With j = j1 N2 + j2 and k = k1 + N1 k2 a transform of N = N1 N2 numbers is one of length N1 for each j2, a product with
exp(-2 pi i j2 k1 / N), and one of length N2 for each k1 (Bailey's four steps). The other index fills the lanes, and is
changed by transposing squares of vectors on the way from the first to the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_structured.schedules.emit import Emitter, scratch, serial
from tvm_structured.schedules.fft import Pair, deinterleave, root, small_dft, smallest_factor, times_constant


def factor_lengths(length: int) -> tuple[int, int]:
    """(N1, N2) of a power of two, as equal as possible."""
    first = 1 << (length.bit_length() - 1) // 2
    return first, length // first


def twiddles(length: int) -> np.ndarray:
    """exp(-2 pi i j2 k1 / N) as (re and im, k1, j2)."""
    first, second = factor_lengths(length)
    angle = -2 * np.pi * np.outer(np.arange(first), np.arange(second)) / length
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)


def complex_fft(e: Any, x: Sequence[Pair]) -> list[Pair]:
    """Mixed-radix decimation in time (Cooley and Tukey 1965), each lane a transform of its own."""
    n = len(x)
    if n == 1:
        return list(x)
    radix = smallest_factor(n)
    m = n // radix
    parts = [complex_fft(e, x[r::radix]) for r in range(radix)]
    spectrum: list[Any] = [None] * n
    for k in range(m):
        outputs = small_dft(e, [times_constant(e, part[k], root(n, -r * k)) for r, part in enumerate(parts)])
        for j in range(radix):
            spectrum[k + m * j] = outputs(j, False)
    return spectrum


class LongTransform:
    """A transform from `source` to `target`, (2, length) each: re and im. Not divided by the length.

    The inverse is the same with re and im exchanged on both sides.
    """

    def __init__(self, e: Emitter, length: int, tables: Any) -> None:
        self.e, self.tables = e, tables
        self.first, self.second = factor_lengths(length)
        self.source, self.between, self.target = (scratch((2, length)) for _ in range(3))

    def emit(self) -> None:
        e, lanes = self.e, self.e.lanes
        with serial(0, self.second // lanes) as group:
            for part, vectors in enumerate(zip(*self.first_pass(group * lanes), strict=True)):
                for start in range(0, self.first, lanes):
                    for lane, vector in enumerate(deinterleave(e, vectors[start : start + lanes])):
                        e.store(self.between, vector, part, (group * lanes + lane) * self.first + start)
        with serial(0, self.first // lanes) as group:
            column = self.loaded(self.between, self.second, self.first, group * lanes)
            for k, pair in enumerate(complex_fft(e, column)):
                for part in range(2):
                    e.store(self.target, pair[part], part, k * self.first + group * lanes)

    def first_pass(self, start: Any) -> list[Pair]:
        """Transforms over j1, turned."""
        e, turned = self.e, []
        for k, (re, im) in enumerate(complex_fft(e, self.loaded(self.source, self.first, self.second, start))):
            cos, sin = (e.bind(e.load(self.tables, part, k, start)) for part in range(2))
            turned.append((e.bind(re * cos - im * sin), e.bind(re * sin + im * cos)))
        return turned

    def loaded(self, buffer: Any, count: int, stride: int, start: Any) -> list[Pair]:
        e = self.e
        return [
            (e.bind(e.load(buffer, 0, j * stride + start)), e.bind(e.load(buffer, 1, j * stride + start)))
            for j in range(count)
        ]
