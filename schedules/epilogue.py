"""The end of every kernel: scale, bias, residual and activation, then the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Epilogue, Extent
from tvm_structured.schedules.emit import Emitter, arg

# erf(x) = x P(x^2) / Q(x^2) on [-4, 4]: the usual minimax coefficients for float32, highest power first
ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


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

    def store_scalar(self, value: Any, row: Any, feature: Any) -> None:
        """The same for one feature; for ragged edges."""
        if self.scale is not None:
            value = value * self.scale[feature]
        if self.bias is not None:
            value = value + self.bias[feature]
        if self.residual is not None:
            value = value + self.residual[row, feature]
        I.buffer_store(self.y, activate(ScalarEmitter(), self.epilogue, value), [row, feature])


class ScalarEmitter:
    """The part of `Emitter` that `activate` needs, with one lane."""

    def splat(self, value: float) -> Any:
        return I.float32(float(value))

    def bind(self, value: Any) -> Any:
        return I.Bind(value)


def activate(e: Any, epilogue: Epilogue, value: Any) -> Any:
    """The activation of a vector (or, with ScalarEmitter, of a number)."""
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
    raise ValueError(f"unknown activation {epilogue.activation!r}; one of {Epilogue.ACTIVATIONS}")


def erf(e: Any, value: Any) -> Any:
    """Error function by a rational minimax approximation; absolute error below 4e-7."""
    x = e.bind(I.min(I.max(value, e.splat(-4.0)), e.splat(4.0)))
    square = e.bind(x * x)
    return x * horner(e, ERF_P, square) / horner(e, ERF_Q, square)


def horner(e: Any, coefficients: Sequence[float], x: Any) -> Any:
    value = e.splat(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + e.splat(coefficient)
    return value
