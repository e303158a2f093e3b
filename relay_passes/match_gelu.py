"""h * (erf(h / sqrt(2)) + 1) * 0.5  -->  gelu(h), in every order of the factors, as exporters spell it."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from tvm_structured.relay_passes.expressions import op_name

TOLERANCE = 1e-5  # relative; exporters round sqrt(2) to float32


def gelu_argument(ctx: Any, product: Any) -> Any | None:
    """The variable h where the product is gelu(h), else None.

    `ctx` tells `lookup` (variable -> expression), `reads` and `weights`. All intermediate values have one reader.
    """
    factor, terms = factors(ctx, product)
    if len(terms) != 2:
        return None
    for h, other in (terms, terms[::-1]):
        found = erf_plus_constant(ctx, other)
        if found is None or not isinstance(h, relax.Var):
            continue
        weight, argument_scale, argument, added = found
        coefficients = (factor * weight, factor * added, argument_scale)
        if argument.same_as(h) and near(coefficients, (0.5, 0.5, math.sqrt(0.5))):
            return h
    return None


def erf_plus_constant(ctx: Any, expr: Any) -> tuple[float, float, Any, float] | None:
    """(a, s, h, b) of a * erf(s * h) + b."""
    total = inner(ctx, expr)
    if op_name(total) != "relax.add":
        return None
    for term, constant in (total.args, list(reversed(total.args))):
        added = number(ctx, constant)
        if added is None:
            continue
        weight, terms = factors(ctx, inner(ctx, term))
        erf = inner(ctx, terms[0]) if len(terms) == 1 else None
        if erf is None or op_name(erf) != "relax.erf":
            continue
        scale, arguments = factors(ctx, inner(ctx, erf.args[0]))
        if len(arguments) == 1:
            return weight, scale, arguments[0], added
    return None


def factors(ctx: Any, expr: Any) -> tuple[float, list[Any]]:
    """A product of numbers and other factors, through nested products and quotients by numbers."""
    name = op_name(expr)
    if name not in ("relax.multiply", "relax.divide"):
        return 1.0, [expr]
    value: float = 1.0
    terms: list[Any] = []
    for position, argument in enumerate(expr.args):
        known = number(ctx, argument)
        if known is None and name == "relax.divide" and position == 1:
            return 1.0, [expr]
        if known is None:
            inner_value, inner_terms = factors(ctx, inner(ctx, argument))
            value, terms = value * inner_value, terms + inner_terms
        elif name == "relax.divide" and position == 1:
            value /= known
        else:
            value *= known
    return value, terms


def inner(ctx: Any, expr: Any) -> Any:
    """What a variable with one reader is bound to where that is arithmetic; anything else as it is."""
    if not isinstance(expr, relax.Var) or ctx.reads[expr] != 1:
        return expr
    value = ctx.lookup(expr)
    return value if op_name(value) in ("relax.multiply", "relax.divide", "relax.add", "relax.erf") else expr


def number(ctx: Any, expr: Any) -> float | None:
    value = ctx.weights.array(expr)
    return float(value.reshape(())) if value is not None and value.size == 1 and value.ndim == 0 else None


def near(values: tuple[float, ...], wanted: tuple[float, ...]) -> bool:
    return all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(values, wanted, strict=True))
