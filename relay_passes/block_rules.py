"""What becomes of an operator when its images are in blocks of channels, (n, c / lanes, h, w, lanes).

A rule takes the blocker and a call, and gives the call on blocks, or None where it has to stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from tvm_structured.dialect import constant, static_shape
from tvm_structured.relay_passes.expressions import integers, same_shape

# Lanes behind the last channel hold any finite number: what these make of it is finite too
UNARY = ("abs", "clip", "negative", "sigmoid", "tanh")
ACTIVATIONS = ("gelu", "gelu_tanh", "leakyrelu", "relu", "relu6", "selu", "silu")
BINARY = ("add", "maximum", "minimum", "multiply", "subtract")
POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")


def unary(blocker: Any, call: Any) -> Any | None:
    blocks = blocker.blocks_of(call.args[0])
    return None if blocks is None else relax.Call(call.op, [blocks, *call.args[1:]], call.attrs)


def binary(blocker: Any, call: Any) -> Any | None:
    """Images of one size, images and a number for each channel, images and a constant."""
    operands = [operand_blocks(blocker, call, value) for value in call.args]
    if any(value is None for value in operands) or not any(isinstance(value, relax.Var) for value in operands):
        return None
    return relax.Call(call.op, operands, call.attrs)


def operand_blocks(blocker: Any, call: Any, value: Any) -> Any | None:
    known = constant(value)
    if known is not None:
        return constant_blocks(known, static_shape(call), blocker.cpu.lanes)
    shape, image = static_shape(value), static_shape(call)
    fits = len(shape) == 4 and same_shape(shape[:2], image[:2]) and (shape[2:] in (image[2:], (1, 1)))
    return blocker.blocks_of(value) if fits else None


def constant_blocks(value: np.ndarray, image: tuple[Any, ...], lanes: int) -> Any | None:
    """A number, or one for each channel: (1, blocks, 1, 1, lanes), ones behind the last channel."""
    if value.size == 1:
        return relax.const(value.reshape(()))
    aligned = value.reshape((1,) * (4 - value.ndim) + value.shape)
    channels = image[1]
    if aligned.shape != (1, channels, 1, 1):
        return None
    padded = np.ones(-(-channels // lanes) * lanes, value.dtype)
    padded[:channels] = aligned.reshape(-1)
    return relax.const(padded.reshape(1, -1, 1, 1, lanes))


def pool(blocker: Any, call: Any) -> Any | None:
    blocks = blocker.blocks_of(call.args[0])
    if blocks is None or str(call.attrs.layout) != "NCHW":
        return None
    make = getattr(relax.op.nn, call.op.name.removeprefix("relax.nn."))
    layout = f"NCHW{blocker.cpu.lanes}c"
    if "adaptive" in call.op.name:
        size = call.attrs.output_size
        return make(blocks, None if size is None else integers(size), layout)
    a = call.attrs
    sizes = (integers(values) for values in (a.pool_size, a.strides, a.padding, a.dilation))
    return make(blocks, *sizes, bool(a.ceil_mode), bool(a.count_include_pad), layout)


def mean(blocker: Any, call: Any) -> Any | None:
    """Over whole images, keeping the dimensions."""
    blocks = blocker.blocks_of(call.args[0])
    axes = call.attrs.axis
    if blocks is None or axes is None or not call.attrs.keepdims:
        return None
    return relax.op.mean(blocks, [2, 3], True) if sorted(a % 4 for a in integers(axes)) == [2, 3] else None


def concat(blocker: Any, call: Any) -> Any | None:
    """Along channels, if every part but the last fills its blocks."""
    parts = call.args[0]
    if not isinstance(parts, relax.Tuple) or call.attrs.axis is None or int(call.attrs.axis) % 4 != 1:
        return None
    blocks = [blocker.blocks_of(part) for part in parts.fields]
    if any(part is None for part in blocks):
        return None
    whole = all(static_shape(part)[1] % blocker.cpu.lanes == 0 for part in parts.fields[:-1])
    return relax.op.concat(blocks, 1) if whole else None


RULES: dict[str, Callable[[Any, Any], Any | None]] = {
    **{f"relax.{name}": unary for name in UNARY},
    **{f"relax.nn.{name}": unary for name in ACTIVATIONS},
    **{f"relax.{name}": binary for name in BINARY},
    **{f"relax.nn.{name}": pool for name in POOLS},
    "relax.mean": mean,
    "relax.concat": concat,
}
