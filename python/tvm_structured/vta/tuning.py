"""Search for the schedule with the fewest modelled cycles.

tuned = tune(operator, [x.shape], config)
lower(operator, [x.shape], config, tuned.schedule)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.errors import VTAError
from tvm_structured.line_store import LineStore, cache_directory
from tvm_structured.vta.config import VTAConfig
from tvm_structured.vta.lower import Problem, Schedule, lower_problem, problem_of
from tvm_structured.vta.operators import Operator
from tvm_structured.vta.timing import TimingModel, model

VERSION = 2  # of lowering and model; what an older one chose is not looked at


@dataclass(frozen=True)
class Tuned:
    """The best schedule found, and modelled cycles: its own, and those of the default."""

    schedule: Schedule
    cycles: int
    default_cycles: int
    tried: int  # 0: remembered


class ScheduleStore(LineStore):
    """Schedules by operator, shapes and configuration, in a file of lines."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(cache_directory() / "vta_schedules.jsonl" if path is None else path, "tuned")

    def is_value(self, value: Any) -> bool:
        try:
            Schedule.from_json(value["schedule"])
            return all(isinstance(value[name], int) for name in ("cycles", "default_cycles"))
        except (VTAError, TypeError, KeyError):
            return False


def tune(
    operator: Operator,
    shapes: Sequence[tuple[int, ...]],
    config: VTAConfig | None = None,
    trials: int = 24,
    constants: TimingModel | None = None,
    store: ScheduleStore | None = None,
    progress: Callable[[Schedule, int], None] | None = None,
) -> Tuned:
    """The best of `trials` schedules by modelled cycles: the default first, then by estimate, then small changes of
    the best. Never worse than the default. `progress` is called with each schedule and its cycles."""
    if trials < 1:
        raise VTAError(f"trials={trials}: expected at least 1")
    config = VTAConfig() if config is None else config
    constants = TimingModel() if constants is None else constants
    shapes = [tuple(int(extent) for extent in shape) for shape in shapes]
    key = digest(VERSION, operator, shapes, config, constants, trials)
    known = None if store is None else store.get(key)
    if known is not None:
        return Tuned(Schedule.from_json(known["schedule"]), known["cycles"], known["default_cycles"], 0)
    tuned = search(problem_of(operator, shapes, config), operator, shapes, trials, constants, progress)
    if store is not None:
        values = {
            "schedule": tuned.schedule.to_json(), "cycles": tuned.cycles, "default_cycles": tuned.default_cycles,
        }  # fmt: skip
        store.put(key, values, f"{type(operator).__name__} {operator.name} {shapes}")
    return tuned


def search(
    problem: Problem,
    operator: Operator,
    shapes: Sequence[tuple[int, ...]],
    trials: int,
    constants: TimingModel,
    progress: Callable[[Schedule, int], None] | None = None,
) -> Tuned:
    cycles: dict[Schedule, int] = {}

    def measure(schedule: Schedule) -> int:
        if schedule not in cycles:
            cycles[schedule] = model(lower_problem(problem, operator, shapes, schedule).program, constants).cycles
            if progress is not None:
                progress(schedule, cycles[schedule])
        return cycles[schedule]

    default = problem.default_schedule()
    measure(default)
    for schedule in problem.schedules(default.threads):
        if len(cycles) >= -(-trials * 2 // 3):
            break
        measure(schedule)
    # then from the best one on, while a neighbour is better
    possible = set(problem.schedules(default.threads))
    best, improved = min(cycles, key=lambda s: cycles[s]), True
    while improved and len(cycles) < trials:
        improved = False
        for schedule in neighbours(best, possible):
            if len(cycles) < trials and measure(schedule) < cycles[best]:
                best, improved = schedule, True
                break
    return Tuned(best, cycles[best], cycles[default], len(cycles))


def neighbours(schedule: Schedule, possible: set[Schedule]) -> list[Schedule]:
    """Schedules that differ in one extent, by one step, in the order of the loops, or in the way of a residual."""
    found = [
        replace(schedule, weights_stay=not schedule.weights_stay),
        replace(schedule, residual_by_product=not schedule.residual_by_product),
    ]
    for name in ("out", "inner", "rows", "columns"):
        own = getattr(schedule, name)
        line = sorted(
            (s for s in possible if replace(s, **{name: own}) == schedule), key=lambda s: getattr(s, name)
        )  # fmt: skip
        place = [getattr(s, name) for s in line].index(own) if schedule in line else 0
        found += [line[i] for i in (place + 1, place - 1) if 0 <= i < len(line) and line[i] != schedule]
    return [s for s in found if s in possible]


def digest(*values: Any) -> str:
    """Of operators, arrays and plain values, by contents."""
    state = hashlib.sha256()
    _update(state, values)
    return state.hexdigest()


def _update(state: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        state.update(f"{value.dtype}{value.shape}".encode())
        state.update(np.ascontiguousarray(value).tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        state.update(type(value).__name__.encode())
        for each in fields(value):
            if each.name != "name":  # the same layer may have another name
                _update(state, (each.name, getattr(value, each.name)))
    elif isinstance(value, (tuple, list)):
        state.update(f"{len(value)}[".encode())
        for item in value:
            _update(state, item)
    else:
        state.update(repr(value).encode())
