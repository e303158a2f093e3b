"""Operators that are no layers  -->  their integer form.

Each rule takes the quantizer (see quantize.py), the call and the variable of its result, and returns (int8 expression,
scale), or None where it stays float32. Only what follows an int8 tensor becomes int8: nothing is quantized for the
sake of a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from tvm_structured.dialect import constant, static_shape
from tvm_structured.quantized import QuantizedCall
from tvm_structured.relay_passes.expressions import integers, op_name, scalar
from tvm_structured.relay_passes.integer_scales import fit_scale
from tvm_structured.relay_passes.quantize_layers import Made, RealWeight, clip_bounds, quantized_weight

Rule = Callable[[Any, Any, Any], Made]


def moved(quantizer: Any, call: Any, var: Any) -> Made:
    """Values that only change places keep their scale."""
    if not quantizer.is_integer(call.args[0]):
        return None
    x = quantizer.integer(call.args[0])
    return relax.Call(call.op, [x.expr, *call.args[1:]], call.attrs, call.ty_args), x.scale


def relu(quantizer: Any, call: Any, var: Any) -> Made:
    """Part of the sum or transposed convolution before it, where it follows one."""
    before = quantizer.lookup(call.args[0])
    if op_name(before) == "relax.nn.conv2d_transpose" or op_name(before) == "relax.add":
        return add(quantizer, before, var, low=0) or clipped(quantizer, call, "relu", 0.0, 0.0)
    return clipped(quantizer, call, "relu", 0.0, 0.0)


def clip(quantizer: Any, call: Any, var: Any) -> Made:
    low, high = (scalar(bound) for bound in call.args[1:3])
    return None if low is None or high is None else clipped(quantizer, call, "clip", low, high)


def clipped(quantizer: Any, call: Any, activation: str, low: float, high: float) -> Made:
    if not quantizer.is_integer(call.args[0]):
        return None
    x = quantizer.integer(call.args[0])
    bounds = clip_bounds(activation, low, high, x.scale)
    made = QuantizedCall("rescale", (x.expr,), multipliers=(1,), shifts=(0,), low=bounds[0], high=bounds[1])
    return made.to_relax(), x.scale


def add(quantizer: Any, call: Any, var: Any, low: int = -128) -> Made:
    """The sum of two tensors of one shape, of which one is int8 already; or the bias of a transposed convolution."""
    transposed = transposed_convolution(quantizer, var)
    if transposed is not None:
        return transposed
    if not any(map(quantizer.is_integer, call.args)) or any(static_shape(a) != static_shape(var) for a in call.args):
        return None
    scale = quantizer.scale_of(var)
    operands = [quantizer.integer(operand) for operand in call.args]
    if scale is None or None in operands:
        return None
    factors = [fit_scale(operand.scale / scale) for operand in operands]
    if None in factors:
        return None
    multipliers, shifts = zip(*factors, strict=True)
    made = QuantizedCall("add", tuple(o.expr for o in operands), multipliers=multipliers, shifts=shifts, low=low)
    return made.to_relax(), scale


def concat(quantizer: Any, call: Any, var: Any) -> Made:
    """All parts at the scale of the whole."""
    fields = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
    scale = quantizer.scale_of(var)
    if scale is None or not fields or not any(map(quantizer.is_integer, fields)):
        return None
    parts = [quantizer.integer(part) for part in fields]
    factors = [None if part is None else fit_scale(part.scale / scale) for part in parts]
    if None in factors:
        return None
    rescaled = [
        quantizer.emit(QuantizedCall("rescale", (part.expr,), multipliers=(m,), shifts=(s,)).to_relax())
        for part, (m, s) in zip(parts, factors, strict=True)
    ]
    return relax.op.concat(rescaled, axis=int(call.attrs.axis)), scale


# -- pooling --------------------------------------------------------------------------------------------


def max_pool2d(quantizer: Any, call: Any, var: Any) -> Made:
    attrs = call.attrs
    if not quantizer.is_integer(call.args[0]) or attrs.layout != "NCHW" or set(integers(attrs.dilation)) != {1}:
        return None
    x = quantizer.integer(call.args[0])
    kernel, strides, padding = (integers(v) for v in (attrs.pool_size, attrs.strides, attrs.padding))
    padding = padded_for(static_shape(call.args[0]), static_shape(var), kernel, strides, padding)
    made = QuantizedCall("max_pool2d", (x.expr,), kernel=kernel, strides=strides, padding=padding)
    return (made.to_relax(), x.scale) if made.output_shape() == static_shape(var) else None


def padded_for(x: Any, y: Any, kernel: Any, strides: Any, padding: Any) -> tuple[int, ...]:
    """The padding, enlarged at the end where the last window hangs over it (ceil_mode)."""
    ends = [max(padding[i + 2], (y[i + 2] - 1) * strides[i] + kernel[i] - x[i + 2] - padding[i]) for i in range(2)]
    return (*padding[:2], *ends)


def avg_pool2d(quantizer: Any, call: Any, var: Any) -> Made:
    attrs, padding = call.attrs, integers(call.attrs.padding)
    is_plain = attrs.layout == "NCHW" and set(integers(attrs.dilation)) == {1} and not attrs.ceil_mode
    if not is_plain or (any(padding) and not attrs.count_include_pad):
        return None
    return averaged(quantizer, call.args[0], var, integers(attrs.pool_size), integers(attrs.strides), padding)


def adaptive_avg_pool2d(quantizer: Any, call: Any, var: Any) -> Made:
    """Where the windows are of one size."""
    before, after = static_shape(call.args[0]), static_shape(var)
    if call.attrs.layout != "NCHW" or any(a % b for a, b in zip(before[2:], after[2:], strict=True)):
        return None
    kernel = tuple(a // b for a, b in zip(before[2:], after[2:], strict=True))
    return averaged(quantizer, call.args[0], var, kernel, kernel)


def mean(quantizer: Any, call: Any, var: Any) -> Made:
    """Over the pixels of images."""
    shape = static_shape(call.args[0])
    axes = sorted(axis % len(shape) for axis in integers(call.attrs.axis or ()))
    if len(shape) != 4 or axes != [2, 3]:
        return None
    made = averaged(quantizer, call.args[0], var, shape[2:], shape[2:])
    if made is None or call.attrs.keepdims:
        return made
    return relax.op.reshape(quantizer.emit(made[0]), static_shape(var)), made[1]


def averaged(quantizer: Any, operand: Any, var: Any, kernel: Any, strides: Any, padding: Any = (0, 0, 0, 0)) -> Made:
    scale = quantizer.scale_of(var)
    if scale is None or not quantizer.is_integer(operand):
        return None
    x = quantizer.integer(operand)
    count = kernel[0] * kernel[1]
    factor = fit_scale(x.scale / scale / count, count)
    if factor is None:
        return None
    made = QuantizedCall(
        "avg_pool2d", (x.expr,), kernel=tuple(kernel), strides=tuple(strides), padding=tuple(padding),
        multipliers=factor[:1], shifts=factor[1:],
    )  # fmt: skip
    return made.to_relax(), scale


# -- transposed convolution -----------------------------------------------------------------------------


def transposed_convolution(quantizer: Any, var: Any) -> Made:
    """conv2d_transpose, its bias and ReLU, ending at `var`; what the steps before made is then read by nobody."""
    value = quantizer.lookup(var)
    low, bias = -128, None
    if op_name(value) == "relax.nn.relu":
        low, value = 0, quantizer.lookup(value.args[0])
    if op_name(value) == "relax.add":
        for first, second in (value.args, value.args[::-1]):
            vector = quantizer.known(second)
            if vector is not None:
                bias, value = vector, quantizer.lookup(first)
                break
    if op_name(value) != "relax.nn.conv2d_transpose":
        return None
    attrs, weight = value.attrs, quantizer.known(value.args[1])
    layouts = (attrs.data_layout, attrs.kernel_layout, set(integers(attrs.dilation)))
    x, scale = quantizer.integer(value.args[0]), quantizer.scale_of(var)
    if weight is None or layouts != ("NCHW", "IOHW", {1}) or x is None or scale is None:
        return None
    groups = int(attrs.groups)
    outs = weight.shape[1] * groups
    if bias is not None and bias.size not in (1, outs):
        return None
    bias = np.zeros(outs) if bias is None else np.broadcast_to(bias.astype(np.float64).reshape(-1), (outs,))
    by_output = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(outs, -1, *weight.shape[2:])
    made = quantized_weight(RealWeight(by_output.astype(np.float64)), bias, x.scale, scale)
    if made is None:
        return None
    by_input = constant(made.factors[0]).reshape(groups, weight.shape[1], -1, *weight.shape[2:]).swapaxes(1, 2)
    constants = (relax.const(np.ascontiguousarray(by_input.reshape(weight.shape))), *made.constants[1:])
    made = replace(
        made, op="conv2d_transpose", inputs=(x.expr,), constants=constants, low=low, groups=groups,
        layer="conv2d_transpose", strides=integers(attrs.strides), padding=integers(attrs.padding),
        output_padding=integers(attrs.output_padding),
    )  # fmt: skip
    return (made.to_relax(), scale) if made.output_shape() == static_shape(var) else None


OPERATORS: dict[str, Rule] = {
    **dict.fromkeys(
        ("relax.reshape", "relax.permute_dims", "relax.flatten", "relax.squeeze", "relax.expand_dims"), moved
    ),
    "relax.nn.relu": relu,
    "relax.clip": clip,
    "relax.add": add,
    "relax.concat": concat,
    "relax.nn.max_pool2d": max_pool2d,
    "relax.nn.avg_pool2d": avg_pool2d,
    "relax.nn.adaptive_avg_pool2d": adaptive_avg_pool2d,
    "relax.mean": mean,
    "relax.nn.conv2d_transpose": lambda quantizer, call, var: transposed_convolution(quantizer, var),
}
