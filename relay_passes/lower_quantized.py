"""quantized.*(x, weight, bias, multiplier)  -->  integer TensorIR for a CPU.

Sums of products are TVM's own operators on int8 with int32 accumulators; what follows them is elementwise, so that
TVM fuses it into them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx

from tvm_structured.quantized import QuantizedCall


def legalize(builder: Any, call: Any) -> Any:
    """FLegalize of all quantized operators."""
    unpacked = QuantizedCall.of(call)
    assert unpacked is not None
    return LOWER[unpacked.op](builder, unpacked)


def rounding_shift(value: Any, amount: int) -> Any:
    """(value + 2^(amount - 1)) >> amount, arithmetic."""
    if not amount:
        return value
    return (value + int32(1 << (amount - 1))) >> int32(amount)


def plain_shift(value: Any, amount: int) -> Any:
    """value >> amount, arithmetic."""
    return value >> int32(amount) if amount else value


def int32(value: int) -> Any:
    return tirx.IntImm("int32", value)


def clip(value: Any, call: QuantizedCall) -> Any:
    return tirx.max(tirx.min(value, int32(call.high)), int32(call.low)).astype("int8")


def requantize(builder: Any, call: QuantizedCall, acc: Any, channel_axis: int) -> Any:
    """int32 accumulators (and the residual) to int8."""

    def compute(acc: Any, bias: Any, multiplier: Any, *residual: Any) -> Any:
        def element(*index: Any) -> Any:
            channel = index[channel_axis]
            shift = rounding_shift if call.rounds else plain_shift
            value = shift(acc[index] + bias[channel], call.pre_shift) * multiplier[channel]
            if call.joined:  # the sum is rounded where the last bits are cut off, as if it were so from the start
                last = call.shifts[0]
                value = (shift if last == 0 else plain_shift)(value, call.shift - last)
                value = value + residual[0][index].astype("int32") * int32(call.multipliers[0])
                return clip(shift(value, last), call)
            value = shift(value, call.shift)
            for other in residual:
                value = value + scaled(other[index], call, 0)
            return clip(value, call)

        return te.compute(acc.shape, element, name="requantized")

    return builder.call_te(compute, acc, *call.constants[-2:], *call.inputs[1:], primfunc_name_hint="requantize")


def scaled(value: Any, call: QuantizedCall, position: int) -> Any:
    """A tensor at the scale of the result, int32."""
    return rounding_shift(value.astype("int32") * int32(call.multipliers[position]), call.shifts[position])


def lower_dense(builder: Any, call: QuantizedCall) -> Any:
    transposed = relax.const(np.ascontiguousarray(call.weight().T))
    acc = builder.emit(relax.op.matmul(call.inputs[0], transposed, out_dtype="int32"))
    return requantize(builder, call, acc, -1)


def lower_stage(builder: Any, call: QuantizedCall) -> Any:
    """For each place (a, b), its matrix or the shared one times x[n, a, :, b]."""
    emit, op = builder.emit, relax.op
    lead, trail = call.sizes["lead"], call.sizes["trail"]
    weight = call.weight()
    _, rows, depth = weight.shape
    parts = emit(op.permute_dims(emit(op.reshape(call.inputs[0], (-1, lead, depth, trail))), (1, 3, 0, 2)))
    parts = emit(op.reshape(parts, (lead * trail, -1, depth)))
    acc = emit(op.matmul(parts, relax.const(np.ascontiguousarray(weight.transpose(0, 2, 1))), out_dtype="int32"))
    acc = emit(op.permute_dims(emit(op.reshape(acc, (lead, trail, -1, rows))), (2, 0, 3, 1)))
    return requantize(builder, call, emit(op.reshape(acc, call.output_shape())), -1)


def lower_conv2d(builder: Any, call: QuantizedCall) -> Any:
    geometry = {"strides": list(call.strides), "padding": list(call.padding), "dilation": list(call.dilation)}
    weight = relax.const(call.weight())
    acc = relax.op.nn.conv2d(call.inputs[0], weight, groups=call.groups, out_dtype="int32", **geometry)
    return requantize(builder, call, builder.emit(acc), 1)


def lower_conv2d_transpose(builder: Any, call: QuantizedCall) -> Any:
    """y[o, i * stride + k - padding] += x[c, i] * weight[c, o, k], gathered by output pixel."""
    top, left = call.padding[:2]
    down, right = call.strides

    def compute(x: Any, weight: Any) -> Any:
        _, channels, height, width = x.shape
        _, outs, kh, kw = weight.shape
        inner = channels // call.groups
        c, i, j = (te.reduce_axis((0, extent), name) for extent, name in ((inner, "c"), (kh, "i"), (kw, "j")))

        def element(n: Any, o: Any, y: Any, z: Any) -> Any:
            row, column, channel = y + top - i, z + left - j, o // outs * inner + c
            inside = tirx.all(
                *(row >= 0, row % down == 0, row < height * down),
                *(column >= 0, column % right == 0, column < width * right),
            )
            value = x[n, channel, row // down, column // right].astype("int32")
            product = value * weight[channel, o % outs, i, j].astype("int32")
            return te.sum(tirx.if_then_else(inside, product, int32(0)), axis=[c, i, j])

        return te.compute(extents(call), element, name="conv2d_transpose")

    weight = relax.const(call.weight())
    acc = builder.emit(builder.call_te(compute, call.inputs[0], weight, primfunc_name_hint="conv2d_transpose"))
    return requantize(builder, call, acc, 1)


def extents(call: QuantizedCall) -> list[Any]:
    """The output's, as TensorIR wants them."""
    return [tirx.IntImm("int64", extent) if isinstance(extent, int) else extent for extent in call.output_shape()]


def lower_sum(builder: Any, call: QuantizedCall) -> Any:
    """add and rescale: the sum of the scaled inputs."""

    def compute(*inputs: Any) -> Any:
        def element(*index: Any) -> Any:
            values = [scaled(x[index], call, position) for position, x in enumerate(inputs)]
            return clip(sum(values[1:], values[0]), call)

        return te.compute(inputs[0].shape, element, name=call.op)

    return builder.call_te(compute, *call.inputs, primfunc_name_hint=f"quantized_{call.op}")


def lower_max_pool2d(builder: Any, call: QuantizedCall) -> Any:
    """Elements outside the image do not count."""
    (x,) = call.inputs
    pooled = relax.op.nn.max_pool2d(x, list(call.kernel), list(call.strides), list(call.padding))
    if (call.low, call.high) == (-128, 127):
        return pooled

    def compute(x: Any) -> Any:
        return te.compute(x.shape, lambda *index: clip(x[index].astype("int32"), call), name="clipped")

    return builder.call_te(compute, builder.emit(pooled), primfunc_name_hint="clip")


def lower_avg_pool2d(builder: Any, call: QuantizedCall) -> Any:
    """The sum over the window, zeros outside the image; the multiplier holds the division."""
    top, left = call.padding[:2]

    def total(x: Any) -> Any:
        _, _, height, width = x.shape
        i, j = (te.reduce_axis((0, extent), name) for extent, name in zip(call.kernel, "ij", strict=True))

        def element(n: Any, c: Any, y: Any, z: Any) -> Any:
            row, column = y * call.strides[0] + i - top, z * call.strides[1] + j - left
            inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
            value = x[n, c, row, column].astype("int32")
            return te.sum(tirx.if_then_else(inside, value, int32(0)), axis=[i, j])

        return te.compute(extents(call), element, name="window_sum")

    def divide(acc: Any) -> Any:
        return te.compute(acc.shape, lambda *index: clip(scaled(acc[index], call, 0), call), name="averaged")

    acc = builder.emit(builder.call_te(total, call.inputs[0], primfunc_name_hint="window_sum"))
    return builder.call_te(divide, acc, primfunc_name_hint="average")


LOWER = {
    "dense": lower_dense,
    "stage": lower_stage,
    "conv2d": lower_conv2d,
    "conv2d_transpose": lower_conv2d_transpose,
    "add": lower_sum,
    "rescale": lower_sum,
    "max_pool2d": lower_max_pool2d,
    "avg_pool2d": lower_avg_pool2d,
}
