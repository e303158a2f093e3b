"""The conditions under which blocks run, where TensorIR's `compute_at` loses them or makes them unreadable (TVM 0.27).

They are set last of all: primitives refuse blocks whose condition they cannot take apart.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis.common_analysis import get_sblockrealize

from tvm_structured.schedules.nest import substitute

Predicate = tuple[Any, list[Any]]  # condition over loop variables, iteration variables' values


def predicate_of(sch: Any, block: Any) -> Predicate | None:
    """The condition of a block, to be given back after `compute_at` has moved it; None if it always runs."""
    realize = get_sblockrealize(sch, block)
    return None if isinstance(realize.predicate, tirx.IntImm) else (realize.predicate, list(realize.iter_values))


def restore_predicate(sch: Any, block: Any, predicate: Predicate) -> None:
    """Let a block that has moved run under its old condition, expressed in its new loops."""
    condition, old_values = predicate
    realize = get_sblockrealize(sch, block)
    condition = substitute(condition, list(zip(old_values, realize.iter_values, strict=True)))
    if not isinstance(realize.predicate, tirx.IntImm):
        condition = tirx.And(realize.predicate, condition)
    set_predicate(sch, block, condition)


def bound_by_extents(sch: Any, block: Any) -> None:
    """Let a block run where its iteration variables are within their extents, and ask for nothing else.

    What `compute_at` derives for symbolic extents is true, but too involved to be simplified again.
    """
    realize = get_sblockrealize(sch, block)
    condition: Any = tirx.const(True, "bool")
    for iteration, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
        condition = tirx.And(condition, value < iteration.dom.extent)
    set_predicate(sch, block, condition)


def set_predicate(sch: Any, block: Any, condition: Any) -> None:
    realize, innermost = get_sblockrealize(sch, block), sch.get_loops(block)[-1]
    old = sch.get(innermost)
    body = s_tir.SBlockRealize(realize.iter_values, condition, realize.block)
    loop = tirx.For(old.loop_var, old.min, old.extent, old.kind, body, old.thread_binding, old.annotations)
    sch.state.replace(sch.get_sref(innermost), loop, {})
