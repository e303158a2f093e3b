"""From a scheduled function with blocks to plain loops without edge conditions in their bodies.

A default schedule splits loops without asking whether the factor divides the extent (`tile`). The condition that
guards the last, partial tile would keep the loops from becoming vector code. `lower_loops` cuts the loops instead:
full tiles without a condition, then the rest.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.ir import IRModule
from tvm.ir.transform import PassContext, Sequential

from tvm_structured.schedules.nest import conjuncts, substitute, uses

PARTITION = "pragma_loop_partition_hint"  # TVM's LoopPartition reads it
STACK_BYTES = 1 << 14
SHORT_LOOPS = (tirx.ForKind.VECTORIZED, tirx.ForKind.UNROLLED)


def tile(sch: Any, loop: Any, factor: int) -> tuple[Any, Any]:
    """Split a loop; where the factor may not divide it, mark it to be cut into full tiles and the rest."""
    before = sch.get(loop)
    is_marked = PARTITION in before.annotations
    if is_marked:
        sch.unannotate(loop, PARTITION)  # loops with annotations cannot be split
    outer, inner = sch.split(loop, [None, factor])
    if is_marked or not isinstance(before.extent, tirx.IntImm) or int(before.extent) % factor:
        partition(sch, outer, inner)
    return outer, inner


def partition(sch: Any, *loops: Any) -> None:
    """Mark loops to be cut where a condition of their body changes."""
    for loop in loops:
        if PARTITION not in sch.get(loop).annotations:
            sch.annotate(loop, PARTITION, 1)


def lower_loops(func: Any) -> Any:
    """A scheduled PrimFunc --> the same without blocks, its marked loops cut.

    TVM's own pipeline has these passes too, but narrows loop variables to 32 bits before LoopPartition, which then no
    longer finds the marks of 64-bit loops (TVM 0.27).
    """
    passes = s_tir.transform
    lower = Sequential(
        [
            passes.LowerInitBlock(),
            passes.PlanAndUpdateBufferAllocationLocation(),
            passes.ConvertBlocksToOpaque(),
            passes.CompactBufferAllocation(),
            passes.LowerMatchBuffer(),
            passes.StmtSimplify(),
            passes.LowerOpaqueBlock(),
            passes.LoopPartition(),
            passes.StmtSimplify(),
            tirx.transform.RemoveNoOp(),
        ]
    )
    # A loop of one iteration stays a loop: LoopPartition puts a 32-bit 0 for its variable, among 64-bit indices
    with PassContext(config={"s_tir.LoopPartition": {"no_unroll_loop_with_extent_one": True}}):
        lowered = lower(IRModule({"main": func}))["main"]
    for kind, rewrite in ((tirx.For, shorten), (tirx.For, whole_vectors), (tirx.AllocBuffer, on_stack)):
        lowered = lowered.with_body(tvm_ffi.structural_map(lowered.body, (kind, rewrite)))
    # Pieces repeat names which their bodies bind
    finish = Sequential([tirx.transform.ConvertSSA(), passes.StmtSimplify()])
    lowered = finish(IRModule({"main": lowered}))["main"]
    # Relax's RewriteDataflowReshape insists on a block around the body
    root = s_tir.SBlock([], [], [], "root", lowered.body)
    return lowered.with_body(s_tir.SBlockRealize([], True, root))


def shorten(loop: Any) -> Any:
    """for v in unroll(4): if base + v < n: ...  -->  for v in range(min(4, n - base)): ...

    What LoopPartition leaves of a tile of symbolic size. A condition on other variables moves out of the loop.
    """
    guard = loop.body
    if loop.kind not in SHORT_LOOPS or not isinstance(guard, tirx.IfThenElse) or guard.else_case is not None:
        return loop
    extent, kind, outside = loop.extent, loop.kind, []
    for condition in conjuncts(guard.condition):
        if not uses(condition, [loop.loop_var]):
            outside.append(condition)
            continue
        bound = upper_bound(condition, loop.loop_var)
        if bound is None:
            return loop
        extent, kind = tirx.min(extent, bound), tirx.ForKind.SERIAL
    body = tirx.For(loop.loop_var, loop.min, extent, kind, guard.then_case)
    for condition in outside:
        body = tirx.IfThenElse(condition, body, None)
    return body


def upper_bound(condition: Any, variable: Any) -> Any | None:
    """b where the condition says variable < b, else None."""
    if not isinstance(condition, tirx.LT):
        return None
    coefficients = sym.detect_linear_equation(condition.b - condition.a, [variable])
    return coefficients[1] if coefficients and sym.Analyzer().can_prove_equal(coefficients[0], -1) else None


def whole_vectors(loop: Any) -> Any:
    """A vector loop of 13 --> vector loops of 8 and 4, and one iteration.

    LLVM keeps vectors of other sizes than powers of two in memory.
    """
    if loop.kind not in SHORT_LOOPS:
        return loop
    if not isinstance(loop.extent, tirx.IntImm):  # TVM neither unrolls nor vectorises it; LLVM may
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)
    if loop.kind == tirx.ForKind.UNROLLED:
        return loop
    rest, start, pieces = int(loop.extent), 0, []
    while rest:
        size = 1 << (rest.bit_length() - 1)
        pieces.append(piece_of(loop, start, size))
        start, rest = start + size, rest - size
    return loop if len(pieces) == 1 else tirx.SeqStmt(pieces)


def piece_of(loop: Any, start: int, size: int) -> Any:
    """Iterations start ... start + size - 1 of a vector loop."""
    first = tirx.const(start, "int64")
    variable = tirx.Var(loop.loop_var.name, "int64")
    body = substitute(loop.body, [(loop.loop_var, first if size == 1 else variable + first)])
    return body if size == 1 else tirx.For(variable, loop.min, tirx.const(size, "int64"), loop.kind, body)


def on_stack(allocation: Any) -> Any:
    """Small buffers on the stack: TVM moves 1 KiB and more to the heap, one call for each row."""
    buffer = allocation.buffer
    size = buffer.dtype.itemsize
    for extent in buffer.shape:
        size = size * int(extent) if isinstance(extent, tirx.IntImm) else STACK_BYTES + 1
    if size > STACK_BYTES:
        return allocation
    return tirx.AllocBuffer(buffer, annotations={**allocation.annotations, "disable_lower_builtin": True})
