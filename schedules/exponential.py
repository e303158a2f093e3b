"""exp of vector registers, for kernels that are emitted."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.emit import Emitter
from tvm_structured.schedules.vector_math import EXP_Q, LN2_HIGH, LN2_LOW, LOG2_E

SMALLEST = -87.3  # below it exp is no normal float32, and becomes 0


def exp_below_zero(e: Any, x: Any) -> Any:
    """exp(x) for x <= 0 with a relative error below 4e-7; results below 1.2e-38 are 0, NaN stays NaN.
    `e` is an Emitter; one of a single lane leaves it to libm.

    exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2, as in `vector_math`.
    """
    if e.lanes == 1:
        return tirx.exp(x)
    x = e.bind(x)
    # n of what is clamped: an integer has no NaN, while r and so the result have
    exponent = I.max(x, e.splat(SMALLEST)) * e.splat(LOG2_E) - e.splat(0.5)  # conversion truncates, upwards here
    n = bound_integer(e, tirx.Cast(f"int32x{e.lanes}", exponent))
    n_float = e.bind(tirx.Cast(e.dtype, n))
    r = e.bind(x - n_float * e.splat(LN2_HIGH) - n_float * e.splat(LN2_LOW))
    tail = e.splat(EXP_Q[0])
    for coefficient in EXP_Q[1:]:
        tail = tail * r + e.splat(coefficient)
    power = tirx.reinterpret(e.dtype, tirx.shift_left(n + whole(e, 127), whole(e, 23)))
    value = ((tail * r) * r + r + e.splat(1.0)) * power
    return tirx.Select(x < e.splat(SMALLEST), e.splat(0.0), value)


def bound_integer(e: Emitter, value: Any) -> Any:
    """Evaluate once, through a stack slot (see `Emitter.bind`)."""
    slot = I.alloc_buffer((1,), f"int32x{e.lanes}")
    I.buffer_store(slot, value, [0])
    return slot[0]


def whole(e: Emitter, value: int) -> Any:
    return I.broadcast(I.int32(value), e.lanes)
