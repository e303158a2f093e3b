"""What follows a layer and is read by nothing else becomes part of it: act(scale * layer(x) + bias + residual).

    multiply, divide by constants per feature    -->  scale (and bias)
    add, subtract constants per feature          -->  bias
    batch_norm(training=False)                   -->  scale and bias; the weight keeps its structure
    add of a tensor of the output's shape        -->  residual
    relu, clip, maximum/minimum, gelu            -->  activation, which ends the layer

Reshapes and permutations between the layer and what follows are passed through. Those around a dense layer that only
merge leading dimensions disappear, as do pairs of permutations that undo each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm_structured import dialect
from tvm_structured.dialect import LayerCall, static_shape
from tvm_structured.relay_passes.canonicalize_layers import main_of
from tvm_structured.relay_passes.compose_epilogue import clamp, with_activation, with_affine, with_bounds, with_residual
from tvm_structured.relay_passes.expressions import (
    count_uses,
    is_float32,
    op_name,
    permutation,
    same_shape,
    scalar,
)
from tvm_structured.relay_passes.fold_weights import WeightFolder
from tvm_structured.relay_passes.layer_site import VIEWS, Site, find_site
from tvm_structured.relay_passes.match_gelu import gelu_argument
from tvm_structured.relay_passes.recognize_tir import recognize
from tvm_structured.structures.layer import Array


@tvm.transform.module_pass(opt_level=0, name="FuseEpilogue")
class FuseEpilogue:
    """Epilogues of the structured operators of `main`."""

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        dialect.register()
        function = relax.analysis.remove_all_unused(main_of(mod))  # dead readers would forbid fusing
        mod = _Fuser(mod, function).run(function)
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Fuser(PyExprMutator):
    """One walk, front to back: each operation finds its operand's layer already holding what came before."""

    def __init__(self, mod: Any, function: Any) -> None:
        super().__init__(mod)
        self.mod, self.weights, self.reads = mod, WeightFolder(mod, function), count_uses(function)

    def run(self, function: Any) -> Any:
        rewritten = relax.analysis.remove_all_unused(self.visit_expr(function))
        self.builder_.update_func(self.mod.get_global_var("main"), rewritten)
        return self.builder_.get()

    # -- bindings ------------------------------------------------------------------------------------

    def visit_var_binding_(self, binding: Any) -> None:
        super().visit_var_binding_(binding)
        self.reads[self.visit_expr(binding.var)] = self.reads[binding.var]  # the variable may have been replaced

    def emit(self, expr: Any) -> Any:
        var = self.builder_.emit(expr)
        self.reads[var] = 1
        return var

    def lookup(self, var: Any) -> Any:
        return self.lookup_binding(var)

    def site(self, operand: Any, reads: int = 1) -> Site | None:
        return find_site(operand, self.lookup, self.reads.__getitem__, reads)

    # -- expressions ---------------------------------------------------------------------------------

    def visit_tuple_getitem_(self, item: Any) -> Any:
        """The first result of batch_norm is what follows the layer; the others have no readers by now."""
        call = self.weights.lookup(item.tuple_value)
        if item.index == 0 and op_name(call) == "relax.nn.batch_norm" and self.reads[item.tuple_value] == 1:
            fused = self.fuse_batch_norm(call)
            if fused is not None:
                return fused
        return super().visit_tuple_getitem_(item)

    def visit_call_(self, call: Any) -> Any:
        new = self.visit_expr_post_order(call)
        if op_name(new) in VIEWS:
            simpler = self.without_reshapes(new) if op_name(new) != "relax.permute_dims" else self.without_permutes(new)
            return new if simpler is None else simpler
        recognised = recognize(self.mod, new)
        meaning = new if recognised is None else recognised
        fuse = FUSIONS.get(op_name(meaning))
        if fuse is None or not is_float32(call):
            return new
        fused = fuse(self, meaning)
        return new if fused is None else fused

    def fuse_batch_norm(self, call: Any) -> Any | None:
        x, attrs = self.visit_expr(call.args[0]), call.attrs
        statistics = [self.weights.array(argument) for argument in call.args[1:5]]
        site = self.site(x)
        if site is None or attrs.training or any(value is None for value in statistics):
            return None
        if int(attrs.axis) % x.ty.ndim != site.channel_axis:
            return None
        gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in statistics)
        scale = (gamma if attrs.scale else 1.0) / np.sqrt(variance + float(attrs.epsilon))
        shift = (beta if attrs.center else 0.0) - mean * scale
        return self.rebuilt(site, with_affine(site.layer, scale, shift))

    def rebuilt(self, site: Site, layer: LayerCall | None) -> Any | None:
        return None if layer is None else site.replay(layer, self.emit)

    # -- views ---------------------------------------------------------------------------------------

    def without_reshapes(self, view: Any) -> Any | None:
        """reshape(dense(reshape(x)))  -->  dense(x)   where only leading dimensions were merged and split again."""
        site = self.site(view.args[0])
        if site is None or site.views or site.layer.conv is not None or site.layer.epilogue.residual:
            return None
        inner = self.resolve(site.layer.x)
        if op_name(inner) not in VIEWS or op_name(inner) == "relax.permute_dims":
            return None
        x = inner.args[0]
        before, merged, out, after = (static_shape(e) or () for e in (x, site.layer.x, site.output, view))
        if not before or not same_shape(before[-1:], merged[-1:]) or not same_shape(after, (*before[:-1], *out[-1:])):
            return None
        self.reads[x] += self.reads[site.layer.x] > 1  # the inner view lives on for its other readers
        return replace(site.layer, x=x).to_relax()

    def without_permutes(self, view: Any) -> Any | None:
        """permute_dims(permute_dims(x))  -->  x   where the second undoes the first."""
        first = self.resolve(view.args[0])
        if op_name(first) != "relax.permute_dims":
            return None
        inner, outer = permutation(first), permutation(view)
        if tuple(inner[axis] for axis in outer) != tuple(range(len(inner))):
            return None
        self.reads[first.args[0]] += self.reads[view.args[0]] > 1
        return first.args[0]

    def resolve(self, expr: Any) -> Any:
        """The call a variable is bound to, through other names of it."""
        while isinstance(expr, relax.Var) and (value := self.lookup(expr)) is not None:
            expr = value
        return expr


# -- one function per kind of operator: (fuser, call) -> the new expression, or None ------------------------


def fuse_add(fuser: _Fuser, call: Any) -> Any | None:
    for operand, other in (call.args, list(reversed(call.args))):
        site = fuser.site(operand)
        if site is None:
            continue
        vector = feature_vector(fuser, site, operand, other)
        layer = (
            with_affine(site.layer, None, vector) if vector is not None else add_residual(fuser, site, operand, other)
        )
        if layer is not None:
            return fuser.rebuilt(site, layer)
    return None


def add_residual(fuser: _Fuser, site: Site, operand: Any, other: Any) -> LayerCall | None:
    """A tensor of the same shape joins the accumulator; behind views that keep the order it is reshaped back."""
    if not site.keeps_order or not is_float32(other) or not same_shape(static_shape(other), static_shape(operand)):
        return None
    if with_residual(site.layer, other) is None or not site.views:
        return with_residual(site.layer, other)
    back = relax.op.reshape(other, relax.ShapeExpr(list(site.output.ty.shape.values)))
    return with_residual(site.layer, fuser.emit(back))


def fuse_affine(sign: Callable[[Array], tuple[Any, Any]], swapped: Callable[[Array], tuple[Any, Any]] | None) -> Any:
    """layer op c  -->  scale and shift as `sign(c)` says; c op layer as `swapped(c)` says, where that is affine."""

    def fuse(fuser: _Fuser, call: Any) -> Any | None:
        cases = [(call.args[0], call.args[1], sign)]
        if swapped is not None:
            cases.append((call.args[1], call.args[0], swapped))
        for operand, other, affine in cases:
            site = fuser.site(operand)
            vector = feature_vector(fuser, site, operand, other) if site is not None else None
            if site is not None and vector is not None:
                return fuser.rebuilt(site, with_affine(site.layer, *affine(vector)))
        return None

    return fuse


def fuse_multiply(fuser: _Fuser, call: Any) -> Any | None:
    scaled = fuse_affine(lambda c: (c, None), lambda c: (c, None))(fuser, call)
    if scaled is not None:
        return scaled
    argument = gelu_argument(fuser, call)
    site = fuser.site(argument, reads=2) if argument is not None else None
    return fuser.rebuilt(site, with_activation(site.layer, "gelu")) if site is not None else None


def fuse_negative(fuser: _Fuser, call: Any) -> Any | None:
    site = fuser.site(call.args[0])
    return fuser.rebuilt(site, with_affine(site.layer, -1.0, None)) if site is not None else None


def fuse_gelu(fuser: _Fuser, call: Any) -> Any | None:
    site = fuser.site(call.args[0])
    return fuser.rebuilt(site, with_activation(site.layer, "gelu")) if site is not None else None


def fuse_bounds(fuser: _Fuser, call: Any) -> Any | None:
    bounds = bounds_of(fuser, call)
    return fuse_between(fuser, *bounds) if bounds is not None else None


def fuse_between(fuser: _Fuser, operand: Any, low: float, high: float) -> Any | None:
    site = fuser.site(operand)
    if site is not None:
        return fuser.rebuilt(site, with_bounds(site.layer, low, high))
    # A lower bound other than 0 is no activation by itself; it waits here for the upper one
    inner = fuser.lookup(operand) if isinstance(operand, relax.Var) and fuser.reads[operand] == 1 else None
    bounds = bounds_of(fuser, inner) if inner is not None else None
    if bounds is None:
        return None
    source, inner_low, inner_high = bounds
    return fuse_between(fuser, source, clamp(inner_low, low, high), clamp(inner_high, low, high))


def bounds_of(fuser: _Fuser, call: Any) -> tuple[Any, float, float] | None:
    """(operand, low, high) of relu, clip, or maximum/minimum with a number."""
    recognised = recognize(fuser.mod, call)
    call = call if recognised is None else recognised
    name = op_name(call)
    if name == "relax.nn.relu":
        return call.args[0], 0.0, np.inf
    if name == "relax.nn.relu6":
        return call.args[0], 0.0, 6.0
    if name == "relax.clip":
        low, high = scalar(call.args[1]), scalar(call.args[2])
        return None if low is None or high is None else (call.args[0], low, high)
    if name not in ("relax.maximum", "relax.minimum"):
        return None
    for operand, other in (call.args, list(reversed(call.args))):
        value = fuser.weights.array(other)
        if value is not None and value.size == 1 and value.ndim <= operand.ty.ndim and not np.isnan(value).any():
            bound = float(value.reshape(()))
            return (operand, bound, np.inf) if name == "relax.maximum" else (operand, -np.inf, bound)
    return None


def feature_vector(fuser: _Fuser, site: Site, operand: Any, other: Any) -> Array | None:
    value = fuser.weights.array(other)
    return None if value is None else site.per_channel(value, operand.ty.ndim)


FUSIONS: dict[str, Callable[[_Fuser, Any], Any]] = {
    "relax.add": fuse_add,
    "relax.subtract": fuse_affine(lambda c: (None, -c), lambda c: (-1.0, c)),
    "relax.multiply": fuse_multiply,
    "relax.divide": fuse_affine(lambda c: (1.0 / c, None), None),
    "relax.negative": fuse_negative,
    "relax.nn.gelu": fuse_gelu,
    "relax.nn.relu": fuse_bounds,
    "relax.nn.relu6": fuse_bounds,
    "relax.clip": fuse_bounds,
    "relax.maximum": fuse_bounds,
    "relax.minimum": fuse_bounds,
}
