"""Composition of epilogues: what act(scale * layer(x) + bias + residual) becomes when one more step follows.

Each function returns the new call, or None where the step does not fit behind those that are there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from tvm_structured.dialect import LayerCall, constant, matrix_shape
from tvm_structured.structures.layer import Array


def with_affine(layer: LayerCall, scale: Array | float | None, shift: Array | float | None) -> LayerCall | None:
    """scale * y + shift. Behind a residual only a shift fits, behind an activation nothing."""
    if layer.epilogue.activation != "none" or (scale is not None and layer.epilogue.residual):
        return None
    operands = operands_of(layer)
    factor, offset = (known(operands, name) for name in ("scale", "bias"))
    with np.errstate(all="ignore"):
        if scale is not None:
            factor = np.asarray(scale, np.float64) * (1.0 if factor is None else factor)
            offset = None if offset is None else offset * scale
        if shift is not None:
            offset = np.asarray(shift, np.float64) + (0.0 if offset is None else offset)
        vectors = {
            name: np.broadcast_to(value, matrix_shape(layer)[:1]).astype(np.float32)
            for name, value in (("scale", factor), ("bias", offset))
            if value is not None
        }
    if not all(np.isfinite(vector).all() for vector in vectors.values()):
        return None  # a division by zero keeps its own meaning
    operands.update({name: relax.const(vector) for name, vector in vectors.items()})
    return with_operands(layer, operands)


def with_residual(layer: LayerCall, residual: Any) -> LayerCall | None:
    """y + residual."""
    if layer.epilogue.activation != "none" or layer.epilogue.residual:
        return None
    return with_operands(layer, {**operands_of(layer), "residual": residual})


def with_activation(layer: LayerCall, activation: str) -> LayerCall | None:
    if layer.epilogue.activation != "none":
        return None
    return replace(layer, epilogue=replace(layer.epilogue, activation=activation))


def with_bounds(layer: LayerCall, low: float, high: float) -> LayerCall | None:
    """min(max(y, low), high), also behind relu or other bounds. One-sided bounds other than relu are None."""
    epilogue = layer.epilogue
    match epilogue.activation:
        case "none":
            low, high = clamp(-math.inf, low, high), clamp(math.inf, low, high)
        case "relu":
            low, high = clamp(0.0, low, high), clamp(math.inf, low, high)
        case "clip":
            low, high = clamp(epilogue.low, low, high), clamp(epilogue.high, low, high)
        case _:
            return None
    if low == 0.0 and high == math.inf:
        return replace(layer, epilogue=replace(epilogue, activation="relu"))
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    return replace(layer, epilogue=replace(epilogue, activation="clip", low=low, high=high))


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def operands_of(layer: LayerCall) -> dict[str, Any]:
    """Name -> expression of the operands that are present."""
    return dict(zip(layer.epilogue.operands, layer.operands, strict=True))


def with_operands(layer: LayerCall, operands: dict[str, Any]) -> LayerCall:
    epilogue = replace(
        layer.epilogue, scale="scale" in operands, bias="bias" in operands, residual="residual" in operands
    )
    return replace(layer, epilogue=epilogue, operands=tuple(operands[name] for name in epilogue.operands))


def known(operands: dict[str, Any], name: str) -> Array | None:
    """The value of a scale or bias, which are constants wherever these passes put them."""
    value = constant(operands[name]) if name in operands else None
    return None if value is None else value.astype(np.float64)
