"""quantized.*  -->  the accelerator's operators, with the same meaning bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tvm_structured.dialect import constant, static_shape
from tvm_structured.errors import VTAError
from tvm_structured.layer_parts import whole_layer
from tvm_structured.quantized import QuantizedCall
from tvm_structured.structures.layer import Array
from tvm_structured.vta.operators import (
    Int8Add,
    Int8AvgPool,
    Int8BlockDiagonal,
    Int8Chain,
    Int8Conv2d,
    Int8Conv2dTranspose,
    Int8Dense,
    Int8MaxPool,
    Int8Rescale,
    Int8StructuredDense,
    Joined,
    Operator,
    Requantize,
    Scale,
)


def operator_of(calls: Sequence[QuantizedCall]) -> Operator | None:
    """The accelerator's operator with the meaning of a call, or of several that follow each other as the factors of a
    chain; None where it has none."""
    if not all(call.op in OPERATORS and is_takeable(call) for call in calls):
        return None
    try:
        operators = [OPERATORS[call.op](call) for call in calls]
        return operators[0] if len(operators) == 1 else Int8Chain(tuple(operators), whole_layer(calls[0].layer))
    except VTAError:
        return None


def is_takeable(call: QuantizedCall) -> bool:
    """Of static shape."""
    shapes = [static_shape(operand) for operand in call.inputs]
    return all(shape is not None and all(isinstance(extent, int) for extent in shape) for shape in shapes)


def weighted(call: QuantizedCall) -> dict[str, Any]:
    """What all operators with weights have."""
    bias, multiplier = (constant(value) for value in call.constants[-2:])
    same = int(multiplier[0]) if np.all(multiplier == multiplier[0]) else multiplier
    return {
        "bias": bias if bias.any() else None,
        "requantize": Requantize(call.pre_shift, same, call.shift, call.low, call.high, bool(call.rounds)),
        "residual": scale(call, 0, Joined if call.joined else Scale) if len(call.inputs) > 1 else None,
        "name": call.layer,
    }


def scale(call: QuantizedCall, position: int, kind: type[Scale] = Scale) -> Scale:
    return kind(call.multipliers[position], call.shifts[position])


def bounds(call: QuantizedCall) -> dict[str, Any]:
    return {"low": call.low, "high": call.high, "name": call.layer or call.op}


def dense(call: QuantizedCall) -> Operator:
    if call.structure:
        return Int8StructuredDense(call.to_structure(), **weighted(call))
    return Int8Dense(call.weight(), **weighted(call))


def stage(call: QuantizedCall) -> Operator:
    """Features (a, k, b) are brought into the order (a, b, k), and back."""
    lead, trail = call.sizes["lead"], call.sizes["trail"]
    weight = call.weight()
    _, rows, depth = weight.shape
    before = order(lead, depth, trail)
    after = np.argsort(order(lead, rows, trail))
    orders = {"in_order": before, "out_order": after} if trail > 1 else {}
    return Int8BlockDiagonal(weight, **weighted(call), groups=lead * trail, **orders)


def order(lead: int, middle: int, trail: int) -> Array:
    """Where the features (a, k, b) lie, listed as (a, b, k)."""
    return np.arange(lead * middle * trail).reshape(lead, middle, trail).transpose(0, 2, 1).reshape(-1)


def conv2d(call: QuantizedCall) -> Operator:
    geometry = {"stride": call.strides, "padding": call.padding, "groups": call.groups}
    return Int8Conv2d(spread(call.weight(), call.dilation), **weighted(call), **geometry)


def spread(weight: Array, dilation: tuple[int, ...]) -> Array:
    """A dilated kernel as a larger one with zeros in it."""
    if set(dilation) == {1}:
        return weight
    extents = [(size - 1) * d + 1 for size, d in zip(weight.shape[2:], dilation, strict=True)]
    larger = np.zeros((*weight.shape[:2], *extents), np.int8)
    larger[:, :, :: dilation[0], :: dilation[1]] = weight
    return larger


def conv2d_transpose(call: QuantizedCall) -> Operator:
    geometry = {"stride": call.strides, "padding": call.padding, "output_padding": call.output_padding}
    return Int8Conv2dTranspose(call.weight(), **weighted(call), **geometry, groups=call.groups)


OPERATORS: dict[str, Callable[[QuantizedCall], Operator]] = {
    "dense": dense,
    "stage": stage,
    "conv2d": conv2d,
    "conv2d_transpose": conv2d_transpose,
    "add": lambda call: Int8Add(scale(call, 0), scale(call, 1), **bounds(call)),
    "rescale": lambda call: Int8Rescale(scale(call, 0), **bounds(call)),
    "max_pool2d": lambda call: Int8MaxPool(call.kernel, call.strides, call.padding, **bounds(call)),
    "avg_pool2d": lambda call: Int8AvgPool(
        call.kernel, call.strides, call.padding, **bounds(call), scale=scale(call, 0)
    ),
}
