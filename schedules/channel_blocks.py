"""Images in blocks of channels, (batch, blocks, height, width, lanes): a vector is one pixel of `lanes` channels.

Reading, writing and padding them needs no shuffle, so convolutions keep them from layer to layer; `block_func` and
`unblock_func` convert at the edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from tvm_structured.schedules.base import Epilogue, Extent, blocked_shape
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, arg, either, parallel, prim_func, root_block, serial
from tvm_structured.schedules.epilogue import activate
from tvm_structured.schedules.images import ImageShape, view
from tvm_structured.schedules.patches import transpose_matrix, vector_load, vector_store

PIXELS = 256  # converted together


def block_view(buffer: Any) -> Any:
    """(batch, blocks, h, w, lanes) as (batch, blocks, h * w * lanes)."""
    batch, blocks, height, width, lanes = buffer.shape
    return view(buffer, (batch, blocks, height * width * lanes))


class BlockWriter:
    """Writes y (batch, blocks, pixels * lanes). Declares the epilogue's operands and y as parameters."""

    def __init__(self, emitter: Emitter, epilogue: Epilogue, shape: Sequence[Extent]) -> None:
        self.emitter, self.epilogue, self.outs = emitter, epilogue, shape[1]
        self.scale = arg("scale", (self.outs,)) if epilogue.scale else None
        self.bias = arg("bias", (self.outs,)) if epilogue.bias else None
        stored = blocked_shape(shape, emitter.lanes)
        residual = arg("residual", stored) if epilogue.residual else None
        y = arg("y", stored)  # parameters come first, a view ends their list
        self.residual = None if residual is None else block_view(residual)
        self.y = block_view(y)

    @classmethod
    def onto(cls, emitter: Emitter, buffer: Any) -> BlockWriter:
        """A writer without an epilogue onto a buffer (batch, blocks, pixels * lanes): one step of several."""
        writer = cls.__new__(cls)
        writer.emitter, writer.epilogue = emitter, Epilogue()
        writer.scale = writer.bias = writer.residual = None
        writer.y = buffer
        return writer

    def feature(self, operand: Any, block: Any) -> Any:
        """The vector of a per-channel operand; zero where there is no channel."""
        e, first = self.emitter, block * self.emitter.lanes
        if self.outs % e.lanes == 0:
            return e.load(operand, first)
        return e.load_or_zero(operand, e.mask(first, self.outs), first)

    def features(self, block: Any) -> tuple[Any, Any]:
        """(scale, bias) of a block, None where there is none, to be passed to `store`."""
        scale = None if self.scale is None else self.feature(self.scale, block)
        return scale, None if self.bias is None else self.feature(self.bias, block)

    def store(self, value: Any, image: Any, block: Any, pixel: Any, features: tuple[Any, Any]) -> None:
        """act(scale * value + bias + residual) of one pixel's channels."""
        e, index = self.emitter, (image, block, pixel * self.emitter.lanes)
        scale, bias = features
        if scale is not None:
            value = value * scale
        if bias is not None:
            value = value + bias
        if self.residual is not None:
            value = value + e.load(self.residual, *index)
        e.store(self.y, activate(e, self.epilogue, value), *index)


@dataclass(frozen=True)
class BlockCopy:
    """Rows of one group's padded image in scratch: (blocks, rows, pitch, lanes)."""

    shape: ImageShape
    lanes: int
    rows: int
    pitch: int

    @classmethod
    def of(cls, shape: ImageShape, lanes: int, out_rows: int) -> BlockCopy:
        """What a strip of so many output rows reads."""
        reach = [(k - 1) * d + 1 for k, d in zip(shape.kernel, shape.dilation, strict=True)]
        rows = (out_rows - 1) * shape.stride[0] + reach[0]
        return cls(shape, lanes, rows, (shape.output[1] - 1) * shape.stride[1] + reach[1])

    @property
    def block_size(self) -> int:
        """Elements between blocks: an odd number of cache lines, so that blocks do not share cache sets."""
        return (self.rows * self.pitch | 1) * self.lanes

    def size(self, blocks: int) -> int:
        return blocks * self.block_size

    def emit(self, e: Emitter, x: Any, target: Any, image: Any, first_block: Any, blocks: int, first_row: Any) -> None:
        """Fill `target` from x (batch, blocks, pixels * lanes); `first_row` counts in the padded image."""
        height, width = self.shape.image
        top, left = self.shape.padding[:2]
        present = max(0, min(width, self.pitch - left))

        def clear(at: Any, columns: int) -> None:
            if columns > 0:
                with serial(0, columns) as j:
                    e.store(target, e.splat(0.0), at + j * self.lanes)

        def copy_row(b: Any, row: Any, at: Any) -> None:
            clear(at, min(left, self.pitch))
            with serial(0, present) as j:
                value = e.load(x, image, first_block + b, (row * width + j) * self.lanes)
                e.store(target, value, at + (left + j) * self.lanes)
            clear(at + (left + present) * self.lanes, self.pitch - left - present)

        with serial(0, blocks) as b:
            with serial(0, self.rows) as r:
                row, at = first_row + r - top, b * self.block_size + r * (self.pitch * self.lanes)
                either(
                    tirx.all(row >= 0, row < height),
                    lambda: copy_row(b, row, at),
                    lambda: clear(at, self.pitch),
                )


def block_func(shape: Sequence[Extent], cpu: Cpu) -> Any:
    """PrimFunc: x (batch, channels, h, w) -> the same in blocks, zeros behind the last channel."""
    e = Emitter(cpu)

    def convert(x: Any, y: Any, image: Any, block: Any, channels: int, first: Any, count: int) -> None:
        transpose_matrix(
            e,
            channels,
            count,
            lambda channel, pixel, mask: vector_load(e, x, mask, image, block * e.lanes + channel, first + pixel),
            lambda pixel, _, value, __: e.store(y, value, image, block, (first + pixel) * e.lanes),
        )

    with prim_func("to_blocks") as made:
        x, y = arg("x", shape), arg("y", blocked_shape(shape, cpu.lanes))
        with root_block():
            flat, blocks = view(x, (*shape[:2], shape[2] * shape[3])), block_view(y)
            each_square(shape, cpu.lanes, lambda *piece: convert(flat, blocks, *piece))
    return made.func


def unblock_func(shape: Sequence[Extent], cpu: Cpu) -> Any:
    """PrimFunc: x in blocks -> (batch, channels, h, w)."""
    e = Emitter(cpu)

    def convert(x: Any, y: Any, image: Any, block: Any, channels: int, first: Any, count: int) -> None:
        transpose_matrix(
            e,
            count,
            channels,
            lambda pixel, _, __: e.load(x, image, block, (first + pixel) * e.lanes),
            lambda channel, pixel, value, mask: vector_store(
                e, y, value, mask, image, block * e.lanes + channel, first + pixel
            ),
        )

    with prim_func("from_blocks") as made:
        x, y = arg("x", blocked_shape(shape, cpu.lanes)), arg("y", shape)
        with root_block():
            blocks, flat = block_view(x), view(y, (*shape[:2], shape[2] * shape[3]))
            each_square(shape, cpu.lanes, lambda *piece: convert(blocks, flat, *piece))
    return made.func


def each_square(shape: Sequence[Extent], lanes: int, body: Callable[..., None]) -> None:
    """body(image, block, channels in it, first pixel, pixels) in parallel over the whole image.

    The last pixels of an image are taken twice where the pieces do not fit.
    """
    batch, channels, height, width = shape
    pixels, (full, rest) = height * width, divmod(channels, lanes)
    pieces = -(-pixels // PIXELS)
    size = min(pixels, -(-pixels // pieces // lanes) * lanes)
    blocks = full + bool(rest)
    with parallel(0, batch * (blocks * pieces)) as unit:
        image, block = unit // (blocks * pieces), unit // pieces % blocks
        first = tirx.min(unit % pieces * size, pixels - size)
        if not rest:
            body(image, block, lanes, first, size)
        elif not full:
            body(image, 0, rest, first, size)
        else:
            either(
                block < full,
                lambda: body(image, block, lanes, first, size),
                lambda: body(image, full, rest, first, size),
            )
