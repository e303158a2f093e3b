"""What a layer absorbs: one function for each operator that may follow it, and the table of them.

Each takes the fuser and the call and returns the expression that replaces it, or None where it stays. The fuser tells
`site` (the layer behind a variable), `reads`, `lookup`, `meaning` and `weights`; it can `emit` and `rebuild`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from tvm_structured.dialect import LayerCall, static_shape
from tvm_structured.relay_passes.compose_epilogue import (
    clamp,
    with_activation,
    with_affine,
    with_bounds,
    with_residual,
)
from tvm_structured.relay_passes.expressions import is_float, op_name, same_shape, scalar
from tvm_structured.relay_passes.layer_site import Site
from tvm_structured.relay_passes.match_gelu import gelu_argument
from tvm_structured.structures.layer import Array


def absorb_add(fuser: Any, call: Any) -> Any | None:
    for operand, other in (call.args, list(reversed(call.args))):
        site = fuser.site(operand)
        if site is None:
            continue
        vector = feature_vector(fuser, site, operand, other)
        if vector is None:
            layer = add_residual(fuser, site, operand, other)
        else:
            layer = with_affine(site.layer, None, vector)
        if layer is not None:
            return fuser.rebuild(site, layer)
    return None


def add_residual(fuser: Any, site: Site, operand: Any, other: Any) -> LayerCall | None:
    """A tensor of the same shape joins the accumulator; behind views that keep the order it is reshaped back."""
    is_one_type = is_float(fuser.dtypes, other, operand)
    if not site.keeps_order or not is_one_type or not same_shape(static_shape(other), static_shape(operand)):
        return None
    if with_residual(site.layer, other) is None or not site.views:
        return with_residual(site.layer, other)
    back = relax.op.reshape(other, relax.ShapeExpr(list(site.output.ty.shape.values)))
    return with_residual(site.layer, fuser.emit(back))


def absorb_affine(sign: Callable[[Array], tuple[Any, Any]], swapped: Callable[[Array], tuple[Any, Any]] | None) -> Any:
    """layer op c  -->  scale and shift as `sign(c)` says; c op layer as `swapped(c)` says, where that is affine."""

    def fuse(fuser: Any, call: Any) -> Any | None:
        cases = [(call.args[0], call.args[1], sign)]
        if swapped is not None:
            cases.append((call.args[1], call.args[0], swapped))
        for operand, other, affine in cases:
            site = fuser.site(operand)
            vector = feature_vector(fuser, site, operand, other) if site is not None else None
            if site is not None and vector is not None:
                with np.errstate(all="ignore"):  # what is not finite is refused by with_affine
                    scale, shift = affine(vector)
                return fuser.rebuild(site, with_affine(site.layer, scale, shift))
        return None

    return fuse


def absorb_multiply(fuser: Any, call: Any) -> Any | None:
    scaled = absorb_affine(lambda c: (c, None), lambda c: (c, None))(fuser, call)
    if scaled is not None:
        return scaled
    for argument, activation in ((gelu_argument(fuser, call), "gelu"), (silu_argument(fuser, call), "silu")):
        site = fuser.site(argument, reads=2) if argument is not None else None
        if site is not None:
            return fuser.rebuild(site, with_activation(site.layer, activation))
    return None


def silu_argument(fuser: Any, product: Any) -> Any | None:
    """h of h * sigmoid(h), None for any other product."""
    for h, other in (product.args, list(reversed(product.args))):
        gate = fuser.lookup(other) if fuser.reads[other] == 1 else None
        if op_name(gate) == "relax.sigmoid" and gate.args[0].same_as(h):
            return h
    return None


def absorb_negative(fuser: Any, call: Any) -> Any | None:
    site = fuser.site(call.args[0])
    return fuser.rebuild(site, with_affine(site.layer, -1.0, None)) if site is not None else None


def absorb_activation(activation: str) -> Any:
    def fuse(fuser: Any, call: Any) -> Any | None:
        site = fuser.site(call.args[0])
        return fuser.rebuild(site, with_activation(site.layer, activation)) if site is not None else None

    return fuse


def absorb_bounds(fuser: Any, call: Any) -> Any | None:
    bounds = bounds_of(fuser, call)
    return absorb_between(fuser, *bounds) if bounds is not None else None


def absorb_between(fuser: Any, operand: Any, low: float, high: float) -> Any | None:
    site = fuser.site(operand)
    if site is not None:
        return fuser.rebuild(site, with_bounds(site.layer, low, high))
    # A lower bound other than 0 is no activation by itself; it waits here for the upper one
    inner = fuser.lookup(operand) if fuser.reads[operand] == 1 else None
    bounds = bounds_of(fuser, inner) if inner is not None else None
    if bounds is None:
        return None
    source, inner_low, inner_high = bounds
    return absorb_between(fuser, source, clamp(inner_low, low, high), clamp(inner_high, low, high))


def bounds_of(fuser: Any, call: Any) -> tuple[Any, float, float] | None:
    """(operand, low, high) of relu, clip, or maximum/minimum with a number."""
    call = fuser.meaning(call)
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


def feature_vector(fuser: Any, site: Site, operand: Any, other: Any) -> Array | None:
    value = fuser.weights.array(other)
    return None if value is None else site.per_channel(value, operand.ty.ndim)


ABSORB: dict[str, Callable[[Any, Any], Any]] = {
    "relax.add": absorb_add,
    "relax.subtract": absorb_affine(lambda c: (None, -c), lambda c: (-1.0, c)),
    "relax.multiply": absorb_multiply,
    "relax.divide": absorb_affine(lambda c: (np.reciprocal(c), None), None),
    "relax.negative": absorb_negative,
    "relax.nn.gelu": absorb_activation("gelu"),
    "relax.nn.gelu_tanh": absorb_activation("gelu_tanh"),
    "relax.nn.silu": absorb_activation("silu"),
    "relax.nn.relu": absorb_bounds,
    "relax.nn.relu6": absorb_bounds,
    "relax.clip": absorb_bounds,
    "relax.maximum": absorb_bounds,
    "relax.minimum": absorb_bounds,
}
