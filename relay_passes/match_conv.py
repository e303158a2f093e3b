"""Convolutions: conv1d and conv2d of any layout and group count, with a constant weight.

conv2d(x NHWC, W HWIO)       permute_dims(conv2d(permute_dims(x), W OIHW))
conv1d(x, W (o, i, k))       squeeze(conv2d(expand_dims(x, 2), W (o, i, 1, k)), 2)
conv2d(pad(x, 0), W)         conv2d(x, W, padding=...)
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from tvm_structured.dialect import LayerCall, static_shape
from tvm_structured.relay_passes.expressions import integers, is_float, is_static, op_name
from tvm_structured.schedules.base import ConvGeometry

SPATIAL = {"relax.nn.conv1d": "W", "relax.nn.conv2d": "HW"}


def match_conv(ctx: Any, call: Any) -> Any | None:
    """The canonical spelling of a convolution, None for anything else.

    The batch may be symbolic; channels and spatial extents have to be known.
    """
    spatial = SPATIAL.get(op_name(call))
    if spatial is None or not is_float(ctx.dtypes, call, *call.args):
        return None
    layouts = layouts_of(call, spatial)
    weight = ctx.weights.fold(call.args[1])
    if layouts is None or weight is None or weight.value.size == 0 or ctx.weights.fold(call.args[0]) is not None:
        return None
    data, kernel, out = layouts
    x, pads = without_pad(ctx, call.args[0], data)
    if not is_static(arranged(static_shape(x), data, "C" + spatial)):
        return None

    array = weight.value.transpose([kernel.index(letter) for letter in "OI" + spatial])
    if spatial == "W":
        array = array[:, :, None, :]
    geometry = geometry_of(call, array.shape[2:], pads)
    layer = ctx.names.assign(weight.origin, array, geometry)
    image = permuted(ctx, ctx.visit(x), data, "NC" + spatial)
    if spatial == "W":
        image = ctx.emit(relax.op.expand_dims(image, 2))
    result = LayerCall("conv2d", layer.name, image, (layer.const,), conv=geometry).to_relax()
    if spatial == "W":
        result = relax.op.squeeze(ctx.emit(result), [2])
    return permuted(ctx, result, "NC" + spatial, out, is_last=True)


def layouts_of(call: Any, spatial: str) -> tuple[str, str, str] | None:
    """(data, kernel, output) layouts, None where one is packed (NCHW8c) or otherwise unknown."""
    data, kernel = str(call.attrs.data_layout), str(call.attrs.kernel_layout)
    out = str(call.attrs.out_layout) or data
    is_plain = sorted("NC" + spatial) == sorted(data) == sorted(out) and sorted("OI" + spatial) == sorted(kernel)
    in_order = [letter for letter in data if letter in spatial] == list(spatial)  # strides and padding follow it
    return (data, kernel, out) if is_plain and in_order else None


def arranged(values: Any, layout: str, wanted: str) -> list[Any]:
    """Values given in one layout, read in another."""
    return [values[layout.index(letter)] for letter in wanted]


def permuted(ctx: Any, x: Any, layout: str, wanted: str, is_last: bool = False) -> Any:
    """x in the wanted layout: a variable, or with `is_last` an expression yet to be bound."""
    if layout == wanted:
        return x
    source = ctx.emit(x) if is_last else x
    result = relax.op.permute_dims(source, [layout.index(letter) for letter in wanted])
    return result if is_last else ctx.emit(result)


def geometry_of(call: Any, kernel: tuple[int, ...], pads: list[tuple[int, int]]) -> ConvGeometry:
    """Geometry of a 2-D convolution; that of a 1-D one has height 1. `pads`: (before, after) for each spatial axis."""
    own = integers(call.attrs.padding)
    before, after = own[: len(own) // 2], own[len(own) // 2 :]
    rank = len(before)
    begin = [0] * (2 - rank) + [b + p[0] for b, p in zip(before, pads, strict=True)]
    end = [0] * (2 - rank) + [a + p[1] for a, p in zip(after, pads, strict=True)]
    strides = [1] * (2 - rank) + list(integers(call.attrs.strides))
    dilation = [1] * (2 - rank) + list(integers(call.attrs.dilation))
    return ConvGeometry(
        (int(kernel[0]), int(kernel[1])),
        (strides[0], strides[1]),
        (begin[0], begin[1], end[0], end[1]),
        (dilation[0], dilation[1]),
        int(call.attrs.groups),
    )


def without_pad(ctx: Any, x: Any, layout: str) -> tuple[Any, list[tuple[int, int]]]:
    """The tensor under explicit zero padding of the spatial axes, and (before, after) for each of them."""
    spatial = layout.replace("N", "").replace("C", "")
    pads = [(0, 0) for _ in spatial]
    source = ctx.source(x)
    if op_name(source) != "relax.nn.pad" or str(source.attrs.pad_mode) != "constant" or source.attrs.pad_value != 0:
        return x, pads
    flat = integers(source.attrs.pad_width)
    widths = dict(zip(layout, zip(flat[::2], flat[1::2], strict=True), strict=True))
    if any(widths["N"] + widths["C"]) or min(flat) < 0:
        return x, pads
    inner, inner_pads = without_pad(ctx, source.args[0], layout)
    return inner, [
        (widths[axis][0] + p[0], widths[axis][1] + p[1]) for axis, p in zip(spatial, inner_pads, strict=True)
    ]
