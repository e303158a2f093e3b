"""A module of one layer alone, to measure it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm_structured.dialect import LayerCall, static_shape

SYMBOLIC_BATCH = 8  # a batch that is known at run time only is measured at this size


def alone(call: LayerCall, copies: int = 1) -> tuple[Any, list[tuple[int, ...]]]:
    """A module of one call, `copies` times, whose x and residual are inputs; and the inputs' shapes."""
    from tvm import relax

    dtype = str(call.x.ty.dtype)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(concrete(call.x), dtype))
    inputs, operands = [x], []
    for name, value in zip(call.epilogue.operands, call.operands, strict=True):
        if name == "residual":
            value = relax.Var("residual", relax.TensorType(concrete(value), dtype))
            inputs.append(value)
        operands.append(value)
    with builder.function("main", inputs):
        with builder.dataflow():
            results = [builder.emit(replace(call, x=x, operands=tuple(operands)).to_relax()) for _ in range(copies)]
            y = builder.emit_output(results[0] if copies == 1 else relax.Tuple(results))
        builder.emit_func_output(y)
    return builder.get(), [concrete(var) for var in inputs]


def concrete(x: Any) -> tuple[int, ...]:
    """The shape, with SYMBOLIC_BATCH where an extent is not known."""
    return tuple(extent if isinstance(extent, int) else SYMBOLIC_BATCH for extent in static_shape(x) or ())
