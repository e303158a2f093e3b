"""Reading Relax expressions: names, shapes, dtypes and uses."""

from __future__ import annotations

from collections import Counter
from typing import Any

import tvm_ffi
from tvm import ir, relax, sym, tirx
from tvm.relax.expr_functor import PyExprVisitor, visitor

from tvm_structured.dialect import static_shape


def op_name(expr: Any) -> str:
    """Name of the called operator, empty for any other expression."""
    if isinstance(expr, ir.Call) and isinstance(expr.op, ir.Op):
        return str(expr.op.name)
    return ""


FLOAT32 = ("float32",)  # what the CPU's kernels compute on
FLOATS = ("float32", "float16", "bfloat16")  # the GPU's


def is_float32(*exprs: Any) -> bool:
    """Whether all are float32 tensors of known rank."""
    return is_float(FLOAT32, *exprs)


def is_float(dtypes: tuple[str, ...], *exprs: Any) -> bool:
    """Whether all are tensors of known rank and of one type, one of `dtypes`."""
    if not all(isinstance(e.ty, relax.TensorType) and static_shape(e) is not None for e in exprs):
        return False
    found = {str(e.ty.dtype) for e in exprs}
    return len(found) == 1 and found <= set(dtypes)


def shape_of(expr: Any) -> tuple[Any, ...]:
    """The shape of a tensor whose rank is known."""
    shape = static_shape(expr)
    assert shape is not None
    return shape


def is_static(shape: Any) -> bool:
    return shape is not None and all(isinstance(extent, int) for extent in shape)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two shapes (ints and expressions, None for unknown) are provably the same."""
    if a is None or b is None:
        return False
    return len(a) == len(b) and all(same_extent(x, y) for x, y in zip(a, b, strict=True))


def same_extent(a: Any, b: Any) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(tvm_ffi.structural_equal(a, b)) or bool(sym.Analyzer().can_prove_equal(a, b))


def integers(values: Any) -> tuple[int, ...]:
    """Python ints of an attribute or of a tuple argument."""
    fields = values.fields if isinstance(values, relax.Tuple) else values
    return tuple(int(v) for v in fields)


def permutation(call: Any) -> tuple[int, ...]:
    """The axes of a permute_dims; without axes it reverses them."""
    if call.attrs.axes is None:
        return tuple(reversed(range(call.args[0].ty.ndim)))
    rank = len(call.attrs.axes)
    return tuple(axis % rank for axis in integers(call.attrs.axes))


def scalar(value: Any) -> float | None:
    """A number written as an immediate argument (as in clip), else None."""
    return float(value.value) if isinstance(value, (tirx.IntImm, tirx.FloatImm)) else None


def count_uses(function: Any) -> Counter[Any]:
    """Variable -> how often it is read, the function's result included."""
    counter = _UseCounter()
    counter.visit_expr(function)
    return counter.uses


@visitor
class _UseCounter(PyExprVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.uses: Counter[Any] = Counter()

    def visit_var_(self, op: Any) -> None:
        self.uses[op] += 1

    def visit_dataflow_var_(self, op: Any) -> None:
        self.uses[op] += 1
