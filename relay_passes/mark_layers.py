"""Which layer a kernel is called for.

Kernels are shared between layers of the same shape, so their names do not tell. While a structured operator is
legalised, every call_tir that takes its place gets the layer's name as its source position, which all later passes
keep; `kernel_calls` reads the names off the lowered module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import ir, relax

from tvm_structured.dialect import PREFIX, LayerCall

MARK = f"{PREFIX}layer "  # source names that start so are ours, those of importers are not
CALLS = ("relax.call_tir", "relax.call_tir_inplace", "relax.call_dps_packed")


def marking(legalize: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """FLegalize that marks what `legalize` emits and returns."""

    def legalize_and_mark(builder: Any, call: Any) -> Any:
        unpacked = LayerCall.of(call)
        assert unpacked is not None
        return marked(legalize(_MarkingBuilder(builder, unpacked.layer), call), unpacked.layer)

    return legalize_and_mark


class _MarkingBuilder:
    """A BlockBuilder that marks what it emits."""

    def __init__(self, builder: Any, layer: str) -> None:
        self._builder, self._layer = builder, layer

    def emit(self, expr: Any, *args: Any, **named: Any) -> Any:
        return self._builder.emit(marked(expr, self._layer), *args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)


def marked(expr: Any, layer: str) -> Any:
    """The call with the layer's name; what is not a call of a kernel stays as it is."""
    if not is_kernel_call(expr):
        return expr
    span = ir.Span(ir.SourceName(MARK + layer), 0, 0, 0, 0)
    return relax.Call(expr.op, expr.args, expr.attrs, expr.ty_args, span)


def is_kernel_call(expr: Any) -> bool:
    return isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op) and expr.op.name in CALLS


def layer_of(call: Any) -> str:
    """The layer of a kernel's call, empty where it belongs to none."""
    source = call.span.source_name.name if call.span is not None else ""
    return source.removeprefix(MARK) if source.startswith(MARK) else ""


def kernel_calls(mod: Any) -> list[tuple[str, str]]:
    """(function symbol, layer) of every kernel call of a lowered module, in order."""
    calls: list[tuple[str, str]] = []

    def visit(call: Any) -> None:
        if is_kernel_call(call):
            callee = call.args[0]
            symbol = callee.name_hint if isinstance(callee, ir.GlobalVar) else callee.global_symbol
            calls.append((str(symbol), layer_of(call)))

    for _, function in mod.functions_items():
        if isinstance(function, relax.Function):
            tvm_ffi.structural_walk(function, (ir.Call, visit))
    return calls
