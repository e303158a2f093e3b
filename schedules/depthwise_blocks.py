"""Depthwise convolution of an image in blocks of channels: a channel to a lane, nothing to shuffle or to broadcast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config
from tvm_structured.schedules.channel_blocks import BlockCopy, BlockWriter
from tvm_structured.schedules.conv_units import repeat
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, parallel, scratch, serial
from tvm_structured.schedules.images import ImageShape
from tvm_structured.schedules.space import around

STRIP_BYTES = 96 * 1024  # of padded image, in the levels of cache next to the core
UNROLLED_TAPS = 25


def configs(shape: ImageShape, cpu: Cpu) -> Iterator[Config]:
    """Pixels of a row whose sums stay in registers beside the kernel, and rows that are worked on together."""
    height, width = shape.output
    first, *others = (6, 8, 4, 12, 3, 2, 1, 10, 14) if cpu.registers >= 32 else (4, 3, 2, 1, 6)
    default = {"form": "depthwise blocks", "rows": strip_rows(shape, cpu), "columns": min(first, width)}
    strips = sorted({-(-height // count) for count in (1, 2, 3, 4, 6, 8, 12, 16, 28, 56) if count <= height})
    yield from around(default, {"columns": [count for count in others if count <= width], "rows": strips})


def pack(matrix: np.ndarray, shape: ImageShape, lanes: int) -> np.ndarray:
    """(channels, taps) -> (blocks, taps, lanes), zeros where there is no channel."""
    blocks = -(-shape.groups // lanes)
    padded = np.zeros((blocks * lanes, shape.taps), np.float32)
    padded[: shape.groups] = matrix.reshape(shape.groups, shape.taps)
    return np.ascontiguousarray(padded.reshape(blocks, lanes, shape.taps).swapaxes(1, 2))


def strip_rows(shape: ImageShape, cpu: Cpu) -> int:
    """Output rows that are worked on together: their image stays in cache, and every thread has work."""
    height = shape.output[0]
    one = BlockCopy.of(shape, cpu.lanes, 1)
    room = (STRIP_BYTES // (4 * cpu.lanes * one.pitch) - one.rows) // shape.stride[0] + 1
    blocks = -(-shape.groups // cpu.lanes)
    strips = max(-(-height // max(1, room)), -(-2 * cpu.cores // blocks))
    return -(-height // min(strips, height))


def emit(e: Emitter, shape: ImageShape, config: Config, x: Any, weight: Any, writer: BlockWriter) -> None:
    """The whole convolution; x is (batch, blocks, pixels * lanes). One output channel to an input channel."""
    lanes, (sv, sh), (height, width) = e.lanes, shape.stride, shape.output
    rows, blocks = config["rows"], -(-shape.groups // e.lanes)
    strips, copy = -(-height // rows), BlockCopy.of(shape, lanes, rows)
    direct = not any(shape.padding)
    pitch = shape.image[1] if direct else copy.pitch
    columns = -(-width // -(-width // config["columns"]))
    with parallel(0, shape.batch * (blocks * strips)) as unit:
        image, block = unit // (blocks * strips), unit // strips % blocks
        first_row = tirx.min(unit % strips * rows, height - rows)
        if not direct:
            source = scratch((copy.size(1),))
            copy.emit(e, x, source, image, block, 1, first_row * sv)
        features = writer.features(block)
        taps = held_taps(e, shape, weight, block)

        def load(at: Any) -> Any:
            if direct:
                return e.load(x, image, block, (first_row * (sv * pitch) + at) * lanes)
            return e.load(source, at * lanes)

        def tile(row: Any, column: Any) -> None:
            acc = e.registers(columns)
            e.zero(acc)
            origin = row * (sv * pitch) + column * sh
            unrolled = shape.taps <= UNROLLED_TAPS

            def kernel_row(ky: Any) -> None:
                start, tap_row = origin + ky * (shape.dilation[0] * pitch), ky * shape.kernel[1]
                pixels: dict[int, Any] = {}  # loaded once for all the taps that need them

                def tap(kx: Any) -> None:
                    factor = taps[tap_row + kx] if unrolled else e.bind(e.load(weight, block, tap_row + kx, 0))
                    for j in range(columns):
                        at = j * sh + kx * shape.dilation[1]
                        if unrolled and at not in pixels:
                            pixels[at] = e.bind(load(start + at))
                        value = pixels[at] if unrolled else load(start + at)
                        e.set(acc[j], acc[j][0] + value * factor)

                repeat(shape.kernel[1], not unrolled, tap)

            repeat(shape.kernel[0], not unrolled, kernel_row)
            for j in range(columns):
                writer.store(acc[j][0], image, block, (first_row + row) * width + column + j, features)

        with serial(0, rows) as r:
            with serial(0, -(-width // columns)) as c:
                tile(r, tirx.min(c * columns, width - columns))


def held_taps(e: Emitter, shape: ImageShape, weight: Any, block: Any) -> list[Any]:
    """The kernel in registers, where it is small."""
    if shape.taps > UNROLLED_TAPS:
        return []
    return [e.bind(e.load(weight, block, tap, 0)) for tap in range(shape.taps)]
