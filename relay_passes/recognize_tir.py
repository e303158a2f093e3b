"""call_tir(pad | maximum | minimum | einsum, ...)  -->  the Relax operator it was made from

The ONNX importer writes some operators as TensorIR. A function is recognised only where it equals, structurally,
what TVM's own definition of the operator generates for these arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm_ffi
from tvm import ir, relax, tirx, topi

from tvm_structured.dialect import static_shape
from tvm_structured.relay_passes.expressions import op_name, same_extent, shape_of

Candidate = tuple[tuple[Any, ...], Any]  # (TE function, *its arguments), the Relax call


def recognize(mod: Any, call: Any) -> Any | None:
    """The Relax call (without a type) that a call_tir stands for, else None."""
    if op_name(call) != "relax.call_tir":
        return None
    function, arguments = mod[call.args[0]], list(call.args[1].fields)
    for stem, candidates in CANDIDATES.items():
        if not call.args[0].name_hint.startswith(stem):  # the importer's names; saves generating all candidates
            continue
        for (generator, *values), meaning in candidates(function, arguments, call):
            if is_generated_by(function, generator, values):
                return meaning
    return None


def is_generated_by(function: Any, generator: Any, arguments: list[Any]) -> bool:
    """Whether a PrimFunc is what a TE generator makes of these arguments."""
    builder = relax.BlockBuilder()
    call = builder.call_te(generator, *arguments)
    return bool(tvm_ffi.structural_equal(function, builder.get()[call.args[0]]))


def bound_candidates(generator: Any, operator: Any) -> Any:
    """maximum or minimum: with two tensors, or with the bound written into the function (before opset 11)."""

    def candidates(function: Any, arguments: list[Any], call: Any) -> Iterator[Candidate]:
        if len(arguments) == 2:
            yield (generator, *arguments), operator(*arguments)
        elif len(arguments) == 1:
            dtype = str(arguments[0].ty.dtype)
            for value in float_constants(function):
                yield (generator, arguments[0], value), operator(arguments[0], relax.const(value, dtype))

    return candidates


def pad_candidates(function: Any, arguments: list[Any], call: Any) -> Iterator[Candidate]:
    """Constant padding; only its amounts, which the index of the only read tells, are unknown."""
    shape, padded = static_shape(arguments[0]), static_shape(call)
    if len(arguments) != 1 or shape is None or padded is None:
        return
    before = [int(index.b) if isinstance(index, tirx.Sub) else 0 for index in load_indices(function, len(shape))]
    after = [extent_difference(p, s, b) for p, s, b in zip(padded, shape, before, strict=False)]
    if len(before) != len(shape) or any(a is None or a < 0 for a in after):
        return
    widths = [width for pair in zip(before, after, strict=True) for width in pair]
    yield (topi.nn.pad, arguments[0], before, after, 0.0), relax.op.nn.pad(arguments[0], widths)


def extent_difference(padded: Any, extent: Any, before: int) -> int | None:
    if isinstance(padded, int) and isinstance(extent, int):
        return padded - extent - before
    return 0 if before == 0 and same_extent(padded, extent) else None


def einsum_candidates(function: Any, arguments: list[Any], call: Any) -> Iterator[Candidate]:
    """The last axis of one operand against either axis of a matrix, in either order of the operands."""
    if len(arguments) != 2:
        return
    for matrix, x in ((1, 0), (0, 1)):
        if arguments[matrix].ty.ndim != 2 or arguments[x].ty.ndim < 1:
            continue
        lead = "abcdefgh"[: arguments[x].ty.ndim - 1]
        for letters in ("oi", "io"):
            if not same_extent(shape_of(arguments[x])[-1], shape_of(arguments[matrix])[letters.index("i")]):
                continue
            terms = [lead + "i", letters] if matrix == 1 else [letters, lead + "i"]
            equation = f"{','.join(terms)}->{lead}o"
            yield (topi.einsum, equation, *arguments), relax.op.einsum(tuple(arguments), equation)


def load_indices(function: Any, rank: int) -> list[Any]:
    """Indices of the first read of that rank."""
    loads: list[Any] = []
    tvm_ffi.structural_walk(function.body, (ir.TensorLoad, loads.append))
    return next((list(load.indices) for load in loads if len(load.indices) == rank), [])


def float_constants(function: Any) -> list[float]:
    found: list[float] = []
    tvm_ffi.structural_walk(function.body, (tirx.FloatImm, lambda node: found.append(float(node.value))))
    return sorted(set(found))


CANDIDATES: dict[str, Any] = {
    "maximum": bound_candidates(topi.maximum, relax.op.maximum),
    "minimum": bound_candidates(topi.minimum, relax.op.minimum),
    "pad": pad_candidates,
    "einsum": einsum_candidates,
}
