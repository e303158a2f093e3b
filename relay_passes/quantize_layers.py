"""Layers with constant weights  -->  quantized layers.

`quantize_layer` takes the quantizer (see quantize.py), the layer and the variable of its result, and returns (int8
expression, scale), or None where the layer stays float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from tvm_structured.dialect import LayerCall, constant, matrix_shape, static_shape
from tvm_structured.layer_parts import part_name
from tvm_structured.quantized import QuantizedCall
from tvm_structured.relay_passes.compose_epilogue import operands_of
from tvm_structured.relay_passes.expressions import op_name
from tvm_structured.relay_passes.integer_scales import Channels, fit_channels, fit_joined, to_int8
from tvm_structured.relay_passes.stages import Stage, stages_of
from tvm_structured.structures import BlockCirculant, PermutedDiagonal, Structure, Unstructured
from tvm_structured.structures.layer import Array

Made = tuple[Any, float] | None
SPARE_BITS = 2  # of the sum's shift beyond the residual's, so that their sum fits 32 bits as the sum alone does


def quantize_layer(quantizer: Any, layer: LayerCall, var: Any) -> Made:
    y_scale = quantizer.scale_of(var)
    x = quantizer.integer(layer.x)
    if x is None or y_scale is None or any(constant(factor) is None for factor in layer.factors):
        return None
    end = Ending.of(quantizer, layer, y_scale)
    if end is None:
        return None
    y_scale = end.y_scale
    structure = layer.to_structure()
    stages = stages_of(structure) if layer.conv is None else None
    if stages is not None:
        return quantize_stages(quantizer, layer, stages, x, end)
    weight = weight_of(layer, structure, end.scale)
    call = quantized_weight(weight, end.bias, x.scale, y_scale)
    if call is None:
        return None
    if layer.conv is not None:
        geometry = layer.conv
        call = replace(
            call,
            op="conv2d",
            strides=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
        )
    call = end.finish(replace(call, layer=layer.layer, inputs=(x.expr,)))
    if layer.conv is not None:
        return call.to_relax(), y_scale
    return as_rows(quantizer, call, static_shape(var)), y_scale


def flattened(quantizer: Any, x: Any) -> Any:
    """(rows, features); rows that a reshape made of them before are taken as they were."""
    shape = static_shape(x)
    if len(shape) == 2:
        return x
    source = quantizer.lookup_binding(x) if isinstance(x, relax.Var) else None
    if op_name(source) == "relax.reshape":
        before = static_shape(source.args[0])
        if len(before) == 2 and before[-1] == shape[-1]:
            return source.args[0]
    return quantizer.emit(relax.op.reshape(x, (-1, shape[-1])))


def as_rows(quantizer: Any, call: QuantizedCall, shape: Any) -> Any:
    """A dense call on (rows, features), whatever the rank of the layer's input."""
    if len(shape) == 2:
        return call.to_relax()
    rows = [flattened(quantizer, x) for x in call.inputs]
    return relax.op.reshape(quantizer.emit(replace(call, inputs=tuple(rows)).to_relax()), shape)


@dataclass(frozen=True, eq=False)
class Ending:
    """The epilogue of a layer in integers. `scale` (or None) and `bias` are real, (out,). Behind a residual `y_scale`
    is chosen, at most 1/64 larger than asked for, such that the residual's factor is exact."""

    y_scale: float
    scale: Array | None
    bias: Array
    low: int
    high: int
    residual: tuple[Any, ...]  # nothing, or the int8 tensor
    factor: tuple[int, int] | None  # multiplier and shift of the residual

    @classmethod
    def of(cls, quantizer: Any, layer: LayerCall, y_scale: float) -> Ending | None:
        operands, epilogue = operands_of(layer), layer.epilogue
        vectors = {name: constant(operands[name]) for name in ("scale", "bias") if name in operands}
        if any(value is None for value in vectors.values()) or epilogue.activation not in ("none", "relu", "clip"):
            return None
        bias = vectors.get("bias", np.zeros(out_features(layer), np.float32))
        residual, factor = (), None
        if epilogue.residual:
            other = quantizer.integer(operands["residual"])
            factor = None if other is None else fit_joined(other.scale / y_scale)
            if factor is None:
                return None
            y_scale, residual = other.scale * 2.0 ** factor[1] / factor[0], (other.expr,)
        bounds = clip_bounds(epilogue.activation, epilogue.low, epilogue.high, y_scale)
        return cls(y_scale, vectors.get("scale"), bias.astype(np.float64), *bounds, residual, factor)

    def finish(self, call: QuantizedCall) -> QuantizedCall:
        """The call with residual and bounds."""
        call = replace(call, inputs=(*call.inputs, *self.residual), low=self.low, high=self.high)
        if self.factor is None:
            return call
        multiplier, shift = self.factor
        joined = int(call.shift >= shift + SPARE_BITS)
        return replace(call, multipliers=(multiplier,), shifts=(shift,), joined=joined)


def out_features(layer: LayerCall) -> int:
    return matrix_shape(layer)[0]


def clip_bounds(activation: str, low: float, high: float, scale: float) -> tuple[int, int]:
    """The activation as bounds of the int8 result."""
    if activation == "none":
        return -128, 127
    if activation == "relu":
        return 0, 127
    return int(np.clip(round(low / scale), -128, 127)), int(np.clip(round(high / scale), -128, 127))


@dataclass(frozen=True, eq=False)
class RealWeight:
    """matrix: (out, ...) float64. Rows of one group (an index for each row) must have the same scale. `pack` gives the
    structure's int8 factors for scales of the rows; None for a plain weight."""

    matrix: Array
    groups: Array | None = None
    structure: Structure | None = None

    def int8(self, scale: Array) -> tuple[Array, ...]:
        """The factors that the operator takes, for scales of the rows."""
        if isinstance(self.structure, BlockCirculant):
            return (to_int8(self.structure.c, scale[:: self.structure.block, None, None]),)
        if isinstance(self.structure, PermutedDiagonal):
            diagonals, shifts = self.structure.diagonals, self.structure.shifts
            rows = np.pad(scale, (0, len(diagonals) * self.structure.block - len(scale)), mode="edge")
            by_row = rows.reshape(len(diagonals), 1, self.structure.block)
            return to_int8(diagonals, by_row), np.asarray(shifts, np.int64)
        return (to_int8(self.matrix, scale.reshape(-1, *[1] * (self.matrix.ndim - 1))),)


def weight_of(layer: LayerCall, structure: Structure, scale: Array | None) -> RealWeight:
    """The weight, with the epilogue's scale in it where its rows may differ."""
    if isinstance(structure, (BlockCirculant, PermutedDiagonal)) and scale is None:
        matrix = np.asarray(structure.dense())
        by_block = isinstance(structure, BlockCirculant)
        return RealWeight(matrix, np.arange(len(matrix)) // structure.block if by_block else None, structure)
    matrix = layer.to_layer().weight if isinstance(structure, Unstructured) else np.asarray(structure.dense())
    matrix = matrix.astype(np.float64)
    if scale is not None:
        matrix = matrix * scale.reshape(-1, *[1] * (matrix.ndim - 1))
    return RealWeight(matrix)


def quantized_weight(weight: RealWeight, bias: Array, x_scale: float, y_scale: float) -> QuantizedCall | None:
    """A dense call without inputs; None where the sums do not fit 32 bits."""
    rows = np.abs(weight.matrix).reshape(len(weight.matrix), -1)
    largest = rows.max(axis=1)
    if weight.groups is not None:
        by_group = np.zeros(int(weight.groups[-1]) + 1)
        np.maximum.at(by_group, weight.groups, largest)
        largest = by_group[weight.groups]
    channels = fit_channels(largest, rows.sum(axis=1, dtype=np.float64), rows.shape[1], bias, x_scale, y_scale)
    if channels is None:
        return None
    call = QuantizedCall(
        "dense",
        (),
        constants_of(weight.int8(channels.scale), bias, channels, x_scale),
        shift=channels.shift,
        rounds=int(rounds(bias, channels)),
    )
    if weight.structure is None:
        return call
    return replace(call, structure=weight.structure.name, sizes=weight.structure.sizes_of)


def rounds(bias: Array, channels: Channels) -> bool:
    """Whether the rounding of the shift stays a step of its own; else a bias that is there anyway has it."""
    return not (bias.any() and channels.are_fine)


def constants_of(factors: tuple[Array, ...], bias: Array, channels: Channels, x_scale: float) -> tuple[Any, ...]:
    values = bias / (channels.scale * x_scale)
    if not rounds(bias, channels):
        values = values + 2.0 ** (channels.shift - 1) / channels.multiplier
    integer_bias = np.rint(values).astype(np.int32)
    arrays = (*factors, integer_bias, channels.multiplier)
    return tuple(relax.const(np.ascontiguousarray(array), str(array.dtype)) for array in arrays)


def quantize_stages(quantizer: Any, layer: LayerCall, stages: list[Stage], x: Any, end: Ending) -> Made:
    """int8 between the stages. A scale by feature fits no shared matrix: such a layer stays float32."""
    if end.scale is not None:
        return None
    shape = static_shape(x.expr)
    state = flattened(quantizer, x.expr), x.scale
    for stage in stages:
        is_last, name = stage is stages[-1], part_name(layer.layer, stage.name)
        y_scale = end.y_scale if is_last else quantizer.scale(name)
        bias = end.bias if is_last else np.zeros(stage.lead * stage.weight.shape[1] * stage.trail)
        call = None if y_scale is None else quantized_stage(stage, bias, state[1], y_scale)
        if call is None:
            return None
        call = replace(call, layer=name if len(stages) > 1 else layer.layer, inputs=(state[0],))
        if is_last:
            return last_stage(quantizer, end.finish(call), layer, shape), y_scale
        state = quantizer.emit(call.to_relax()), y_scale
    return None


def last_stage(quantizer: Any, call: QuantizedCall, layer: LayerCall, shape: Any) -> Any:
    """The last stage, with the residual as rows and the result of the layer's rank."""
    state, *residual = call.inputs
    if len(shape) == 2:
        return call.to_relax()
    rows = [flattened(quantizer, x) for x in residual]
    made = quantizer.emit(replace(call, inputs=(state, *rows)).to_relax())
    return relax.op.reshape(made, (*shape[:-1], out_features(layer)))


def quantized_stage(stage: Stage, bias: Array, x_scale: float, y_scale: float) -> QuantizedCall | None:
    """Rows of the matrices have a scale each; bias and multipliers belong to the features of the result."""
    weight = stage.weight.astype(np.float64)
    magnitudes = np.abs(weight)
    largest, sums = stage.spread(magnitudes.max(axis=2)), stage.spread(magnitudes.sum(axis=2))
    channels = fit_channels(largest, sums, weight.shape[2], bias, x_scale, y_scale)
    if channels is None:
        return None
    constants = constants_of((to_int8(weight, stage.gather(channels.scale)[:, :, None]),), bias, channels, x_scale)
    return QuantizedCall(
        "stage", (), constants, sizes={"lead": stage.lead, "trail": stage.trail}, shift=channels.shift,
        rounds=int(rounds(bias, channels)),
    )  # fmt: skip
