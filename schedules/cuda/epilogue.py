"""The end of every CUDA kernel: scale, bias, residual and activation in float32, then the cast to the output's type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tvm import te, tirx

from tvm_structured.schedules.base import Epilogue
from tvm_structured.schedules.emit import i64
from tvm_structured.schedules.gpu import GpuSite


def operand_placeholders(site: GpuSite) -> dict[str, Any]:
    """Placeholders of the epilogue's operands, in the order in which the PrimFunc takes them."""
    out = site.y_shape[-1 if site.layout == "NHWC" or site.conv is None else 1]
    shapes = {"scale": (out,), "bias": (out,), "residual": site.y_shape}
    return {
        name: te.placeholder(
            [i64(extent) for extent in shapes[name]], site.dtype if name == "residual" else "float32", name
        )
        for name in site.epilogue.operands
    }


def finished(
    total: Any, site: GpuSite, operands: Mapping[str, Any], index: Sequence[Any], feature: Any, dtype: str | None = None
) -> Any:
    """act(scale * total + bias + residual) of one float32 sum, as the output's type. `index` is that of y."""
    if "scale" in operands:
        total = total * operands["scale"][feature]
    if "bias" in operands:
        total = total + operands["bias"][feature]
    if "residual" in operands:
        total = total + tirx.Cast("float32", operands["residual"][tuple(index)])
    return tirx.Cast(dtype or site.dtype, activated(total, site.epilogue))


def activated(value: Any, epilogue: Epilogue) -> Any:
    """The activation of a float32 number."""

    def f32(number: float) -> Any:
        return tirx.FloatImm("float32", number)

    match epilogue.activation:
        case "none":
            return value
        case "relu":
            return tirx.Max(value, f32(0.0))
        case "clip":
            return tirx.Min(tirx.Max(value, f32(epilogue.low)), f32(epilogue.high))
        case "gelu":
            return value * f32(0.5) * (f32(1.0) + tirx.erf(value * f32(2**-0.5)))
        case "gelu_tanh":
            inner = f32(math.sqrt(2 / math.pi)) * (value + f32(0.044715) * value * value * value)
            return value * f32(0.5) * (f32(1.0) + tirx.tanh(inner))
        case "silu":
            return value / (f32(1.0) + tirx.exp(f32(0.0) - value))
    raise ValueError(f"unknown activation {epilogue.activation!r}; one of {Epilogue.ACTIVATIONS}")
