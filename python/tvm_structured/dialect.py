"""The Relax operators `relax.structured.*`, registered from Python: one for each kernel, by a loop over the table.

    R.structured.dense(x, weight, [scale], [bias], [residual], layer="fc1.weight", ...)
    R.structured.block_circulant(x, c, [scale], [bias], [residual], ...)

`dense` and `conv2d` are the canonical spelling of every layer this package understands; the other operators
carry a structure's factors as constants. All of them compute act(scale * layer(x) + bias + residual).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm_ffi
from tvm import ir, relax
from tvm_ffi.dataclasses import py_class

from tvm_structured import errors
from tvm_structured.errors import ModelError
from tvm_structured.schedules import KERNELS, ConvGeometry, Epilogue
from tvm_structured.schedules.base import blocked_shape
from tvm_structured.structures import STRUCTURES, Conv2d, Dense, Layer, Structure, Unstructured

PREFIX = "relax.structured."


@py_class("tvm_structured.LayerAttrs")
class LayerAttrs(ir.Attrs):
    """Attributes of every structured operator. `kernel` is empty for dense layers, else (kh, kw)."""

    layer: str
    sizes: str  # JSON of the structure's static fields
    operands: tvm_ffi.Array[str]  # which of scale, bias, residual follow the factors
    activation: str
    low: float
    high: float
    kernel: tvm_ffi.Array[int]
    strides: tvm_ffi.Array[int]
    padding: tvm_ffi.Array[int]
    dilation: tvm_ffi.Array[int]
    groups: int
    out_block: int  # channels to a block of a convolution's output, 0 for NCHW


@dataclass(frozen=True)
class LayerCall:
    """A structured operator's call, unpacked. Weights of `dense` and `conv2d` stay in the layer's own layout."""

    op: str
    layer: str
    x: Any
    factors: tuple[Any, ...]
    sizes: dict[str, Any] = field(default_factory=dict)
    epilogue: Epilogue = field(default_factory=Epilogue)
    operands: tuple[Any, ...] = ()
    conv: ConvGeometry | None = None
    out_block: int = 0  # channels to a block of a convolution's output and residual, 0 for NCHW

    @classmethod
    def of(cls, call: Any) -> LayerCall | None:
        """The unpacked call, or None where the expression is no structured operator."""
        if not (isinstance(call, relax.Call) and isinstance(call.op, ir.Op) and call.op.name.startswith(PREFIX)):
            return None
        attrs, names = call.attrs, tuple(call.attrs.operands)
        args = list(call.args)
        split = len(args) - len(names)
        conv = None
        if attrs.kernel:
            conv = ConvGeometry(
                *(
                    tuple(int(v) for v in values)
                    for values in (attrs.kernel, attrs.strides, attrs.padding, attrs.dilation)
                ),
                groups=int(attrs.groups),
            )
        return cls(
            call.op.name.removeprefix(PREFIX),
            attrs.layer,
            args[0],
            tuple(args[1:split]),
            json.loads(attrs.sizes),
            Epilogue(*(n in names for n in ("scale", "bias", "residual")), attrs.activation, attrs.low, attrs.high),
            tuple(args[split:]),
            conv,
            int(attrs.out_block),
        )

    def to_relax(self) -> Any:
        """The Relax call (not yet bound to a variable)."""
        conv = self.conv or ConvGeometry((0, 0))
        attrs = LayerAttrs(
            layer=self.layer,
            sizes=json.dumps(self.sizes),
            operands=list(self.epilogue.operands),
            activation=self.epilogue.activation,
            low=float(self.epilogue.low),
            high=float(self.epilogue.high),
            kernel=list(conv.kernel) if self.conv else [],
            strides=list(conv.stride),
            padding=list(conv.padding),
            dilation=list(conv.dilation),
            groups=conv.groups,
            out_block=self.out_block,
        )
        return relax.Call(ir.Op.get(PREFIX + self.op), [self.x, *self.factors, *self.operands], attrs=attrs)

    @property
    def is_canonical(self) -> bool:
        """Whether this is a plain `dense` or `conv2d`, which a plan may rewrite."""
        return self.op in ("dense", "conv2d")

    def num_rows(self) -> int:
        """How many vectors the layer's matrix is applied to in one run; a symbolic batch counts as one."""
        shape = static_shape(self.x) or ()
        if self.conv is not None:
            extents = (shape[0], *output_hw(self.conv, shape[2:4]))
        else:
            extents = shape[:-1]
        return int(np.prod([extent if isinstance(extent, int) else 1 for extent in extents], dtype=np.int64))

    def images(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Shapes of a convolution's input and output as (batch, channels, h, w), however they are stored."""
        conv, shape = self.conv, static_shape(self.x)
        assert conv is not None and shape is not None
        out, inner = matrix_shape(self)
        channels = inner // (conv.kernel[0] * conv.kernel[1]) * conv.groups
        return (shape[0], channels, *shape[2:4]), (shape[0], out, *output_hw(conv, shape[2:4]))

    @property
    def has_blocks(self) -> bool:
        """Whether a convolution's input is in blocks of channels, (batch, blocks, h, w, lanes)."""
        return self.conv is not None and self.x.ty.ndim == 5

    def dense_params(self) -> int:
        """Parameters of the dense form."""
        out, inner = matrix_shape(self)
        return out * inner

    def describe(self) -> str:
        """`dense 10x84` or `conv 3x3 64->128`."""
        out, inner = matrix_shape(self)
        if self.conv is None:
            return f"dense {out}x{inner}"
        kh, kw = self.conv.kernel
        return f"conv {kh}x{kw} {inner * self.conv.groups // (kh * kw)}->{out}"

    def to_layer(self) -> Layer:
        """The layer of a canonical call."""
        weight = constant(self.factors[0])
        if weight is None:
            raise ModelError(f"{self.layer}: the weight is not a constant; bind the model's parameters first")
        stored = ""
        if weight.dtype.itemsize < 4:  # the mathematics is done in float32, also of weights that are stored in half
            stored, weight = weight.dtype.name, weight.astype(np.float32)
        if self.conv is None:
            return Dense(self.layer, weight, stored=stored)
        shape = static_shape(self.x)
        hw = shape[2:4] if shape and all(isinstance(v, int) for v in shape[2:4]) else None
        c = self.conv
        return Conv2d(self.layer, weight, c.stride, c.padding, c.dilation, c.groups, hw, stored=stored)

    def to_structure(self) -> Structure:
        """The structure whose factors the call holds; `Unstructured` for a canonical call."""
        if self.is_canonical:
            return Unstructured.from_dense(self.to_layer())
        family = STRUCTURES[self.op]
        return family.from_factors(self.sizes, [constant(f) for f in self.factors])

    def expanded(self) -> LayerCall:
        """The canonical call of the same layer: its weight is the matrix that the structure stands for."""
        if self.is_canonical:
            return self
        weight = np.asarray(self.to_structure().dense(), np.float32)
        if self.conv is not None:  # flattened as (out, kh, kw, in)
            weight = weight.reshape(len(weight), *self.conv.kernel, -1).transpose(0, 3, 1, 2)
        op = "dense" if self.conv is None else "conv2d"
        return replace(self, op=op, sizes={}, factors=(relax.const(np.ascontiguousarray(weight)),))


def constant(expr: Any) -> np.ndarray | None:
    """The numpy value of a Relax tensor constant, else None."""
    from tvm.runtime import Tensor

    if isinstance(expr, ir.GenericConst) and isinstance(expr.value, Tensor):
        return expr.value.numpy()
    return None


def static_shape(expr: Any) -> tuple[Any, ...] | None:
    """Extents as ints where they are known, else as expressions; None for an unknown rank."""
    shape = getattr(expr.ty, "shape", None)
    if shape is None or not hasattr(shape, "values"):
        return None
    return tuple(int(v) if hasattr(v, "value") else v for v in shape.values)


def infer_type(call: Any, ctx: Any) -> Any:
    """Output type. Dense: (..., in) -> (..., out); convolution: (n, in, h, w) -> (n, out, oh, ow), or their blocks."""
    unpacked = LayerCall.of(call)
    assert unpacked is not None
    shape = static_shape(unpacked.x)
    if shape is None:
        raise ModelError(f"{unpacked.layer}: the rank of the input is unknown")
    out, inner = matrix_shape(unpacked)
    if unpacked.conv is None:
        if isinstance(shape[-1], int) and shape[-1] != inner:
            raise ModelError(f"{unpacked.layer}: the input has {shape[-1]} features, the weight takes {inner}")
        return relax.TensorType([*shape[:-1], out], unpacked.x.ty.dtype)
    c = unpacked.conv
    channels = inner // (c.kernel[0] * c.kernel[1]) * c.groups
    expected = -(-channels // shape[4]) if len(shape) == 5 else channels
    if isinstance(shape[1], int) and shape[1] != expected:
        raise ModelError(f"{unpacked.layer}: the input has {shape[1]} channels, the weight does not fit them")
    h, w = output_hw(c, shape[2:4])
    y = (shape[0], out, h, w)
    return relax.TensorType(blocked_shape(y, unpacked.out_block) if unpacked.out_block else y, unpacked.x.ty.dtype)


def output_hw(conv: ConvGeometry, hw: Sequence[Any]) -> tuple[Any, Any]:
    """Output (height, width) of a convolution."""
    top, left, bottom, right = conv.padding
    spans = ((hw[0] + top + bottom, 0), (hw[1] + left + right, 1))
    height, width = ((size - conv.dilation[i] * (conv.kernel[i] - 1) - 1) // conv.stride[i] + 1 for size, i in spans)
    return height, width


def matrix_shape(call: LayerCall) -> tuple[int, int]:
    """(out, in) of the layer's matrix, convolutions flattened."""
    if call.is_canonical:
        out, *rest = (int(v) for v in call.factors[0].ty.shape.values)
        return out, int(np.prod(rest))
    out, inner = call.sizes["shape"]
    return int(out), int(inner)


def register() -> None:
    """Register the operators with TVM; doing it again is harmless."""
    from tvm_structured.relay_passes.lower_structured import legalize
    from tvm_structured.relay_passes.mark_layers import marking

    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.StructuredError):
            tvm_ffi.register_error(error)  # else it is a RuntimeError after crossing a pass or an inference function
    known = set(ir.Op.list_op_names())
    for name in KERNELS:
        if PREFIX + name in known:
            continue
        for key, value in {"FPurity": True, "FInferType": infer_type, "FLegalize": marking(legalize)}.items():
            ir.register_op_attr(PREFIX + name, key, value)
