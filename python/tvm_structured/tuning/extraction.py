"""model --> tasks: every kernel of every form that a layer may take, and the functions that have no kernel.

A form that loses before tuning may win after it, so not only the chosen one is tuned; one that is far behind is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm_structured.costs import Prices, weights_are_cold, with_structure
from tvm_structured.detection_store import DetectionStore
from tvm_structured.guard import candidates, keep_dense
from tvm_structured.planning import Plan
from tvm_structured.structures import Structure, as_budget
from tvm_structured.targets import is_cuda
from tvm_structured.tuning.schedule_tasks import ScheduleTask, is_tunable
from tvm_structured.tuning.session import WeightedTask
from tvm_structured.tuning.tasks import KernelTask

WORTH_TUNING = 2.0  # times the fastest form of a layer: tuning rarely brings more than that


def extract_tasks(
    mod: Any, target: Any, plan: Plan, budget: Any, store: Any, measure: bool = True, is_given: bool = False
) -> list[WeightedTask]:
    """Tasks of a canonical module, each once, kernels first. Of a plan that was given only its own forms are tuned."""
    from tvm_structured.relay_passes.find_layers import find_calls

    prices = None if is_given else Prices(find_calls(mod), target, store, measure)
    forms = forms_of_layers(mod, plan, budget, prices)
    return [*kernel_tasks(mod, target, forms), *function_tasks(mod, target, plan)]


@dataclass(frozen=True)
class Form:
    """A form that a layer may take. `most`: how many trials it is worth, None for all, 0 for none."""

    structure: Structure
    most: int | None = None


def forms_of_layers(mod: Any, plan: Plan, budget: Any, prices: Prices | None) -> dict[str, list[Form]]:
    """Layer -> its forms; without prices just those of the plan.

    Forms far behind are not tuned. Where that is only a prediction they are measured once, for the guard to compare.
    """
    from tvm_structured.relay_passes.find_layers import find_layers, find_structures

    forms = {name: [Form(member)] for name, member in find_structures(mod).items()}
    limits = None if budget is None else as_budget(budget)
    for name, layer in find_layers(mod).items():
        chosen = plan.choices[name]
        if prices is None:
            assert isinstance(chosen, Structure)
            forms[name] = [Form(chosen)]
            continue
        dense, _ = keep_dense(layer, "")
        members = [dense, *candidates(layer, limits, DetectionStore()).all()]
        costs = prices(name, members)
        limit = WORTH_TUNING * min(cost.seconds for cost in costs)
        forms[name] = [
            Form(member, None if cost.seconds <= limit else 0 if cost.is_measured else 1)
            for member, cost in zip(members, costs, strict=True)
        ]
    return forms


def kernel_tasks(mod: Any, target: Any, forms: Mapping[str, Sequence[Form]]) -> list[WeightedTask]:
    """One task for all layers that call the same kernel in the same place; what has no kernel there is left out."""
    from tvm_structured.relay_passes.find_layers import find_calls
    from tvm_structured.relay_passes.locate_kernel import locate_kernel

    calls = find_calls(mod)
    is_cold = weights_are_cold(calls)
    found: dict[str, WeightedTask] = {}
    for name, uses in calls.items():
        for call in uses:
            for form in forms.get(name, ()):
                if form.most == 0:
                    continue
                formed = with_structure(call, form.structure) if call.is_canonical else call
                place = locate_kernel(formed, target)
                if place is None:
                    continue
                task = KernelTask.of(*place, target, is_cold)
                known = found.get(task.key, WeightedTask(task, 0, (), form.most))
                layers = known.layers if name in known.layers else (*known.layers, name)
                most = None if known.most is None or form.most is None else max(known.most, form.most)
                found[task.key] = WeightedTask(known.task, known.weight + 1, layers, most)
    return list(found.values())


def function_tasks(mod: Any, target: Any, plan: Plan) -> list[WeightedTask]:
    """The functions that are left without a schedule, of known extents and not mere views. None of a GPU's: they keep
    their default schedules."""
    if is_cuda(target):
        return []
    from tvm import tirx

    from tvm_structured.relay_passes.apply_schedules import as_view, is_scheduled
    from tvm_structured.relay_passes.find_layers import find_layers
    from tvm_structured.relay_passes.mark_layers import kernel_calls
    from tvm_structured.relay_passes.pipeline import lowering_pipeline

    with target:
        lowered = lowering_pipeline({name: plan.choices[name] for name in find_layers(mod)})(mod)
    uses = [symbol for symbol, _ in kernel_calls(lowered)]
    found: dict[str, WeightedTask] = {}
    for name, func in lowered.functions_items():
        if (
            not isinstance(func, tirx.PrimFunc)
            or is_scheduled(func)
            or not is_tunable(func)
            or as_view(func) is not None
        ):
            continue
        task = ScheduleTask.of(func, target, name=name.name_hint)
        known = found.get(task.key, WeightedTask(task, 0))
        found[task.key] = WeightedTask(known.task, known.weight + max(1, uses.count(name.name_hint)))
    return list(found.values())
