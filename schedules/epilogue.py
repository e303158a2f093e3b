"""The end of every kernel: scale, bias, residual and activation, then the store."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Epilogue, Extent
from tvm_structured.schedules.emit import Emitter, arg
from tvm_structured.schedules.exponential import exp_below_zero
from tvm_structured.schedules.vector_math import ERF_LIMIT, ERF_P, ERF_Q, horner


class RowWriter:
    """Writes y (rows, out), features in lanes. Declares the epilogue's operands and y as parameters."""

    def __init__(self, emitter: Emitter, epilogue: Epilogue, rows: Extent, out: int) -> None:
        self.emitter, self.epilogue, self.out = emitter, epilogue, out
        self.scale = arg("scale", (out,)) if epilogue.scale else None
        self.bias = arg("bias", (out,)) if epilogue.bias else None
        self.residual = arg("residual", (rows, out)) if epilogue.residual else None
        self.y = arg("y", (rows, out))

    @classmethod
    def onto(cls, emitter: Emitter, buffer: Any, out: int) -> RowWriter:
        """A writer without an epilogue onto a buffer that exists, (rows, out): one stage of several."""
        writer = cls.__new__(cls)
        writer.emitter, writer.epilogue, writer.out = emitter, Epilogue(), out
        writer.scale = writer.bias = writer.residual = None
        writer.y = buffer
        return writer

    def store(self, value: Any, row: Any, feature: Any, masked: bool = False, limit: Extent | None = None) -> None:
        """Store `lanes` features of a row; with `masked` only those below `out`, with `limit` those below that."""
        e = self.emitter
        masked = masked or limit is not None
        mask = e.bind_mask(feature, self.out if limit is None else limit) if masked else None

        def operand(buffer: Any, *index: Any) -> Any:
            return e.load_masked(buffer, mask, *index) if masked else e.load(buffer, *index)

        if self.scale is not None:
            value = value * operand(self.scale, feature)
        if self.bias is not None:
            value = value + operand(self.bias, feature)
        if self.residual is not None:
            value = value + operand(self.residual, row, feature)
        value = activate(e, self.epilogue, value)
        if masked:
            e.store_masked(self.y, value, mask, row, feature)
        else:
            e.store(self.y, value, row, feature)


def activate(e: Emitter, epilogue: Epilogue, value: Any) -> Any:
    """The activation of a vector."""
    match epilogue.activation:
        case "none":
            return value
        case "relu":
            return I.max(value, e.splat(0.0))
        case "clip":
            return I.min(I.max(value, e.splat(epilogue.low)), e.splat(epilogue.high))
        case "gelu":
            value = e.bind(value)
            return value * e.splat(0.5) * (e.splat(1.0) + erf(e, value * e.splat(2**-0.5)))
        case "gelu_tanh":
            value = e.bind(value)
            inner = (value + value * value * value * e.splat(0.044715)) * e.splat(2 * (2 / math.pi) ** 0.5)
            return value * sigmoid(e, inner)  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        case "silu":
            value = e.bind(value)
            return value * sigmoid(e, value)
    raise ValueError(f"unknown activation {epilogue.activation!r}; one of {Epilogue.ACTIVATIONS}")


def sigmoid(e: Any, value: Any) -> Any:
    """1 / (1 + exp(-x)) = t / (1 + t) with t = exp(x) for x < 0, by symmetry else 1 / (1 + t), t = exp(-x)."""
    x = e.bind(value)
    small = e.bind(exp_below_zero(e, I.min(x, e.splat(0.0) - x)))
    return tirx.Select(x < e.splat(0.0), small, e.splat(1.0)) / (small + e.splat(1.0))


def erf(e: Emitter, value: Any) -> Any:
    """Error function of a vector, by the fit of `vector_math`; rounding must not carry the quotient past +-1."""

    def within(x: Any, limit: float) -> Any:
        return I.min(I.max(x, e.splat(-limit)), e.splat(limit))

    x = e.bind(within(value, ERF_LIMIT))
    square = e.bind(x * x)
    return within(x * horner(ERF_P, square) / horner(ERF_Q, square), 1.0)
