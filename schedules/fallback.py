"""Default CPU schedules for everything that is not a structured operator: the first rule that takes a function wins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import s_tir
from tvm.error import InternalError

from tvm_structured.schedules import injective, matmul, reduction
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.loops import lower_loops
from tvm_structured.schedules.producers import open_schedule
from tvm_structured.schedules.vector_math import with_vector_math

Rule = Callable[[Any, Any], Any]  # (PrimFunc, Target) -> Schedule, or None: not mine


def default_schedule(func: Any, target: Any) -> Any | None:
    """The scheduled function, lowered to loops; None where no rule takes it."""
    for rule in RULES:
        schedule = attempt(rule, func, target)
        if schedule is not None:
            return lower_loops(with_vector_math(schedule.mod["main"]))
    return None


def attempt(rule: Rule, func: Any, target: Any) -> Any | None:
    """A rule's answer, None also where TVM refused.

    Whether a primitive applies is often known only to the primitive, which then raises; a few (rfactor) have gaps in
    these checks and end in an InternalError. Rules work on a copy, so the function is as it was.
    """
    try:
        return rule(func, target)
    except (s_tir.ScheduleError, InternalError):
        return None


def apply(func: Any, target: Any) -> Any | None:
    """Each block by itself, its outer loops parallel."""
    opened = open_schedule(func)
    if opened is None:
        return None
    for nest in opened[1]:
        reduction.schedule_alone(nest, Cpu.of(target))
    return opened[0]


def apply_outermost(func: Any, target: Any) -> Any | None:
    """Threads over the first loop of each block where that is legal; nothing else is touched."""
    if not isinstance(func.body, s_tir.SBlockRealize):
        return None
    sch = s_tir.Schedule(func)
    for block in sch.get_child_blocks(sch.get_sblock(func.body.block.name_hint)):
        loops = sch.get_loops(block)
        if loops:
            sch.parallel(loops[0])
    return sch


RULES: tuple[Rule, ...] = (injective.apply, matmul.apply, reduction.apply, apply, apply_outermost)
