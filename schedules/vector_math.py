"""exp, log, tanh, erf, sigmoid and pow as arithmetic, so that LLVM vectorises the loops that contain them.

TVM lowers each of these functions to one call of libm for every element. The formulas below use only operations that
have vector instructions. Their relative error is below 4e-7 (a few units in the last place) over the whole range
of float32; infinities, NaN and overflow behave as in libm. Coefficients: weighted minimax fits by Lawson's iteration
(C. L. Lawson, "Contributions to the theory of linear least maximum approximations", 1961) in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

# exp(r) = 1 + r + r^2 Q(r) on |r| <= ln(2)/2; highest power first, as everywhere below. Error of the fit 3.1e-9
EXP_Q = (0.00138144667, 0.00836878043, 0.0416683942, 0.166665201, 0.499999934)
# ln(2) in two parts: the first has 9 trailing zero bits, so that n times it is exact for |n| < 2^9
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
LOG2_E = 1.44269504
# log(1 + f) = f - f^2/2 + f^3 P(f) on sqrt(1/2) <= 1 + f <= sqrt(2); 5.8e-9
LOG_P = (-0.0763449302, 0.127615756, -0.131601831, 0.142017582, -0.166233573, 0.200012269, -0.25000821, 0.333333317)
SQRT_HALF_BITS = 0x3F3504F3
# tanh(x) = x P(x^2) / Q(x^2) on |x| <= 9.01, where tanh rounds to 1; 2.1e-8
TANH_P = (1.33368621e-08, 2.05962848e-05, 0.00349481173, 0.133803722, 0.999999979)
TANH_Q = (7.76928897e-07, 0.000328436433, 0.0258740293, 0.467136876, 1.0)
TANH_LIMIT = 9.01
# erf(x) = x P(x^2) / Q(x^2) on |x| <= 3.85, where erf rounds to 1; 1.4e-8
ERF_P = (2.10827376e-06, 0.000285676339, 0.00367398751, 0.052479883, 0.187898993, 1.12837915)
ERF_Q = (3.87319349e-05, 0.00114551523, 0.0147850065, 0.1131295, 0.499854021, 1.0)
ERF_LIMIT = 3.85


def with_vector_math(func: Any) -> Any:
    """Rewrite the calls of a PrimFunc (float32 only; other types keep libm)."""

    def rewrite(call: Any) -> Any:
        formula = FORMULAS.get(getattr(call.op, "name", ""))
        if formula is None or str(call.ty) != FLOAT32:
            return call
        replacement = formula(*call.args)
        return call if replacement is None else replacement

    return func.with_body(tvm_ffi.structural_map(func.body, (ir.Call, rewrite)))


FLOAT32 = str(tirx.const(0.0, "float32").ty)


def let(value: Any, body: Callable[[Any], Any]) -> Any:
    """`body` of a name for `value`: the value is evaluated once, however often the body uses it."""
    name = tirx.Var("t", value.ty)
    return tirx.Let(name, value, body(name))


def number(value: float) -> Any:
    return tirx.const(value, "float32")


def integer(value: int) -> Any:
    return tirx.const(value, "int32")


def horner(coefficients: Sequence[float], x: Any) -> Any:
    value = number(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + number(coefficient)
    return value


def bits(value: Any) -> Any:
    return tirx.reinterpret("int32", value)


def power_of_two(exponent: Any) -> Any:
    """2^exponent for -127 < exponent < 128, by writing the exponent field."""
    return tirx.reinterpret("float32", tirx.shift_left(exponent + integer(127), integer(23)))


def exp(x: Any) -> Any:
    """exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2.

    2^n is applied in two factors, so that results down to the denormals and up to infinity come out right. Few nested
    names: TVM's simplifier substitutes their values, and takes exponentially long.
    """

    def whole(x: Any) -> Any:
        # A NaN becomes -104 here (converting it to an integer would be undefined) and comes back at the end
        value = let(clamp(x, -104.0, 89.0), reduced)
        return tirx.Select(x <= number(float("inf")), value, x)

    def reduced(x: Any) -> Any:
        # Conversion truncates. Adding and subtracting 1.5 * 2^23 would round too, but gets simplified away
        half = tirx.Select(x < number(0.0), number(-0.5), number(0.5))
        return let(
            tirx.Cast("int32", x * number(LOG2_E) + half), lambda n: let(remainder(x, n), lambda r: scaled(r, n))
        )

    def remainder(x: Any, n: Any) -> Any:
        n_float = tirx.Cast("float32", n)
        return x - n_float * number(LN2_HIGH) - n_float * number(LN2_LOW)

    def scaled(r: Any, n: Any) -> Any:
        half = tirx.shift_right(n, integer(1))
        return (r * r * horner(EXP_Q, r) + r + number(1.0)) * power_of_two(half) * power_of_two(n - half)

    return let(x, whole)


def clamp(x: Any, low: float, high: float) -> Any:
    """x within bounds; the lower one for a NaN."""
    return tirx.Select(x > number(low), tirx.Select(x < number(high), x, number(high)), number(low))


def log(x: Any) -> Any:
    """log(x) = e ln 2 + log(1 + f), x = 2^e (1 + f)."""

    def normal(value: Any, shift: Any) -> Any:
        return let(
            tirx.shift_right(bits(value) - integer(SQRT_HALF_BITS), integer(23)),
            lambda e: let(
                tirx.reinterpret("float32", bits(value) - tirx.shift_left(e, integer(23))) - number(1.0),
                lambda f: series(f, tirx.Cast("float32", e - shift)),
            ),
        )

    def series(f: Any, e: Any) -> Any:
        return let(
            e,
            lambda n: (
                f * f * f * horner(LOG_P, f) + n * number(LN2_LOW) - number(0.5) * (f * f) + f + n * number(LN2_HIGH)
            ),
        )

    def special(x: Any) -> Any:
        tiny = x < number(2.0**-126)  # denormals have no implicit leading bit: scale them up first
        finite = let(
            tirx.Select(tiny, x * number(2.0**23), x),
            lambda value: normal(value, tirx.Select(tiny, integer(23), integer(0))),
        )
        positive = tirx.Select(x < number(float("inf")), finite, x)  # infinity and NaN stay themselves
        at_most_zero = tirx.Select(x < number(0.0), number(float("nan")), number(float("-inf")))
        return tirx.Select(x <= number(0.0), at_most_zero, positive)

    return let(x, special)


def sigmoid(x: Any) -> Any:
    return number(1.0) / (number(1.0) + exp(number(0.0) - x))


def tanh(x: Any) -> Any:
    return odd_rational(x, TANH_P, TANH_Q, TANH_LIMIT)


def erf(x: Any) -> Any:
    return odd_rational(x, ERF_P, ERF_Q, ERF_LIMIT)


def odd_rational(x: Any, numerator: Sequence[float], denominator: Sequence[float], limit: float) -> Any:
    """x P(x^2) / Q(x^2), beyond +-limit as there; the rounding errors of the quotient must not carry it past +-1."""

    def ratio(x: Any) -> Any:
        return let(x * x, lambda square: x * horner(numerator, square) / horner(denominator, square))

    return let(within(x, limit), lambda x: within(ratio(x), 1.0))


def within(x: Any, limit: float) -> Any:
    """x or the nearer of +-limit; a NaN passes."""
    return let(
        x,
        lambda x: tirx.Select(x > number(limit), number(limit), tirx.Select(x < number(-limit), number(-limit), x)),
    )


def power(x: Any, exponent: Any) -> Any | None:
    """x^2, x^3, sqrt(x), ... for the constant exponents that models use; others keep libm."""
    if not isinstance(exponent, tirx.FloatImm):
        return None
    known = POWERS.get(exponent.value)
    return None if known is None else let(x, known)


POWERS: dict[float, Callable[[Any], Any]] = {
    -2.0: lambda x: number(1.0) / (x * x),
    -1.0: lambda x: number(1.0) / x,
    -0.5: lambda x: number(1.0) / tirx.sqrt(x),
    0.5: tirx.sqrt,
    1.0: lambda x: x,
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
    4.0: lambda x: (x * x) * (x * x),
}

FORMULAS: dict[str, Callable[..., Any]] = {
    "tirx.exp": exp,
    "tirx.log": log,
    "tirx.tanh": tanh,
    "tirx.erf": erf,
    "tirx.sigmoid": sigmoid,
    "tirx.pow": power,
}
