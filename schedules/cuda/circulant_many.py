"""Block-circulant for many rows: real Fourier transforms of the blocks, one complex product for each frequency.

Frequencies 0 and n / 2 are real: they share the first batch, as two real products. The forward transform is scaled by a
power of two near 1 / sqrt(n), so that spectra of fp16 have the size of x; the inverse takes that back in float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.cuda.spectral import Domain, emit_domain, pack_domain
from tvm_structured.schedules.cuda.threads import BYTES, VECTOR_BYTES, Threads, f32, load_vector, under
from tvm_structured.schedules.cuda.tile import Tile
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.schedules.fft import real_fft, real_ifft
from tvm_structured.structures.circulant_pattern import Blocks

LONGEST = 64  # blocks whose transforms fit a thread's registers


class Scalars:
    """What `fft` asks of an emitter, for one number at a time."""

    def __init__(self, t: Threads) -> None:
        self.t = t

    def splat(self, value: float) -> Any:
        return f32(value)

    def bind(self, value: Any) -> Any:
        return self.t.value(value)


def forward_scale(n: int) -> float:
    return float(2.0 ** -round(math.log2(n) / 2))


def batches_of(n: int) -> int:
    return (n + 1) // 2 if n % 2 else n // 2


def pack_many(c: np.ndarray, tile: Tile, dtype: str) -> np.ndarray:
    """c (p, columns, n) -> spectra (batches, 2, p, columns), packed."""
    rows, columns, n = c.shape
    spectra = np.fft.rfft(c.astype(np.float64))
    planes = np.zeros((batches_of(n), 2, rows, columns))
    planes[0, 0] = spectra[:, :, 0].real
    if n % 2 == 0:
        planes[0, 1] = spectra[:, :, n // 2].real
    for k in range(1, batches_of(n)):
        planes[k, 0], planes[k, 1] = spectra[:, :, k].real, spectra[:, :, k].imag
    return pack_domain(planes.astype(np.float32), tile, dtype)


def emit_many(tile: Tile, blocks: Blocks, x: Any, weight: Any, writer: RowWriter, tensorize: bool) -> None:
    n, (rows, columns, _) = blocks.length, blocks.factor_shape
    scale = forward_scale(n)
    total, dtype = blocks.taps * blocks.width, writer.site.dtype
    vector = VECTOR_BYTES // BYTES[dtype]

    def fetch(t: Threads, row: Any, unit: Any) -> list[Any]:
        """The scaled block; zero beyond its tap, and for units beyond the last."""
        if blocks.width % n == 0 and n % vector == 0:
            return fetch_whole(t, row, unit)
        number = unit % blocks.columns
        first = number * n if blocks.taps == 1 else unit // blocks.columns * blocks.width + number * n
        values = []
        for c in range(n):
            value = t.registers(1)
            exists = first + c < total
            if blocks.width % n:
                exists = tirx.all(exists, number * n + c < blocks.width)
            value[0] = tirx.if_then_else(exists, f32(x[row, first + c]) * f32(scale), f32(0.0))
            values.append(value[0])
        return values

    def fetch_whole(t: Threads, row: Any, unit: Any) -> list[Any]:
        """The same where blocks are whole vectors."""
        raw = t.registers(n, dtype)
        raw.fill()

        def load() -> None:
            for c in range(0, n, vector):
                raw.set_vector(c, load_vector(x, (row, unit * n + c), vector), vector)

        under(unit < columns, load)
        return [t.value(f32(raw[c]) * f32(scale)) for c in range(n)]

    def forward(t: Threads, row: Any, unit: Any) -> dict[tuple[int, int], Any]:
        spectrum = real_fft(Scalars(t), fetch(t, row, unit))
        found = {(0, 0): spectrum[0][0], (0, 1): spectrum[n // 2][0] if n % 2 == 0 else f32(0.0)}
        for k in range(1, batches_of(n)):
            found[k, 0], found[k, 1] = (f32(0.0) if part is None else part for part in spectrum[k])
        return found

    def inverse(t: Threads, load: Any, unit: Any) -> list[Any]:
        e = Scalars(t)
        spectrum: list[Any] = [(e.bind(load(0, 0)), None)]
        spectrum += [(e.bind(load(k, 0)), e.bind(load(k, 1))) for k in range(1, batches_of(n))]
        if n % 2 == 0:
            spectrum.append((e.bind(load(0, 1)), None))
        return [value * f32(1 / (n * scale)) for value in real_ifft(e, spectrum, n)]  # type: ignore[arg-type]

    domain = Domain(batches_of(n), 2, (rows, columns), forward, inverse, split_first=True)
    emit_domain(domain, tile, weight, writer, lambda unit: unit * n, tensorize)
