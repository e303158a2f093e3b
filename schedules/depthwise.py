"""Depthwise convolution: every channel has kernels of its own. Pixels in lanes, several output rows at once.

Nothing is summed over channels, so loads are the limit: a row of the image is loaded once for all the output rows of
the block that it takes part in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config
from tvm_structured.schedules.conv_pixels import padded_copy
from tvm_structured.schedules.conv_units import Term, each_term
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, parallel, scratch, serial
from tvm_structured.schedules.images import ImageShape, ImageWriter, PaddedCopy, lane_blocks
from tvm_structured.schedules.space import around

MOST_CHANNELS = 16  # to a piece of work
UNROLLED = 256  # products; larger kernels loop over their rows


def configs(shape: ImageShape, cpu: Cpu) -> Iterator[Config]:
    """Output rows that share the loads of the image, and channels to a piece of work."""
    channels = max(1, min(MOST_CHANNELS, shape.groups // (4 * cpu.cores)))
    choices = [count for count in (1, 4, 8, 32, -(-shape.groups // cpu.cores)) if count <= shape.groups]
    default = {"form": "depthwise", "rows": 4, "channels": channels}
    rows = [count for count in (2, 8, 1, 3, 6) if count <= shape.output[0]]
    yield from around(default, {"rows": rows, "channels": sorted(set(choices))})


def pack(matrix: np.ndarray, shape: ImageShape) -> np.ndarray:
    """(channels, multiplier, taps)."""
    return np.ascontiguousarray(matrix.reshape(shape.groups, shape.outs, shape.taps), np.float32)


def emit(e: Emitter, shape: ImageShape, config: Config, x: Any, weight: Any, writer: ImageWriter) -> None:
    """The whole convolution; x is (batch, channels, pixels). `shape.outs` is the multiplier."""
    copy = padded_copy(shape, shape.output[0])
    chunk = config["channels"]
    chunks = -(-shape.groups // chunk)
    with parallel(0, shape.batch * chunks) as unit:
        image, first = unit // chunks, unit % chunks * chunk
        source = scratch((copy.size,))
        with serial(0, chunk if shape.groups % chunk == 0 else tirx.min(chunk, shape.groups - first)) as c:
            copy.emit(e, x, source, image, first + c, 0)
            channel = Channel(e, copy, source, min(config["rows"], shape.output[0]))
            with serial(0, shape.outs) as m:
                out = (first + c) * shape.outs + m
                channel.convolve(
                    lambda tap: weight[first + c, m, tap],
                    lambda value, pixel, mask: writer.store(value, image, out, pixel, mask),
                )


@dataclass(frozen=True)
class Channel:
    """One channel's padded image in scratch, `rows` output rows at a time."""

    e: Emitter
    copy: PaddedCopy
    source: Any
    rows: int

    def convolve(self, weight: Callable[[Any], Any], store: Callable[[Any, Any, Any], None]) -> None:
        """store(vector, pixel, mask) of the convolution with weight(tap)."""
        e, shape = self.e, self.copy.shape
        height, width = shape.output
        unrolled = self.rows * shape.taps <= UNROLLED
        held: list[Any] = []
        if unrolled and shape.taps <= e.cpu.registers - 2 * self.rows - 6:
            held = [e.bind(e.splat(weight(tap))) for tap in range(shape.taps)]

        def factor(tap: Any) -> Any:
            return held[tap] if held else e.bind(e.splat(weight(tap)))

        def block(row: Any, column: Any, mask: Any) -> None:
            acc = e.registers(self.rows)
            e.zero(acc)
            if unrolled:
                for kx in range(shape.kernel[1]):
                    self.add_column(acc, factor, row, column, kx)
            else:
                each_term(shape, shape.stride, lambda term: self.add_term(acc, factor, row, column, term))
            for i in range(self.rows):
                store(acc[i][0], (row + i) * width + column, mask)

        with serial(0, -(-height // self.rows)) as r:
            row = tirx.min(r * self.rows, height - self.rows)  # the last rows may be computed twice
            lane_blocks(e, width, lambda column, mask: block(row, column, mask))

    def add_column(self, acc: list[Any], factor: Callable[[Any], Any], row: Any, column: Any, kx: int) -> None:
        """The taps of one kernel column; every image row is loaded once for all output rows."""
        e, shape = self.e, self.copy.shape
        (sv, sh), (dv, dh) = shape.stride, shape.dilation
        values: dict[int, Any] = {}
        for ky in range(shape.kernel[0]):
            scalar = factor(ky * shape.kernel[1] + kx)
            for i in range(self.rows):
                y = i * sv + ky * dv
                if y not in values:
                    values[y] = e.bind(self.load((y % sv, kx * dh % sh), (y // sv, kx * dh // sh), row, column))
                e.set(acc[i], acc[i][0] + scalar * values[y])

    def add_term(self, acc: list[Any], factor: Callable[[Any], Any], row: Any, column: Any, term: Term) -> None:
        """One tap, in kernels too large to unroll."""
        scalar = factor(term.index)
        for i in range(self.rows):
            self.e.set(acc[i], acc[i][0] + scalar * self.load(term.phase, term.shift, row + i, column))

    def load(self, phase: tuple[int, int], shift: tuple[Any, Any], row: Any, column: Any) -> Any:
        plane = self.copy.phases.index(phase) * self.copy.plane
        return self.e.load(self.source, plane + (row + shift[0]) * self.copy.pitch + shift[1] + column)
