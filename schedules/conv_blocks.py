"""Direct convolution of an image in blocks of channels into another: weights are vectors, pixels are broadcast.

A block of pixels times `nr` vectors of output channels stays in registers through the whole sum. A padded image is
copied strip by strip, others are read where they lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config
from tvm_structured.schedules.channel_blocks import BlockCopy, BlockWriter
from tvm_structured.schedules.conv_channels import pixel_block
from tvm_structured.schedules.conv_units import Units
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, parallel, scratch, serial, when
from tvm_structured.schedules.images import ImageShape

UNROLL = 4  # terms; of more LLVM loads all operands ahead and runs out of registers
AHEAD = 16  # terms; the weights of small images come from level 3 or memory


def register_blocks(cpu: Cpu) -> tuple[tuple[int, int], ...]:
    """(most pixels, channel vectors) that fit the registers."""
    room = 28 if cpu.registers >= 32 else 12
    return tuple((room // nr, nr) for nr in (1, 2, 3, 4, 6) if nr <= room // 2)


def in_blocks(shape: ImageShape, lanes: int) -> int:
    """Blocks of one group's input channels."""
    return -(-shape.channels // lanes)


def packed_shape(shape: ImageShape, lanes: int, nr: int) -> tuple[int, int, int, int]:
    """(groups, blocks of nr * lanes outputs, terms, nr * lanes); a term is (input block, tap, lane)."""
    depth = in_blocks(shape, lanes) * shape.taps * lanes
    return shape.groups, -(-shape.outs // (nr * lanes)), depth, nr * lanes


def pack(matrix: np.ndarray, shape: ImageShape, lanes: int, nr: int) -> np.ndarray:
    """(groups * outs, kh * kw * channels), channel fastest -> `packed_shape`, zeros where there is no channel."""
    groups, count, depth, width = packed_shape(shape, lanes, nr)
    blocks = in_blocks(shape, lanes)
    padded = np.zeros((groups, count * width, shape.taps, blocks * lanes), np.float32)
    padded[:, : shape.outs, :, : shape.channels] = matrix.reshape(groups, shape.outs, shape.taps, shape.channels)
    split = padded.reshape(groups, count, width, shape.taps, blocks, lanes)
    return np.ascontiguousarray(split.transpose(0, 1, 4, 3, 5, 2)).reshape(groups, count, depth, width)


def emit(e: Emitter, shape: ImageShape, config: Config, x: Any, weight: Any, writer: BlockWriter) -> None:
    """The whole convolution; x is (batch, blocks, pixels * lanes)."""
    nr, lanes, (sv, sh), (dv, dh) = config["nr"], e.lanes, shape.stride, shape.dilation
    units, blocks = Units(shape, config["rows"], config["parts"], nr * lanes), in_blocks(shape, lanes)
    rows, columns = pixel_block(shape, config["mr"])
    rows = min(rows, config["rows"])
    direct, copy = not any(shape.padding), BlockCopy.of(shape, lanes, config["rows"])
    pitch = shape.image[1] if direct else copy.pitch
    offsets = [(r * sv * pitch + c * sh) * lanes for r in range(rows) for c in range(columns)]
    kh, kw = shape.kernel

    with parallel(0, units.total) as unit:
        image, group, first_row, first_block, num_blocks = units.at(unit)
        if not direct:
            source = scratch((copy.size(blocks),))
            copy.emit(e, x, source, image, group * blocks, blocks, first_row * sv)

        def pixel(block: Any, at: Any) -> Any:
            if direct:
                return x[image, group * blocks + block, first_row * (sv * pitch * lanes) + at]
            return source[block * copy.block_size + at]

        def tile(index: Any, row: Any, column: Any) -> None:
            acc = [e.registers(nr) for _ in offsets]
            for registers in acc:
                e.zero(registers)
            origin = (row * (sv * pitch) + column * sh) * lanes
            with serial(0, blocks) as block:
                with serial(0, kh) as ky:
                    with serial(0, kw) as kx:
                        at = origin + (ky * (dv * pitch) + kx * dh) * lanes
                        first = ((block * kh + ky) * kw + kx) * lanes
                        with serial(0, lanes // UNROLL) as four:
                            for lane in range(UNROLL):
                                multiply(acc, index, first + four * UNROLL + lane, block, at + four * UNROLL + lane)
            finish(acc, index, row, column)

        def multiply(acc: list[Any], index: Any, term: Any, block: Any, at: Any) -> None:
            panel = [e.bind(e.load(weight, group, index, term, q * lanes)) for q in range(nr)]
            for q in range(nr):
                e.prefetch(weight, group, index, term + AHEAD, q * lanes)
            for i, offset in enumerate(offsets):
                scalar = e.bind(e.splat(pixel(block, at + offset)))
                for q in range(nr):
                    e.set(acc[i][q], acc[i][q][0] + scalar * panel[q])

        def finish(acc: list[Any], index: Any, row: Any, column: Any) -> None:
            outs = -(-shape.outs // lanes)
            for q in range(nr):
                block = index * nr + q
                if outs % nr == 0:
                    store(acc, q, block, row, column)
                else:
                    with when(block < outs):
                        store(acc, q, block, row, column)

        def store(acc: list[Any], q: int, block: Any, row: Any, column: Any) -> None:
            out_block = group * (shape.outs // lanes) + block
            features = writer.features(out_block)
            at = (first_row + row) * shape.output[1] + column
            for i, registers in enumerate(acc):
                writer.store(
                    registers[q][0], image, out_block, at + (i // columns * shape.output[1] + i % columns), features
                )

        with serial(0, num_blocks) as b:
            with serial(0, -(-config["rows"] // rows)) as r:
                with serial(0, -(-shape.output[1] // columns)) as c:
                    row = tirx.min(r * rows, config["rows"] - rows)
                    tile(first_block + b, row, tirx.min(c * columns, shape.output[1] - columns))
