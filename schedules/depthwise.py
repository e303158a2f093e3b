"""Depthwise convolution: every channel has kernels of its own. Pixels in lanes, several output rows at once.

Nothing is summed over channels, so loads are the limit: a row of the image is loaded once for all the output rows of
the block that it takes part in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config
from tvm_structured.schedules.conv_pixels import padded_copy
from tvm_structured.schedules.conv_units import Term, each_term
from tvm_structured.schedules.emit import Emitter, parallel, scratch, serial
from tvm_structured.schedules.images import ImageShape, ImageWriter, lane_blocks

MOST_CHANNELS = 16  # to a piece of work
UNROLLED = 256  # products; larger kernels loop over their rows


def pack(matrix: np.ndarray, shape: ImageShape) -> np.ndarray:
    """(channels, multiplier, taps)."""
    return np.ascontiguousarray(matrix.reshape(shape.groups, shape.outs, shape.taps), np.float32)


def emit(e: Emitter, shape: ImageShape, config: Config, x: Any, weight: Any, writer: ImageWriter) -> None:
    """The whole convolution; x is (batch, channels, pixels). `shape.outs` is the multiplier."""
    height, width = shape.output
    copy = padded_copy(shape, height)
    rows = min(config["rows"], height)
    unrolled = rows * shape.taps <= UNROLLED
    hoisted = unrolled and shape.taps <= e.cpu.registers - 2 * rows - 6

    chunk = max(1, min(MOST_CHANNELS, shape.groups // (4 * e.cpu.cores)))
    chunks = -(-shape.groups // chunk)

    with parallel(0, shape.batch * chunks) as unit:
        image, first = unit // chunks, unit % chunks * chunk
        source = scratch((copy.size,))

        def load(phase: tuple[int, int], shift: tuple[Any, Any], row: Any, column: Any) -> Any:
            plane = copy.phases.index(phase) * copy.plane
            return e.load(source, plane + (row + shift[0]) * copy.pitch + shift[1] + column)

        def kernel(channel: Any, multiple: Any) -> None:
            def scalar(tap: Any) -> Any:
                return e.bind(e.splat(weight[channel, multiple, tap]))

            held = [scalar(tap) for tap in range(shape.taps)] if hoisted else []

            def block(row: Any, column: Any, mask: Any) -> None:
                acc = e.registers(rows)
                e.zero(acc)
                if unrolled:
                    for kx in range(shape.kernel[1]):
                        add_column(acc, row, column, kx)
                else:
                    each_term(shape, shape.stride, lambda term: add_term(acc, row, column, term))
                for i in range(rows):
                    writer.store(acc[i][0], image, channel * shape.outs + multiple, (row + i) * width + column, mask)

            def add_column(acc: list[Any], row: Any, column: Any, kx: int) -> None:
                """The taps of one kernel column; every image row is loaded once for all output rows."""
                (sv, sh), (dv, dh) = shape.stride, shape.dilation
                values: dict[int, Any] = {}
                for ky in range(shape.kernel[0]):
                    tap = ky * shape.kernel[1] + kx
                    factor = held[tap] if hoisted else scalar(tap)
                    for i in range(rows):
                        y = i * sv + ky * dv
                        if y not in values:
                            values[y] = e.bind(load((y % sv, kx * dh % sh), (y // sv, kx * dh // sh), row, column))
                        e.set(acc[i], acc[i][0] + factor * values[y])

            def add_term(acc: list[Any], row: Any, column: Any, term: Term) -> None:
                factor = scalar(term.index)
                for i in range(rows):
                    e.set(acc[i], acc[i][0] + factor * load(term.phase, term.shift, row + i, column))

            with serial(0, -(-height // rows)) as r:
                row = tirx.min(r * rows, height - rows)  # the last rows may be computed twice
                lane_blocks(e, width, lambda column, mask: block(row, column, mask))

        with serial(0, chunk if shape.groups % chunk == 0 else tirx.min(chunk, shape.groups - first)) as c:
            copy.emit(e, x, source, image, first + c, 0)
            with serial(0, shape.outs) as m:
                kernel(first + c, m)
