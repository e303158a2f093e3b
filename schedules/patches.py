"""Images to rows and back: what a kernel that takes rows needs to compute a convolution.

A patch is what one output pixel sees: (kh, kw, channels), channel fastest, one row of a (batch * oh * ow, kh * kw *
channels) matrix. Both directions are transpositions in registers, channels of a pixel against pixels of a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tvm import tirx

from tvm_structured.schedules.base import Epilogue, Extent
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, arg, either, parallel, prim_func, root_block, scratch, serial
from tvm_structured.schedules.images import ImageShape, ImageWriter, lane_blocks, transpose, view, zero_fill

STRIP_BYTES = 256 * 1024  # of converted image that a thread keeps in level 2
PIXELS = 64  # of a pointwise convolution or of the way back, to a piece of work


def transpose_matrix(
    e: Emitter,
    rows: int,
    columns: int,
    load: Callable[[Any, Any, Any], Any],
    store: Callable[[Any, Any, Any, Any], None],
) -> None:
    """store(column, first_row, vector, mask) of the matrix whose rows load(row, first_column, mask) reads."""

    def square(row: Any, num_rows: int, column: Any, num_columns: int) -> None:
        read_mask = None if num_columns == e.lanes else e.bind_mask(0, num_columns)
        write_mask = None if num_rows == e.lanes else e.bind_mask(0, num_rows)
        vectors = [e.bind(load(row + i, column, read_mask)) for i in range(num_rows)]
        for i, vector in enumerate(transpose(e, vectors)[:num_columns]):
            store(column + i, row, vector, write_mask)

    pieces(rows, e.lanes, lambda row, n: pieces(columns, e.lanes, lambda column, k: square(row, n, column, k)))


def pieces(count: int, size: int, body: Callable[[Any, int], None]) -> None:
    """body(first, number) over pieces of `size`, the last one smaller."""
    full, rest = divmod(count, size)
    if full:
        with serial(0, full) as i:
            body(i * size, size)
    if rest:
        body(full * size, rest)


def vector_load(e: Emitter, buffer: Any, mask: Any, *index: Any) -> Any:
    return e.load(buffer, *index) if mask is None else e.load_masked(buffer, mask, *index)


def vector_store(e: Emitter, buffer: Any, value: Any, mask: Any, *index: Any) -> None:
    if mask is None:
        e.store(buffer, value, *index)
    else:
        e.store_masked(buffer, value, mask, *index)


def patches_func(shape: ImageShape, cpu: Cpu) -> Any:
    """PrimFunc: x (batch, channels, h, w) -> patches (batch * oh * ow, kh * kw * channels)."""
    e = Emitter(cpu)
    height, width = shape.image
    rows = shape.batch * (shape.output[0] * shape.output[1])
    with prim_func("patches") as made:
        x = arg("x", (shape.batch, shape.channels, height, width))
        y = arg("y", (rows, shape.depth))
        with root_block():
            flat = view(x, (shape.batch, shape.channels, height * width))
            if shape.is_pointwise:
                pixels_to_rows(e, shape, flat, y)
            else:
                windows_to_rows(e, shape, flat, y)
    return made.func


def pixels_to_rows(e: Emitter, shape: ImageShape, x: Any, y: Any) -> None:
    """A pointwise convolution: (channels, pixels) -> (pixels, channels) for each image."""

    def piece(image: Any, first: Any, count: int) -> None:
        transpose_matrix(
            e,
            shape.channels,
            count,
            lambda channel, pixel, mask: vector_load(e, x, mask, image, channel, first + pixel),
            lambda pixel, channel, value, mask: vector_store(e, y, value, mask, image * total + first + pixel, channel),
        )

    total = shape.output[0] * shape.output[1]
    each_piece(shape.batch, total, piece)


def each_piece(batch: Extent, pixels: int, body: Callable[[Any, Any, int], None]) -> None:
    """body(image, first pixel, number) in parallel over equal pieces; the last one overlaps where they do not fit."""
    count = -(-pixels // PIXELS)
    size = -(-pixels // count)
    with parallel(0, batch * count) as unit:
        body(unit // count, tirx.min(unit % count * size, pixels - size), size)


def windows_to_rows(e: Emitter, shape: ImageShape, x: Any, y: Any) -> None:
    """Strips of output rows: the padded image with channels fastest in scratch, then its windows copied row by row."""
    (kh, kw), (sv, sh), (dv, dh) = shape.kernel, shape.stride, shape.dilation
    (height, width), (out_height, out_width), channels = shape.image, shape.output, shape.channels
    top, left = shape.padding[:2]
    columns = (out_width - 1) * sh + (kw - 1) * dh + 1  # of the padded image that are needed
    strip = strip_rows(shape, columns, e.cpu)
    strips = -(-out_height // strip)
    image_rows = (strip - 1) * sv + (kh - 1) * dv + 1
    present = max(0, min(width, columns - left))  # columns of the image among them

    with parallel(0, shape.batch * strips) as unit:
        image = unit // strips
        first_row = tirx.min(unit % strips * strip, out_height - strip)
        held = scratch((image_rows * columns * channels + e.lanes,))

        with serial(0, image_rows) as r:
            row, start = first_row * sv + r - top, r * (columns * channels)

            def convert() -> None:
                zero_fill(e, held, start, left * channels)
                transpose_matrix(
                    e,
                    channels,
                    present,
                    lambda channel, column, mask: vector_load(e, x, mask, image, channel, row * width + column),
                    lambda column, channel, value, mask: vector_store(
                        e, held, value, mask, start + (left + column) * channels + channel
                    ),
                )
                end = left + present
                zero_fill(e, held, start + end * channels, (columns - end) * channels)

            either(
                tirx.all(row >= 0, row < height),
                convert,
                lambda: zero_fill(e, held, start, columns * channels),
            )

        # with dilation 1 the taps of a kernel row lie side by side
        runs, length = (1, kw * channels) if dh == 1 else (kw, channels)
        with serial(0, strip) as r:
            with serial(0, out_width) as column:
                target = (image * out_height + first_row + r) * out_width + column
                with serial(0, kh) as ky:
                    with serial(0, runs) as kx:
                        source = ((r * sv + ky * dv) * columns + column * sh + kx * dh) * channels
                        begin = (ky * runs + kx) * length
                        lane_blocks(
                            e,
                            length,
                            lambda at, mask: vector_store(
                                e, y, vector_load(e, held, mask, source + at), mask, target, begin + at
                            ),
                        )


def strip_rows(shape: ImageShape, columns: int, cpu: Cpu) -> int:
    """Output rows to a strip: enough strips for all threads, and their image stays in cache."""
    height = shape.output[0]
    reach = (shape.kernel[0] - 1) * shape.dilation[0] + 1
    room = STRIP_BYTES // (4 * columns * shape.channels) - reach
    rows = max(1, min(room // shape.stride[0] + 1, -(-height // (2 * cpu.cores))))
    return -(-height // -(-height // rows))


def rows_to_image_func(shape: tuple[Extent, ...], epilogue: Epilogue, cpu: Cpu) -> Any:
    """PrimFunc: rows (batch * h * w, channels), then the epilogue's operands -> y (batch, channels, h, w)."""
    e = Emitter(cpu)
    batch, channels, height, width = shape
    pixels = height * width
    with prim_func("rows_to_image") as made:
        rows = arg("rows", (batch * pixels, channels))
        writer = ImageWriter(e, epilogue, shape)

        def piece(image: Any, first: Any, count: int) -> None:
            transpose_matrix(
                e,
                count,
                channels,
                lambda pixel, channel, mask: vector_load(e, rows, mask, image * pixels + first + pixel, channel),
                lambda channel, pixel, value, mask: writer.store(value, image, channel, first + pixel, mask),
            )

        with nullcontext() if epilogue.operands else root_block():
            each_piece(batch, pixels, piece)
    return made.func
