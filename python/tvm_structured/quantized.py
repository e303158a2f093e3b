"""The Relax operators `relax.quantized.*`: int8 tensors in and out, exact integer arithmetic in between.

    R.quantized.dense(x (..., in), [residual], factors..., bias (out,), multiplier (out,), layer="fc1.weight", ...)
    R.quantized.stage(x (n, lead * depth * trail), [residual], weight (places, rows, depth), bias, multiplier, ...)
    R.quantized.conv2d(x NCHW, [residual], weight OIHW, bias, multiplier, ...)
    R.quantized.conv2d_transpose(x NCHW, [residual], weight (in, out / groups, kh, kw), bias, multiplier, ...)
    R.quantized.add(a, b), rescale(x), max_pool2d(x NCHW), avg_pool2d(x NCHW)

Values are symmetric: real = scale * int8, and 0 is 0. The scales themselves live in the `quantize` and `dequantize`
calls at the edges. A stage is one factor of a structure (see stages.py), with the sums

    acc[n, a, i, b] = sum_k weight[(a, b) or 0, i, k] * x[n, a, k, b]

Sums of products become int8 again by what any integer machine has:

    y = clip(round_shift(round_shift(acc + bias, pre_shift) * multiplier, shift) + residual', low, high)
    residual' = round_shift(residual * m, s);   round_shift(v, s) = (v + 2^(s - 1)) >> s, v for s = 0

Without `rounds` the shifts of the sums add nothing: the bias has the rounding in it. A `joined` residual is added where
s bits of the sum's shift are left, and both are rounded once:

    y = clip((acc' * multiplier + (residual * m << (shift - s)) + 2^(shift - 1)) >> shift, low, high)

No intermediate leaves int32: whoever makes these calls chooses the numbers so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm_ffi
from tvm import ir, relax
from tvm_ffi.dataclasses import py_class

from tvm_structured.dialect import constant, static_shape
from tvm_structured.errors import ModelError
from tvm_structured.structures import STRUCTURES, Structure

PREFIX = "relax.quantized."
WEIGHTED = ("dense", "stage", "conv2d", "conv2d_transpose")
POOLS = ("max_pool2d", "avg_pool2d")
OPERATORS = (*WEIGHTED, "add", "rescale", *POOLS)


@py_class("tvm_structured.QuantizedAttrs")
class QuantizedAttrs(ir.Attrs):
    """Attributes of every quantized operator; those that it does not have are empty, 0 or 1."""

    layer: str
    structure: str  # the structure whose int8 factors follow the inputs, "" for a weight
    sizes: str  # JSON of the structure's static fields; lead and trail of a stage
    num_inputs: int
    multipliers: tvm_ffi.Array[int]  # of inputs: the residual; both operands of add; that of rescale and avg_pool2d
    shifts: tvm_ffi.Array[int]  # that belong to them
    pre_shift: int
    shift: int
    low: int
    high: int
    rounds: int
    joined: int
    kernel: tvm_ffi.Array[int]
    strides: tvm_ffi.Array[int]
    padding: tvm_ffi.Array[int]
    output_padding: tvm_ffi.Array[int]
    dilation: tvm_ffi.Array[int]
    groups: int


TUPLES = ("multipliers", "shifts", "kernel", "strides", "padding", "output_padding", "dilation")
NUMBERS = ("pre_shift", "shift", "low", "high", "rounds", "joined", "groups")


@dataclass(frozen=True)
class QuantizedCall:
    """A quantized operator's call, unpacked. `padding` is (top, left, bottom, right)."""

    op: str
    inputs: tuple[Any, ...]  # int8
    constants: tuple[Any, ...] = ()  # factors (int8; shifts int64), bias (int32), multiplier (int32)
    layer: str = ""
    structure: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    multipliers: tuple[int, ...] = ()
    shifts: tuple[int, ...] = ()
    pre_shift: int = 0
    shift: int = 0
    low: int = -128
    high: int = 127
    rounds: int = 1
    joined: int = 0
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    output_padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, call: Any) -> QuantizedCall | None:
        """The unpacked call, or None where the expression is no quantized operator."""
        if not (isinstance(call, relax.Call) and isinstance(call.op, ir.Op) and call.op.name.startswith(PREFIX)):
            return None
        attrs, args = call.attrs, tuple(call.args)
        count = int(attrs.num_inputs)
        tuples = {name: tuple(int(v) for v in getattr(attrs, name)) for name in TUPLES}
        numbers = {name: int(getattr(attrs, name)) for name in NUMBERS}
        op, sizes = call.op.name.removeprefix(PREFIX), json.loads(attrs.sizes)
        return cls(op, args[:count], args[count:], attrs.layer, attrs.structure, sizes, **tuples, **numbers)

    def to_relax(self) -> Any:
        """The Relax call (not yet bound to a variable)."""
        attrs = QuantizedAttrs(
            layer=self.layer,
            structure=self.structure,
            sizes=json.dumps(self.sizes),
            num_inputs=len(self.inputs),
            **{name: list(getattr(self, name)) for name in TUPLES},
            **{name: int(getattr(self, name)) for name in NUMBERS},
        )
        return relax.Call(ir.Op.get(PREFIX + self.op), [*self.inputs, *self.constants], attrs=attrs)

    @property
    def factors(self) -> tuple[Any, ...]:
        """The weight, or the structure's factors; constants."""
        return self.constants[:-2]

    def to_structure(self) -> Structure:
        """The structure with int8 factors. Only where `structure` names one."""
        return STRUCTURES[self.structure].from_factors(self.sizes, [constant(factor) for factor in self.factors])

    def weight(self) -> np.ndarray:
        """The int8 weight, written out."""
        if not self.structure:
            return constant(self.factors[0])
        return np.ascontiguousarray(self.to_structure().dense().astype(np.int8))

    def weight_shape(self) -> tuple[int, ...]:
        if self.structure:
            return tuple(self.sizes["shape"])
        shape = static_shape(self.factors[0])
        assert shape is not None
        return shape

    def output_shape(self) -> tuple[Any, ...]:
        """Raises ModelError where the operands do not fit each other."""
        shape = static_shape(self.inputs[0])
        if shape is None:
            raise ModelError(f"{self.layer or self.op}: the rank of the input is unknown")
        if self.op in ("add", "rescale"):
            return shape
        if self.op in POOLS:
            return (*shape[:2], *self._window(shape[2:], self.kernel))
        weight = self.weight_shape()
        if self.op == "dense":
            self._check("features", shape[-1], weight[1])
            return (*shape[:-1], weight[0])
        if self.op == "stage":
            around = self.sizes["lead"] * self.sizes["trail"]
            self._check("features", shape[-1], around * weight[2])
            return (*shape[:-1], around * weight[1])
        if self.op == "conv2d":
            self._check("channels", shape[1], weight[1] * self.groups)
            return (shape[0], weight[0], *self._window(shape[2:], weight[2:]))
        self._check("channels", shape[1], weight[0])
        return (shape[0], weight[1] * self.groups, *self._scattered(shape[2:], weight[2:]))

    def _check(self, what: str, given: Any, expected: int) -> None:
        if given != expected:
            raise ModelError(f"{self.layer}: the input has {given} {what}, the weight takes {expected}")

    def _window(self, image: Any, kernel: Any) -> tuple[Any, ...]:
        spans = (image[0] + self.padding[0] + self.padding[2], image[1] + self.padding[1] + self.padding[3])
        return tuple(
            (span - d * (k - 1) - 1) // s + 1
            for span, k, s, d in zip(spans, kernel, self.strides, self.dilation, strict=True)
        )

    def _scattered(self, image: Any, kernel: Any) -> tuple[Any, ...]:
        return tuple(
            (image[i] - 1) * self.strides[i]
            + kernel[i]
            + self.output_padding[i]
            - self.padding[i]
            - self.padding[i + 2]
            for i in range(2)
        )


def is_quantized(mod: Any) -> bool:
    """Whether a module has quantized operators."""
    found: list[Any] = []

    def visit(call: Any) -> None:
        if QuantizedCall.of(call) is not None:
            found.append(call)

    for _, function in mod.functions_items():
        if isinstance(function, relax.Function):
            tvm_ffi.structural_walk(function, (ir.Call, visit))
    return bool(found)


def infer_type(call: Any, ctx: Any) -> Any:
    unpacked = QuantizedCall.of(call)
    assert unpacked is not None
    for operand in unpacked.inputs:
        if str(operand.ty.dtype) != "int8":
            raise ModelError(f"{unpacked.layer or unpacked.op}: quantized operators take int8, not {operand.ty.dtype}")
    return relax.TensorType(list(unpacked.output_shape()), "int8")


def register() -> None:
    """Register the operators with TVM; doing it again is harmless."""
    from tvm_structured.relay_passes.lower_quantized import legalize

    known = set(ir.Op.list_op_names())
    for name in OPERATORS:
        if PREFIX + name in known:
            continue
        for key, value in {"FPurity": True, "FInferType": infer_type, "FLegalize": legalize}.items():
            ir.register_op_attr(PREFIX + name, key, value)
