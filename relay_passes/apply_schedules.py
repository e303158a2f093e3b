"""Every PrimFunc that is not scheduled yet  -->  its tuned record, otherwise a default schedule

A function that only gives its input another shape becomes `R.reshape`, which moves no data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax, s_tir, tirx
from tvm.ir import IRModule
from tvm.ir.transform import PassContext, module_pass
from tvm.target import Target

from tvm_structured.schedules.cuda.fallback import with_gpu_schedules
from tvm_structured.schedules.fallback import default_schedule
from tvm_structured.schedules.producers import inline_producers
from tvm_structured.schedules.vector_math import with_vector_math

SCHEDULED = "tirx.is_scheduled"


@module_pass(opt_level=0, name="ApplySchedules")
class ApplySchedules:
    """Schedules for the CPU or GPU of the enclosing `with target:`. `database` is a MetaSchedule database or None."""

    def __init__(self, database: Any = None) -> None:
        self.database = database

    def transform_module(self, mod: Any, _: PassContext) -> Any:
        target = Target.current(allow_none=True)
        if target is None or not {"cpu", "cuda"}.intersection(target.keys):
            return mod
        mod = updated(mod, lambda func: tuned(self.database, func, target))
        # TVM recognises a view by its loops, so before they are scheduled
        mod = relax.transform.RewriteDataflowReshape()(updated(mod, as_view))
        mod = relax.transform.DeadCodeElimination()(mod)
        if "cuda" in target.keys:
            return with_gpu_schedules(mod)
        return updated(mod, lambda func: scheduled(default_schedule(func, target)))


def updated(mod: Any, replace: Callable[[Any], Any | None]) -> Any:
    """The module with every unscheduled PrimFunc replaced; None keeps it."""
    functions = dict(mod.functions_items())
    for name, func in functions.items():
        if isinstance(func, tirx.PrimFunc) and not is_scheduled(func):
            functions[name] = replace(func) or func
    return IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def is_scheduled(func: Any) -> bool:
    return bool(func.attrs is not None and func.attrs.get(SCHEDULED, False))


def scheduled(func: Any | None) -> Any | None:
    """Marked, so that nobody schedules it again."""
    return None if func is None else func.with_attr(SCHEDULED, True)


def tuned(database: Any, func: Any, target: Any) -> Any | None:
    """The function as the best record for this very target has it, None without one."""
    if database is None:
        return None
    workload = IRModule({"main": func.with_attr("global_symbol", "main")})  # the name under which MetaSchedule files it
    record = database.query_tuning_record(workload, target, "main")
    if record is None or str(record.target) != str(target):  # the query itself does not look at the target
        return None
    schedule = s_tir.Schedule(workload)
    record.trace.apply_to_schedule(schedule, remove_postproc=False)
    result = with_vector_math(schedule.mod["main"])
    symbol = func.attrs.get("global_symbol") if func.attrs is not None else None
    result = result.without_attr("global_symbol") if symbol is None else result.with_attr("global_symbol", symbol)
    return scheduled(result)


def as_view(func: Any) -> Any | None:
    """reshape(broadcast(x)) in one block, if that is a view; FuseTIR writes a block for each operator."""
    if not isinstance(func.body, s_tir.SBlockRealize):
        return None
    schedule = s_tir.Schedule(func)
    inline_producers(schedule)
    merged = schedule.mod["main"]
    return merged if relax.analysis.has_reshape_pattern(merged) else None
