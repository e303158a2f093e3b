"""exp, log, tanh, erf, sigmoid and pow as arithmetic, so that LLVM vectorises the loops that contain them.

TVM lowers each of these functions to one call of libm for every element. The formulas below use only operations that
have vector instructions. Their relative error is below 3e-7 (a few units in the last place), over the whole range of
float32, and infinities, NaN and overflow behave as in libm. Coefficients: weighted minimax fits by Lawson's iteration
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
# tanh(x) = x + x^3 P(x^2) on |x| <= 0.625; 4.4e-9
TANH_P = (-0.00570498743, 0.0206390877, -0.0537397152, 0.133314422, -0.333332819)
# erf(x) = x P(x^2) on |x| <= 0.9; 1.2e-8
ERF_P = (-0.0006090398, 0.00501197135, -0.0267789159, 0.112821411, -0.376125233, 1.12837915)
# erf(x) = 1 - exp(-x G(x)) on 0.9 <= x <= 3.95, where erf rounds to 1; 3.1e-9
ERF_G = (-0.000214595009, 0.00321997539, -0.0229060308, 0.105286854, 0.635699368, 1.12851995)


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


def with_sign_of(x: Any, magnitude: Any) -> Any:
    return tirx.reinterpret("float32", bits(magnitude) | (bits(x) & integer(-0x80000000)))


def exp(x: Any) -> Any:
    """exp(x) over the whole range: 2^n is applied in two factors, so that denormals and infinity come out right."""

    def whole(x: Any) -> Any:
        # A NaN becomes -104 here (converting it to an integer would be undefined) and comes back at the end
        half = tirx.Select(x < number(0.0), number(-0.5), number(0.5))
        value = let(clamp(x, -104.0, 89.0), lambda clamped: exp_bounded(clamped, half, two_factors))
        return tirx.Select(x <= number(float("inf")), value, x)

    def two_factors(value: Any, n: Any) -> Any:
        half = tirx.shift_right(n, integer(1))
        return value * power_of_two(half) * power_of_two(n - half)

    return let(x, whole)


def one_factor(value: Any, n: Any) -> Any:
    return value * power_of_two(n)


def exp_bounded(x: Any, half: Any, scaled: Callable[[Any, Any], Any] = one_factor) -> Any:
    """exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2, for |x| < 87; `half` is 0.5 with the sign of x.

    x is read several times. Few nested names: TVM's simplifier substitutes their values, and takes exponentially long.
    """

    def reduced(n: Any) -> Any:
        n_float = tirx.Cast("float32", n)
        r = x - n_float * number(LN2_HIGH) - n_float * number(LN2_LOW)
        return let(r, lambda r: scaled(r * r * horner(EXP_Q, r) + r + number(1.0), n))

    # Conversion truncates. Adding and subtracting 1.5 * 2^23 would round too, but gets simplified away
    return let(tirx.Cast("int32", x * number(LOG2_E) + half), reduced)


def clamp(x: Any, low: float, high: float) -> Any:
    """x within bounds; `low` for a NaN."""
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
    """x + x^3 P(x^2) near zero, 1 - 2 / (exp(2|x|) + 1) beyond."""

    def whole(x: Any) -> Any:
        near = let(x * x, lambda square: x + x * square * horner(TANH_P, square))
        double = tirx.min(tirx.abs(x) * number(2.0), number(20.0))
        far = let(double, lambda z: number(1.0) - number(2.0) / (exp_bounded(z, number(0.5)) + number(1.0)))
        # NaN: min has made `far` finite, and the comparison takes `near`
        return tirx.Select(tirx.abs(x) >= number(0.625), with_sign_of(x, far), near)

    return let(x, whole)


def erf(x: Any) -> Any:
    """x P(x^2) near zero, 1 - exp(-|x| G(|x|)) beyond."""

    def whole(x: Any) -> Any:
        near = let(x * x, lambda square: x * horner(ERF_P, square))
        exponent = let(tirx.min(tirx.abs(x), number(3.95)), lambda size: number(0.0) - size * horner(ERF_G, size))
        far = let(exponent, lambda z: number(1.0) - exp_bounded(z, number(-0.5)))
        return tirx.Select(tirx.abs(x) >= number(0.9), with_sign_of(x, far), near)

    return let(x, whole)


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
