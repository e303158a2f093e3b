"""Every PrimFunc that is not scheduled yet  -->  its tuned record, otherwise a default schedule

A function that only views its input in another shape becomes `R.reshape`, which moves no data.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, s_tir, tirx
from tvm.ir import IRModule
from tvm.ir.transform import PassContext, module_pass
from tvm.target import Target

from tvm_structured.schedules.fallback import default_schedule
from tvm_structured.schedules.producers import inline_producers
from tvm_structured.schedules.vector_math import with_vector_math

SCHEDULED = "tirx.is_scheduled"


@module_pass(opt_level=0, name="ApplySchedules")
class ApplySchedules:
    """Schedules for the target of the enclosing `with target:`; `database` is a MetaSchedule database or None."""

    def __init__(self, database: Any = None) -> None:
        self.database = database

    def transform_module(self, mod: Any, _: PassContext) -> Any:
        target = Target.current(allow_none=True)
        if target is None or "cpu" not in target.keys:
            return mod
        mod = updated(mod, lambda func: tuned_schedule(self.database, func, target))
        # Before any default schedule: TVM recognises a view by its loops
        mod = updated(mod, merge_movements)
        mod = relax.transform.RewriteDataflowReshape()(mod)
        mod = relax.transform.DeadCodeElimination()(mod)
        return updated(mod, lambda func: mark(default_schedule(func, target)))


def updated(mod: Any, schedule: Any) -> Any:
    """The module with every unscheduled PrimFunc replaced by what `schedule` makes of it; None keeps it."""
    functions = {}
    for name, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc) and not is_scheduled(func):
            replacement = schedule(func)
            if replacement is not None:
                functions[name] = replacement
    result = mod.clone() if hasattr(mod, "clone") else IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for name, func in functions.items():
        result[name] = func
    return result


def is_scheduled(func: Any) -> bool:
    return bool(func.attrs is not None and func.attrs.get(SCHEDULED, False))


def mark(func: Any) -> Any | None:
    return None if func is None else func.with_attr(SCHEDULED, True)


def tuned_schedule(database: Any, func: Any, target: Any) -> Any | None:
    """The function as the best record for this very target has it."""
    if database is None:
        return None
    workload = IRModule({"main": func.with_attr("global_symbol", "main")})  # the name under which MetaSchedule files it
    record = database.query_tuning_record(workload, target, "main")
    if record is None or str(record.target) != str(target):  # the query itself ignores the target
        return None
    schedule = s_tir.Schedule(workload)
    record.trace.apply_to_schedule(schedule, remove_postproc=False)
    tuned = with_vector_math(schedule.mod["main"]).without_attr("global_symbol")
    name = func.attrs.get("global_symbol") if func.attrs is not None else None
    return mark(tuned if name is None else tuned.with_attr("global_symbol", name))


def merge_movements(func: Any) -> Any | None:
    """A function of which one block is left when all others are inlined: reshape(broadcast(x)) may be a view."""
    if not isinstance(func.body, s_tir.SBlockRealize):
        return None
    schedule = s_tir.Schedule(func)
    inline_producers(schedule)
    merged = schedule.mod["main"]
    is_view = relax.analysis.has_reshape_pattern(merged)
    return merged if is_view else None
