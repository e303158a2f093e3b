"""softmax(scale * q k^T + bias) v, as importers and people spell it, with its operands traced to where they lie.

matmul(P, v),  P = softmax(S),  S = matmul(q, k^T) [* c] [+ bias]      hand-written, ONNX
P = where(all(S == -inf), 0, softmax(S))                               torch's scaled_dot_product_attention
with reshapes, permutations, slices, broadcasts and factors anywhere between (`strided_views`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.tirx.analysis import undefined_vars

from tvm_structured.dialect import static_shape
from tvm_structured.relay_passes.expressions import is_float32, op_name, same_shape
from tvm_structured.relay_passes.strided_views import Shape, View, merge, number, product, view_of, whole
from tvm_structured.schedules.attention import Attention, Strided

KEEPS_MATRICES = ("relax.reshape", "relax.broadcast_to", "relax.expand_dims", "relax.squeeze")
FEWEST_QUERIES = 4  # of a vector's lanes: with fewer most of the kernel's work would be thrown away


@dataclass(frozen=True, eq=False)
class Match:
    """The kernel's description and its arguments. `result` is the product's variable, (batch, heads, queries, width)
    in memory."""

    result: Any
    attention: Attention
    operands: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Scores:
    """factor * product + bias, of the shape of the softmax."""

    product: Any
    factor: float
    bias: Any = None


class AttentionMatcher:
    """`weights` is the function's WeightFolder, `uses` how often its variables are read."""

    def __init__(self, weights: Any, uses: Any) -> None:
        self.weights, self.uses = weights, uses

    def match(self, var: Any, call: Any) -> Match | None:
        """The attention whose last product is `call`, bound to `var`; None where it is something else."""
        if op_name(call) != "relax.matmul" or not is_float32(var, *call.args):
            return None
        found = self.probabilities(call.args[0])
        if found is None:
            return None
        softmax, is_safe = found
        scores = self.scores(softmax.args[0], reads=2 if is_safe else 1)
        shape = static_shape(softmax)
        if scores is None or shape is None or len(shape) < 3 or not is_float32(softmax, *scores.product.args):
            return None
        return self.placed(var, call.args[1], scores, shape, is_safe)

    # -- the pattern -----------------------------------------------------------------------------------

    def behind(self, expr: Any, reads: int = 1) -> Any | None:
        """What is behind other names and behind reshapes that keep the last two dimensions; None where something on
        the way is read more than once (the first one more than `reads` times)."""
        while isinstance(expr, relax.Var):
            if self.uses[expr] > reads:
                return None
            reads, expr = 1, self.weights.bindings.get(expr)
            if op_name(expr) not in KEEPS_MATRICES:
                continue
            inside, outside = static_shape(expr.args[0]), static_shape(expr)
            if inside is None or outside is None or not same_shape(inside[-2:], outside[-2:]):
                return expr
            if op_name(expr) == "relax.broadcast_to" and not same_shape(inside, outside):
                return expr
            expr = expr.args[0]
        return expr

    def probabilities(self, expr: Any) -> tuple[Any, bool] | None:
        """(softmax call, whether rows without a finite score give zeros)."""
        call = self.behind(expr)
        if op_name(call) != "relax.where":
            return (call, False) if self.is_softmax(call) else None
        empty, zeros, softmax = call.args
        softmax = self.behind(softmax, reads=2)  # the zeros are made like it
        if not self.is_softmax(softmax) or not self.is_zero(zeros) or not self.is_empty_row(empty, softmax.args[0]):
            return None
        return softmax, True

    def is_softmax(self, call: Any) -> bool:
        return op_name(call) == "relax.nn.softmax" and int(call.attrs.axis) in (-1, len(static_shape(call) or ()) - 1)

    def is_zero(self, expr: Any) -> bool:
        call = self.weights.lookup(expr)
        value = self.weights.array(call.args[1] if op_name(call) == "relax.full_like" else expr)
        return value is not None and bool((value == 0).all())

    def is_empty_row(self, expr: Any, scores: Any) -> bool:
        """not any(not (scores == -inf)) along the last dimension; `any` is a maximum of int8."""
        for expected in ("logical_not", "astype", "max", "astype", "logical_not", "equal"):
            call = self.weights.lookup(expr)
            if op_name(call) != f"relax.{expected}":
                return False
            if expected == "max" and [int(axis) for axis in call.attrs.axis] not in ([-1], [call.args[0].ty.ndim - 1]):
                return False
            expr = call.args[0]
        bound = self.weights.array(call.args[1])
        same = expr.same_as(scores) or self.weights.lookup(expr).same_as(self.weights.lookup(scores))
        return bound is not None and bool((bound == -np.inf).all()) and bool(same)

    def scores(self, expr: Any, factor: float = 1.0, reads: int = 1) -> Scores | None:
        call = self.behind(expr, reads)
        name = op_name(call)
        if name == "relax.matmul":
            return Scores(call, factor)
        if name in ("relax.multiply", "relax.divide"):
            for x, other in (call.args, list(reversed(call.args))):
                value = number(self.weights, other)
                if value is not None and same_shape(static_shape(x), static_shape(call)):
                    return self.scores(x, factor * (value if name == "relax.multiply" else 1.0 / value))
                if name == "relax.divide":
                    break
        if name == "relax.add" and factor == 1.0:
            for x, bias in (call.args, list(reversed(call.args))):
                inner = self.scores(x) if same_shape(static_shape(x), static_shape(call)) else None
                if inner is not None and inner.bias is None and is_float32(bias):
                    return Scores(inner.product, inner.factor, bias)
        return None

    # -- where the operands lie ------------------------------------------------------------------------

    def placed(self, var: Any, v: Any, scores: Scores, shape: Shape, is_safe: bool) -> Match | None:
        *lead, queries, keys = shape
        batch, heads = self.batch_and_heads(lead, scores.product.args[0])
        depth, width = static_shape(scores.product.args[0])[-1], static_shape(v)[-1]  # type: ignore[index]
        if not all(isinstance(size, int) for size in (heads, depth, width)):
            return None
        if isinstance(queries, int) and queries < FEWEST_QUERIES:
            return None
        sizes = (batch, heads)
        products = static_shape(scores.product)
        assert products is not None
        q = self.view(scores.product.args[0], (*products[:-2], queries, depth), (*sizes, queries, depth))
        k = self.view(scores.product.args[1], (*products[:-2], depth, keys), (*sizes, depth, keys))
        result = static_shape(var)
        assert result is not None
        values = self.view(v, (*result[:-2], keys, width), (*sizes, keys, width), is_rows)
        bias = None
        if scores.bias is not None:
            bias = self.view(scores.bias, shape, (*sizes, queries, keys), is_unscaled)
            if bias is None:
                return None
        if q is None or k is None or values is None:
            return None
        scale = q.scale * k.scale * scores.factor
        views = [q, k.permuted((0, 1, 3, 2)), values, *([bias] if bias is not None else [])]
        places = [Strided(static_shape(view.source) or (), view.strides or (), view.offset) for view in views]
        attention = Attention(
            batch, heads, queries, keys, depth, width, scale, *places[:3], places[3] if bias else None, is_safe
        )
        return Match(var, attention, tuple(view.source for view in views)) if can_bind(attention) else None

    def batch_and_heads(self, lead: Any, q: Any) -> tuple[Any, Any]:
        """The leading dimensions as two. One that was merged of two shows that in how the queries lie."""
        if len(lead) > 1:
            return product(lead[:-1]), lead[-1]
        traced = view_of(q, self.weights)
        digits = traced.axes[0] if traced is not None and len(traced.axes) == 3 else ()
        return (digits[0][0], digits[1][0]) if len(digits) == 2 else (lead[0], 1)

    def view(
        self, expr: Any, shape: Shape, wanted: Shape, is_fit: Callable[[View], bool] = lambda view: True
    ) -> View | None:
        """`expr`, broadcast to `shape`, as one of four dimensions: what it is a view of, else as it lies itself."""
        traced = view_of(expr, self.weights)
        own = static_shape(expr)
        if traced is None or own is None:
            return None
        for candidate in (traced, whole(expr, own)):
            if not is_float32(candidate.source) or not is_fit(candidate):
                continue
            spread = candidate.broadcast(shape)
            placed = spread.reshaped(wanted) if spread is not None else None
            if placed is not None and placed.strides is not None:
                return placed
        return None


def is_unscaled(view: View) -> bool:
    return view.scale == 1.0


def is_rows(view: View) -> bool:
    """Whether the last dimension is contiguous."""
    digit = merge(view.axes[-1])
    return view.scale == 1.0 and digit is not None and same_shape(digit[1:], (1,))


def can_bind(attention: Attention) -> bool:
    """Whether every symbolic size is the extent of an argument by itself: that is where a kernel learns it."""
    shapes = [attention.y_shape, *(operand.shape for operand in attention.operands)]
    known = {extent for shape in shapes for extent in shape if isinstance(extent, tirx.Var)}
    used = [*attention.y_shape, attention.keys]
    for operand in attention.operands:
        used += [*operand.shape, *operand.strides, operand.offset]
    return all(
        isinstance(extent, int) or all(any(v.same_as(k) for k in known) for v in undefined_vars_of(extent))
        for extent in used
    )


def undefined_vars_of(extent: Any) -> list[Any]:
    return list(undefined_vars(tirx.Evaluate(extent), []))
