"""Images in blocks of channels to rows and back, for kernels that take rows: see `patches`. Nothing is transposed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from tvm import tirx

from tvm_structured.schedules.base import Epilogue, Extent, blocked_shape
from tvm_structured.schedules.channel_blocks import BlockWriter, block_view
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, arg, either, parallel, prim_func, root_block, serial
from tvm_structured.schedules.images import ImageShape, lane_blocks
from tvm_structured.schedules.patches import vector_store


def block_patches_func(shape: ImageShape, cpu: Cpu) -> Any:
    """PrimFunc: x (batch, blocks, h, w, lanes) -> patches (batch * oh * ow, kh * kw * channels)."""
    e = Emitter(cpu)
    (kh, kw), (sv, sh), (dv, dh) = shape.kernel, shape.stride, shape.dilation
    (height, width), (out_height, out_width), channels = shape.image, shape.output, shape.channels
    with prim_func("patches") as made:
        stored = blocked_shape((shape.batch, channels, height, width), e.lanes)
        x, y = arg("x", stored), arg("y", (shape.batch * (out_height * out_width), shape.depth))
        with root_block():
            blocks = block_view(x)
            with parallel(0, shape.batch * out_height) as unit:
                image, row = unit // out_height, unit % out_height * sv - shape.padding[0]
                with serial(0, out_width) as column:
                    left, target = column * sh - shape.padding[1], unit * out_width + column
                    with serial(0, kh) as ky:
                        with serial(0, kw) as kx:
                            at, down, right = (ky * kw + kx) * channels, row + ky * dv, left + kx * dh

                            def pixel(first: Any, mask: Any) -> None:
                                value = e.load(blocks, image, first // e.lanes, (down * width + right) * e.lanes)
                                vector_store(e, y, value, mask, target, at + first)

                            def nothing(first: Any, mask: Any) -> None:
                                vector_store(e, y, e.splat(0.0), mask, target, at + first)

                            inside = tirx.all(down >= 0, down < height, right >= 0, right < width)
                            if any(shape.padding):
                                either(
                                    inside,
                                    lambda: lane_blocks(e, channels, pixel),
                                    lambda: lane_blocks(e, channels, nothing),
                                )
                            else:
                                lane_blocks(e, channels, pixel)
    return made.func


def rows_to_blocks_func(shape: tuple[Extent, ...], epilogue: Epilogue, cpu: Cpu) -> Any:
    """PrimFunc: rows (batch * h * w, channels), then the epilogue's operands -> y (batch, blocks, h, w, lanes)."""
    e = Emitter(cpu)
    batch, channels, height, width = shape
    rest = channels % e.lanes
    with prim_func("rows_to_image") as made:
        rows = arg("rows", (batch * (height * width), channels))
        writer = BlockWriter(e, epilogue, shape)
        with nullcontext() if epilogue.operands else root_block():
            with parallel(0, batch * height) as unit:
                image, row = unit // height, unit % height

                def copy(first: Any, mask: Any) -> None:
                    block = first // e.lanes
                    features = writer.features(block)
                    with serial(0, width) as column:
                        at = (unit * width + column, first)
                        value = e.load(rows, *at) if mask is None else e.load_or_zero(rows, e.mask(0, rest), *at)
                        writer.store(value, image, block, row * width + column, features)

                lane_blocks(e, channels, copy)
    return made.func
