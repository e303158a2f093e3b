"""Direct convolution with pixels in lanes: a GEMM whose operands are shifted rows of the image.

y[o, p] = sum_{c, ky, kx} w[o, c, ky, kx] * s[c, p + shift(ky, kx)], p running over the rows of a strip laid out with
one pitch. Nothing is transposed, so short sums and few output channels cost no more than they must; the positions
between the rows are wasted (pitch - width of them to a row).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from tvm_structured.schedules.base import Config, Extent
from tvm_structured.schedules.conv_units import Term, Units, each_term
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, parallel, scratch, serial
from tvm_structured.schedules.images import ImageShape, ImageWriter, PaddedCopy, lane_blocks

PHASE_LIMIT = 16  # a larger stride would split the image into too many planes


def register_blocks(cpu: Cpu) -> tuple[tuple[int, int], ...]:
    """(output channels, pixel vectors) that fit the registers."""
    if cpu.registers >= 32:
        return ((8, 3), (6, 4), (12, 2), (4, 6), (3, 8), (2, 8), (1, 8))
    return ((6, 2), (4, 2), (3, 3), (2, 4), (1, 6))


def padded_copy(shape: ImageShape, rows: int, slack: int = 0) -> PaddedCopy:
    """The scratch of a strip of output rows."""
    (kh, kw), (sv, sh), (dv, dh) = shape.kernel, shape.stride, shape.dilation
    phases = sorted({(y * dv % sv, x * dh % sh) for y in range(kh) for x in range(kw)})
    down, right = (kh - 1) * dv // sv, (kw - 1) * dh // sh
    return PaddedCopy(shape, rows + down, shape.output[1] + right, tuple(phases), shape.stride, slack)


def positions(shape: ImageShape, rows: int) -> int:
    """Positions of a strip, those between the rows included."""
    return (rows - 1) * padded_copy(shape, rows).pitch + shape.output[1]


def is_direct(shape: ImageShape, config: Config, lanes: int) -> bool:
    """Whether the image is read where it is: pointwise, and a strip at least as long as a block."""
    return shape.is_pointwise and config["rows"] * shape.output[1] >= config["nr"] * lanes


def emit(e: Emitter, shape: ImageShape, config: Config, x: Any, weight: Any, writer: ImageWriter) -> None:
    """The whole convolution; x is (batch, channels, pixels)."""
    units = Units(shape, config["rows"], config["parts"], config["mr"])
    mr, nr = config["mr"], config["nr"]
    direct, copy = is_direct(shape, config, e.lanes), padded_copy(shape, config["rows"], nr * e.lanes)
    count = positions(shape, config["rows"])
    vectors = -(-count // e.lanes)
    with parallel(0, units.total) as unit:
        image, group, first_row, first_block, num_blocks = units.at(unit)
        sums = scratch((mr, vectors * e.lanes))
        if direct:
            source = x
        else:
            source = scratch((copy.size,))
            copy.emit(e, x, source, image, group * shape.channels, first_row * shape.stride[0])

        def operand(term: Term, position: Any) -> Any:
            if direct:
                return e.load(x, image, group * shape.channels + term.channel, first_row * shape.output[1] + position)
            plane = copy.phases.index(term.phase) * copy.plane
            shift = term.shift[0] * copy.pitch + term.shift[1]
            return e.load(source, term.channel * copy.channel_size + plane + shift + position)

        def block(index: Any, first: Any, width: int) -> None:
            acc = [e.registers(width) for _ in range(mr)]
            for row in acc:
                e.zero(row)

            def multiply(term: Term) -> None:
                pixels = [e.bind(operand(term, first + q * e.lanes)) for q in range(width)]
                for i in range(mr):
                    scalar = e.bind(e.splat(weight[group, index, term.index, i]))
                    for q in range(width):
                        e.set(acc[i][q], acc[i][q][0] + scalar * pixels[q])

            each_term(shape, shape.stride, multiply)
            for i in range(mr):
                for q in range(width):
                    e.store(sums, acc[i][q][0], i, first + q * e.lanes)

        with serial(0, num_blocks) as b:
            full, rest = divmod(vectors, nr)
            # read in place, vectors must not run over the strip: the last block moves back and overlaps
            end = count if direct else vectors * e.lanes
            if full:
                with serial(0, full) as p:
                    block(first_block + b, tirx.min(p * (nr * e.lanes), end - nr * e.lanes), nr)
            if rest:
                block(first_block + b, end - rest * e.lanes, rest)
            outs = units.num_outs((first_block + b) * mr, mr)
            first_out = group * shape.outs + (first_block + b) * mr
            write_strip(
                e, writer, sums, (image, first_out, outs), (first_row, config["rows"], shape.output[1], copy.pitch)
            )


def write_strip(
    e: Emitter,
    writer: ImageWriter,
    sums: Any,
    channels: tuple[Any, Any, Extent],
    strip: tuple[Any, int, int, int],
) -> None:
    """(channels, positions) in scratch -> the image, through the epilogue and without the gaps between rows.

    `channels` is (image, first channel, number), `strip` (first row, rows, width, pitch).
    """
    (image, first_channel, num_channels), (first_row, rows, width, pitch) = channels, strip
    count, length = (1, rows * width) if pitch == width else (rows, width)
    with serial(0, num_channels) as i:
        with serial(0, count) as r:
            lane_blocks(
                e,
                length,
                lambda at, mask: writer.store(
                    e.load(sums, i, r * pitch + at), image, first_channel + i, (first_row + r) * width + at, mask
                ),
            )
