"""Dense layers: every product of an input with one constant matrix.

matmul(x, W (in, out)), x of any rank       dense(x, W^T)
matmul(W (out, in), x (in, n))              permute_dims(dense(permute_dims(x), W))
matmul(W (out, in), x (in))                 dense(x, W)
einsum("...i,oi->...o"), either order       dense(x, W)
matmul(alpha * x, W)                        dense(x, W, scale=alpha)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from tvm_structured.dialect import LayerCall, static_shape
from tvm_structured.relay_passes.expressions import (
    is_float,
    op_name,
    permutation,
    same_extent,
    same_shape,
    shape_of,
)
from tvm_structured.relay_passes.fold_weights import Weight
from tvm_structured.relay_passes.match_gelu import gelu_argument
from tvm_structured.schedules.base import Epilogue
from tvm_structured.structures.layer import Array


def match_dense(ctx: Any, call: Any, result: Any) -> Any | None:
    """The canonical spelling of a dense layer, None for anything else.

    `result` is the call as it stands in the module; `call` is what it means (the same, but for recognised TensorIR).
    """
    operands = operands_of(call)
    if operands is None or not is_float(ctx.dtypes, result, *operands):
        return None
    folded = [ctx.weights.fold(unrepeated(ctx, operand)) for operand in operands]
    if sum(weight is not None for weight in folded) != 1:
        return None
    side = 0 if folded[0] is not None else 1
    x, weight = operands[1 - side], folded[side]
    if weight.value.size == 0 or not static_shape(x):
        return None
    if op_name(call) == "relax.einsum":
        return contraction(ctx, call.attrs.subscripts, x, weight, side)
    return weight_on_the_left(ctx, x, weight) if side == 0 else weight_on_the_right(ctx, x, weight, result)


def operands_of(call: Any) -> list[Any] | None:
    """The two tensors of a matmul or einsum."""
    if op_name(call) == "relax.matmul":
        return list(call.args)
    if op_name(call) == "relax.einsum" and len(call.args[0].fields) == 2:
        return list(call.args[0].fields)
    return None


def unrepeated(ctx: Any, operand: Any) -> Any:
    """The matrix that broadcast_to repeats along a batch: a symbolic one has no value at compile time."""
    source = ctx.source(operand)
    if op_name(source) != "relax.broadcast_to":
        return operand
    inside, outside = static_shape(source.args[0]), static_shape(source)
    is_matrix = inside is not None and outside is not None and len(inside) == 2 and same_shape(inside, outside[-2:])
    return source.args[0] if is_matrix else operand


def weight_on_the_right(ctx: Any, x: Any, weight: Weight, result: Any) -> Any | None:
    """x (..., in) times W (..., in, out), where all matrices of a stack are the same one."""
    stack, shape, out_shape = weight.value, shape_of(x), shape_of(result)
    if stack.ndim < 2:
        return None
    matrix = stack[(0,) * (stack.ndim - 2)]
    if stack.ndim > 2 and not (stack == matrix).all():
        return None
    extra = len(out_shape) - len(shape)  # a stack with more dimensions than x adds leading ones
    plain_shape = (*shape[:-1], matrix.shape[1])
    if not same_extent(shape[-1], matrix.shape[0]) or not same_shape(out_shape, (1,) * extra + plain_shape):
        return None
    dense = emit_dense(ctx, x, weight, matrix.T)
    return relax.op.expand_dims(ctx.emit(dense), list(range(extra))) if extra else dense


def weight_on_the_left(ctx: Any, x: Any, weight: Weight) -> Any | None:
    """W (out, in) times a vector, or times the columns of a matrix. Columns of a batch are left alone."""
    shape, matrix = shape_of(x), weight.value
    if matrix.ndim != 2 or len(shape) > 2 or not same_extent(shape[0], matrix.shape[1]):
        return None
    if len(shape) == 1:
        return emit_dense(ctx, x, weight, matrix)
    source = ctx.source(x)
    if op_name(source) == "relax.permute_dims" and permutation(source) == (1, 0):
        rows = source.args[0]
    else:
        rows = relax.op.permute_dims(ctx.visit(x), [1, 0])
        return transposed(ctx, emit_dense(ctx, ctx.emit(rows), weight, matrix, is_visited=True))
    return transposed(ctx, emit_dense(ctx, rows, weight, matrix))


def transposed(ctx: Any, matrix: Any) -> Any:
    return relax.op.permute_dims(ctx.emit(matrix), [1, 0])


def contraction(ctx: Any, equation: str, x: Any, weight: Weight, side: int) -> Any | None:
    """einsum of x's last index with one index of a matrix, the other one taking its place in the result."""
    inputs, _, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    letters, lead = terms[side], terms[1 - side][:-1]
    inner = terms[1 - side][-1:]
    is_dense = (
        weight.value.ndim == 2
        and len(set(letters)) == 2
        and inner in letters
        and not set(letters) & set(lead)
        and result == lead + letters.replace(inner, "")
        and len(set(result) - {"."}) == len(result.replace(".", ""))
    )
    if not is_dense:
        return None
    matrix = weight.value if letters[1] == inner else weight.value.T
    if not same_extent(shape_of(x)[-1], matrix.shape[1]):
        return None
    return emit_dense(ctx, x, weight, matrix)


def emit_dense(ctx: Any, x: Any, weight: Weight, matrix: Array, is_visited: bool = False) -> Any:
    """The call for x (..., in) and a matrix (out, in); a factor of x becomes the layer's scale."""
    layer = ctx.names.assign(weight.origin, matrix, "dense")
    plain, alpha = (x, 1.0) if is_visited else without_factor(ctx, x)
    if alpha == 1.0:
        return LayerCall("dense", layer.name, plain, (layer.const,)).to_relax()
    scale = relax.const(np.full(matrix.shape[0], alpha, "float32"))
    return LayerCall(
        "dense", layer.name, plain, (layer.const,), epilogue=Epilogue(scale=True), operands=(scale,)
    ).to_relax()


def without_factor(ctx: Any, x: Any) -> tuple[Any, float]:
    """(z, alpha) with x = alpha * z, z ready for use; alpha is 1 unless x is a multiple, or the transpose of one."""
    source = ctx.source(x)
    match op_name(source):
        case "relax.broadcast_to" if same_shape(static_shape(source), static_shape(source.args[0])):
            return without_factor(ctx, source.args[0])
        case "relax.permute_dims":
            plain, alpha = without_factor(ctx, source.args[0])
            if alpha != 1.0:
                return ctx.emit(relax.op.permute_dims(plain, list(permutation(source)))), alpha
        case "relax.multiply" if gelu_argument(ctx, source) is None:  # the 0.5 of a gelu stays with it
            for factor, other in (source.args, list(reversed(source.args))):
                value = ctx.weights.array(factor)
                if value is not None and value.size == 1 and same_shape(static_shape(other), static_shape(x)):
                    plain, alpha = without_factor(ctx, other)
                    return plain, alpha * float(value.reshape(()))
    return ctx.visit(x), 1.0
