"""Direct convolution with output channels in lanes: weights are vectors, pixels are broadcast.

No lane is wasted on the shape of the image and strides cost nothing, so this is the form for small images and many
channels. Each block of results is transposed in registers on its way out, which only long sums repay.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from tvm_structured.schedules.base import Config
from tvm_structured.schedules.channel_blocks import BlockWriter
from tvm_structured.schedules.conv_units import Term, Units, each_tap_first
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, local, parallel, scratch, serial, when
from tvm_structured.schedules.gemm import most_rows
from tvm_structured.schedules.images import ImageShape, ImageWriter, PaddedCopy, transpose

Writer = ImageWriter | BlockWriter
AHEAD = 32  # terms; the weights of small images come from level 3 or memory


def register_blocks(cpu: Cpu) -> tuple[tuple[int, int], ...]:
    """(most pixels, channel vectors) that fit the registers; a block's pixels are transposed as one square."""
    blocks = ((min(cpu.lanes, most_rows(cpu, nr)), nr) for nr in (1, 2, 3, 4, 6))
    return tuple((mr, nr) for mr, nr in blocks if mr > 1)


def pixel_block(shape: ImageShape, most: int) -> tuple[int, int]:
    """(rows, columns) of at most so many pixels, equal shares; several rows only if they are whole."""
    height, width = shape.output
    if width > most:
        return 1, -(-width // -(-width // most))
    rows = min(height, most // width)
    return -(-height // -(-height // rows)), width


def padded_copy(shape: ImageShape, rows: int) -> PaddedCopy:
    """The scratch of a strip of output rows."""
    reach = [(k - 1) * d + 1 for k, d in zip(shape.kernel, shape.dilation, strict=True)]
    pitch = (shape.output[1] - 1) * shape.stride[1] + reach[1]
    return PaddedCopy(shape, (rows - 1) * shape.stride[0] + reach[0], pitch, ((0, 0),), (1, 1))


def emit(e: Emitter, shape: ImageShape, config: Config, x: Any, weight: Any, writer: Writer) -> None:
    """The whole convolution; x is (batch, channels, pixels)."""
    nr, lanes = config["nr"], e.lanes
    units = Units(shape, config["rows"], config["parts"], nr * lanes)
    rows, columns = pixel_block(shape, config["mr"])
    rows = min(rows, config["rows"])
    direct, copy = not any(shape.padding), padded_copy(shape, config["rows"])
    pitch = shape.image[1] if direct else copy.pitch
    offsets = [r * shape.stride[0] * pitch + c * shape.stride[1] for r in range(rows) for c in range(columns)]

    with parallel(0, units.total) as unit:
        image, group, first_row, first_block, num_blocks = units.at(unit)
        if not direct:
            source = scratch((copy.size,))
            copy.emit(e, x, source, image, group * shape.channels, first_row * shape.stride[0])

        def pixel(term: Term, origin: Any, offset: int) -> Any:
            at = origin + term.shift[0] * pitch + term.shift[1] + offset
            if direct:
                return x[image, group * shape.channels + term.channel, first_row * (shape.stride[0] * pitch) + at]
            return source[term.channel * copy.channel_size + at]

        def block(index: Any, row: Any, column: Any) -> None:
            acc = [e.registers(nr) for _ in offsets]
            for registers in acc:
                e.zero(registers)
            origin = row * (shape.stride[0] * pitch) + column * shape.stride[1]

            def multiply(term: Term) -> None:
                panel = [e.bind(e.load(weight, group, index, term.index, q * lanes)) for q in range(nr)]
                for q in range(nr):
                    e.prefetch(weight, group, index, term.index + AHEAD, q * lanes)
                for i, offset in enumerate(offsets):
                    scalar = e.bind(e.splat(pixel(term, origin, offset)))
                    for q in range(nr):
                        e.set(acc[i][q], acc[i][q][0] + scalar * panel[q])

            each_tap_first(shape, multiply)
            for q in range(nr):
                finish([registers[q][0] for registers in acc], index * nr + q, row, column)

        def finish(values: list[Any], vector: Any, row: Any, column: Any) -> None:
            if isinstance(writer, BlockWriter):
                finish_blocks(values, vector, row, column)
            else:
                finish_image(values, vector, row, column)

        def finish_blocks(values: list[Any], vector: Any, row: Any, column: Any) -> None:
            with when(vector * lanes < shape.outs):
                block = group * (shape.outs // lanes) + vector
                features = writer.features(block)
                at = (first_row + row) * shape.output[1] + column
                for i, value in enumerate(values):
                    pixel = at + (i // columns * shape.output[1] + i % columns)
                    writer.store(value, image, block, pixel, features)

        def finish_image(values: list[Any], vector: Any, row: Any, column: Any) -> None:
            """Pixels x channels -> channels x pixels, then through the epilogue."""
            square = local((lanes * lanes,))
            for c, pixels in enumerate(transpose(e, values)):
                e.store(square, pixels, c * lanes)
            mask = None if len(values) == lanes else e.bind_mask(0, len(values))
            with serial(0, units.num_outs(vector * lanes, lanes)) as c:
                channel = group * shape.outs + vector * lanes + c
                at = (first_row + row) * shape.output[1] + column
                writer.store(e.load(square, c * lanes), image, channel, at, mask)

        with serial(0, num_blocks) as b:
            with serial(0, -(-config["rows"] // rows)) as r:
                with serial(0, -(-shape.output[1] // columns)) as c:
                    row = tirx.min(r * rows, config["rows"] - rows)
                    block(first_block + b, row, tirx.min(c * columns, shape.output[1] - columns))
