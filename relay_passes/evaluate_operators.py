"""The value of a Relax call whose tensors are all known: in NumPy where it is in the table, else by TVM itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import ir, relax
from tvm.runtime import Tensor

from tvm_structured.dialect import static_shape
from tvm_structured.relay_passes.expressions import integers, is_static, op_name, permutation
from tvm_structured.structures.layer import Array


def evaluate(mod: Any, call: Any, tensors: list[Any]) -> Any | None:
    """Array, or list of arrays for a tuple; None where the call cannot be evaluated at compile time.

    `tensors` are the values of the call's arguments: an array for a tensor, a list for a tuple of tensors, None for
    anything else (shapes, immediates), which is read from the call.
    """
    by_table = OPERATORS.get(op_name(call))
    if by_table is not None:
        value = by_table(call, *(t for t in tensors if t is not None))
        if value is not None and fits(value, call.ty):
            return value
    return evaluate_by_tvm(mod, call, tensors) if is_evaluable(call) else None


def fits(value: Any, ty: Any) -> bool:
    """Whether a value has the type that Relax inferred; guards against a corner of an operator not modelled here."""
    if isinstance(value, list):
        return all(fits(v, t) for v, t in zip(value, ty.fields, strict=True))
    shape = getattr(ty.shape, "values", None)
    return shape is not None and str(ty.dtype) == str(value.dtype) and value.shape == tuple(map(as_int, shape))


def as_int(extent: Any) -> int | None:
    return int(extent) if hasattr(extent, "value") else None


def is_evaluable(call: Any) -> bool:
    """Pure, with a legalisation, and of static shape."""
    if not (isinstance(call.op, ir.Op) and is_tensor_or_tuple(call.ty)):
        return False
    pure = bool(call.op.get_attr("FPurity"))
    return pure and (op_name(call) == "relax.call_tir" or call.op.get_attr("FLegalize") is not None)


def is_tensor_or_tuple(ty: Any) -> bool:
    if isinstance(ty, relax.TupleType):
        return all(is_tensor_or_tuple(field) for field in ty.fields)
    shape = getattr(getattr(ty, "shape", None), "values", None)
    return shape is not None and all(as_int(extent) is not None for extent in shape)


def evaluate_by_tvm(mod: Any, call: Any, tensors: list[Any]) -> Any:
    """Compile a function of this one call and run it, apart from the caller's target and instruments."""
    builder = relax.BlockBuilder()
    arguments = [as_constants(t) if t is not None else a for a, t in zip(call.args, tensors, strict=True)]
    if op_name(call) == "relax.call_tir":
        arguments[0] = builder.add_func(mod[call.args[0]], call.args[0].name_hint)
    with builder.function("main", []):
        with builder.dataflow():
            result = builder.emit_output(relax.Call(call.op, arguments, call.attrs, call.ty_args))
        builder.emit_func_output(result)
    with tvm.transform.PassContext(opt_level=2):
        executable = tvm.compile(builder.get(), "llvm")
    return as_arrays(relax.VirtualMachine(executable, tvm.cpu())["main"]())


def as_constants(value: Any) -> Any:
    if isinstance(value, list):
        return relax.Tuple([as_constants(v) for v in value])
    return relax.const(value, str(value.dtype))


def as_arrays(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else [as_arrays(v) for v in value]


# -- the table: (call, *tensor arguments) -> array, list of arrays or None ----------------------------


def reshaped(call: Any, x: Array, *_: Any) -> Array | None:
    """Every operator that keeps the order of elements; the result's shape is in the call's type."""
    shape = static_shape(call)
    return x.reshape(shape) if is_static(shape) else None


def broadcast(call: Any, x: Array) -> Array | None:
    shape = static_shape(call)
    return np.broadcast_to(x, shape) if shape is not None and is_static(shape) else None


def arithmetic(function: Callable[..., Any]) -> Callable[..., Array | None]:
    """Elementwise in the type of the call. Integers are left to TVM, whose rounding of quotients differs."""

    def apply(call: Any, *tensors: Array) -> Array | None:
        if any(t.dtype.kind not in "fb" for t in tensors):
            return None
        with np.errstate(all="ignore"):
            return np.asarray(function(*tensors)).astype(str(call.ty.dtype), copy=False)

    return apply


def reduction(function: Callable[..., Any]) -> Callable[..., Array]:
    def apply(call: Any, x: Array) -> Array:
        axis = None if call.attrs.axis is None else integers(call.attrs.axis)
        return np.asarray(function(x, axis=axis, keepdims=bool(call.attrs.keepdims)))

    return apply


def cast(call: Any, x: Array) -> Array | None:
    """Between the types that NumPy itself has; bfloat16 and its like are left to TVM."""
    wanted = str(call.attrs.dtype)
    return x.astype(wanted) if x.dtype.kind in "fiu" and wanted in NATIVE else None


def split(call: Any, x: Array) -> list[Array]:
    sections = call.attrs.indices_or_sections
    cuts: Any = int(sections) if hasattr(sections, "value") else list(integers(sections))
    return list(np.array_split(x, cuts, axis=int(call.attrs.axis)))


def strided_slice(call: Any, x: Array) -> Array | None:
    axes, begin, end, strides = slice_bounds(call)
    if any(stride < 1 for stride in strides):
        return None  # NumPy and TVM disagree about where a backward slice ends
    index = [slice(None)] * x.ndim
    for axis, *bounds in zip(axes, begin, end, strides, strict=True):
        index[axis] = slice(*bounds)
    return x[tuple(index)]


def slice_bounds(call: Any) -> tuple[tuple[int, ...], ...]:
    """(axes, begin, end, strides) of a strided_slice."""
    axes, begin, end = (integers(argument) for argument in call.args[1:4])
    strides = integers(call.args[4]) if len(call.args) > 4 else (1,) * len(axes)
    return axes, begin, end, strides


def take(call: Any, x: Array, indices: Array) -> Array | None:
    axis = call.attrs.axis
    limit = x.size if axis is None else x.shape[int(axis)]
    if indices.size and not (-limit <= indices.min() and indices.max() < limit):
        return None
    return np.asarray(np.take(x, indices, axis=None if axis is None else int(axis)))


NATIVE = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")

OPERATORS: dict[str, Callable[..., Any]] = {
    "relax.permute_dims": lambda call, x: x.transpose(permutation(call)),
    "relax.reshape": reshaped,
    "relax.expand_dims": reshaped,
    "relax.squeeze": reshaped,
    "relax.flatten": reshaped,
    "relax.broadcast_to": broadcast,
    "relax.astype": cast,
    "relax.concat": lambda call, xs: np.concatenate(xs, axis=int(call.attrs.axis or 0)),
    "relax.stack": lambda call, xs: np.stack(xs, axis=int(call.attrs.axis or 0)),
    "relax.split": split,
    "relax.strided_slice": strided_slice,
    "relax.take": take,
    "relax.add": arithmetic(np.add),
    "relax.subtract": arithmetic(np.subtract),
    "relax.multiply": arithmetic(np.multiply),
    "relax.divide": arithmetic(np.divide),
    "relax.power": arithmetic(np.power),
    "relax.maximum": arithmetic(np.maximum),
    "relax.minimum": arithmetic(np.minimum),
    "relax.where": arithmetic(np.where),
    "relax.isnan": arithmetic(np.isnan),
    "relax.negative": arithmetic(np.negative),
    "relax.abs": arithmetic(np.abs),
    "relax.square": arithmetic(np.square),
    "relax.sqrt": arithmetic(np.sqrt),
    "relax.rsqrt": arithmetic(lambda x: 1 / np.sqrt(x)),
    "relax.exp": arithmetic(np.exp),
    "relax.tanh": arithmetic(np.tanh),
    "relax.matmul": arithmetic(np.matmul),
    "relax.sum": reduction(np.sum),
    "relax.mean": reduction(np.mean),
    "relax.max": reduction(np.max),
    "relax.min": reduction(np.min),
}
