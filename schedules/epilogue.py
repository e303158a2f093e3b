"""The end of every kernel: scale, bias, residual and activation, then the store."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Epilogue, Extent
from tvm_structured.schedules.emit import Emitter, arg
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
    raise ValueError(f"unknown activation {epilogue.activation!r}; one of {Epilogue.ACTIVATIONS}")


def erf(e: Emitter, value: Any) -> Any:
    """Error function of a vector, by the fit of `vector_math`; rounding must not carry the quotient past +-1."""

    def within(x: Any, limit: float) -> Any:
        return I.min(I.max(x, e.splat(-limit)), e.splat(limit))

    x = e.bind(within(value, ERF_LIMIT))
    square = e.bind(x * x)
    return within(x * horner(ERF_P, square) / horner(ERF_Q, square), 1.0)
