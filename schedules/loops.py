"""From a scheduled function with blocks to plain loops without edge conditions in their bodies.

A default schedule splits loops without asking whether the factor divides the extent, and marks both halves with
`tile`. The condition that guards the last, partial tile would keep the whole loop from becoming vector code.
`lower_loops` cuts the loop in two instead: full tiles without the condition, then the rest.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import IRModule
from tvm.ir.transform import Sequential

PARTITION = "pragma_loop_partition_hint"  # TVM's LoopPartition reads it


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
    lowered = lower(IRModule({"main": func}))["main"]
    whole = lowered.with_body(tvm_ffi.structural_map(lowered.body, (tirx.For, whole_vectors)))
    # The pieces repeat names which their bodies bind
    finish = Sequential([tirx.transform.ConvertSSA(), passes.StmtSimplify()])
    return finish(IRModule({"main": whole}))["main"]


def whole_vectors(loop: Any) -> Any:
    """A vector loop of 13 --> vector loops of 8 and 4, and one iteration.

    LLVM keeps vectors of other sizes than powers of two in memory.
    """
    if loop.kind != tirx.ForKind.VECTORIZED or not isinstance(loop.extent, tirx.IntImm):
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
    index = first if size == 1 else variable + first
    body = tvm_ffi.structural_map(
        loop.body, (tirx.Var, lambda each: index if each.same_as(loop.loop_var) else each)
    )
    return body if size == 1 else tirx.For(variable, loop.min, tirx.const(size, "int64"), loop.kind, body)
