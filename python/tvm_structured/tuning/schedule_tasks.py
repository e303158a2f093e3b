"""ScheduleTask: a function that has no structured kernel. Its candidates are traces of MetaSchedule; the first, empty
one is the default schedule of `schedules/fallback.py`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_structured.errors import TuningError
from tvm_structured.schedules import Config
from tvm_structured.tuning.tasks import random_array, target_text


@dataclass(frozen=True)
class Trace:
    """A trace of schedule primitives as JSON."""

    steps: Any

    def apply_to_schedule(self, schedule: Any, remove_postproc: bool = False) -> None:
        """Replay it; the arguments are those of TVM's own Trace."""
        from tvm.s_tir.schedule import Trace as TvmTrace

        TvmTrace.apply_json_to_schedule(self.steps, schedule)


@dataclass(frozen=True)
class ScheduleTask:
    """`workload`: the unscheduled module as TVM's JSON, its function called main."""

    workload: str
    target: str
    is_cold: bool = False
    name: str = "main"

    @classmethod
    def of(cls, func: Any, target: Any, is_cold: bool = False, name: str = "main") -> ScheduleTask:
        from tvm import IRModule, ir

        workload = IRModule({"main": func.with_attr("global_symbol", "main")})
        return cls(ir.save_json(workload), target_text(target), is_cold, name)

    @functools.cached_property
    def key(self) -> str:
        """A digest of the function's text, which names nothing but what it computes."""
        return hashlib.sha256(self.module["main"].script(show_meta=True).encode()).hexdigest()[:32]

    def describe(self) -> str:
        shapes = ["x".join(map(str, shape)) for shape, _ in arguments_of(self.module["main"])]
        return f"{self.name} {' '.join(shapes[:-1])} -> {shapes[-1]}"

    def to_json(self) -> dict[str, Any]:
        fields = {"workload": self.workload, "target": self.target, "is_cold": self.is_cold, "name": self.name}
        return {"kind": "schedule", **fields}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> ScheduleTask:
        try:
            return cls(*(described[name] for name in ("workload", "target", "is_cold", "name")))
        except KeyError as error:
            raise TuningError(f"not the description of a schedule task (it has no {error})") from None

    @functools.cached_property
    def module(self) -> Any:
        from tvm import ir

        return ir.load_json(self.workload)

    @functools.cached_property
    def tvm_target(self) -> Any:
        from tvm.target import Target

        return Target(json.loads(self.target))

    @property
    def by_hand(self) -> Config:
        """The empty trace: the default schedule."""
        return {}

    def build(self, config: Config) -> tuple[Any, list[np.ndarray]]:
        """The scheduled function and the arguments of one call; the last is the output."""
        from tvm import s_tir

        from tvm_structured.schedules.fallback import default_schedule
        from tvm_structured.schedules.vector_math import with_vector_math

        func = self.module["main"]
        if config:
            schedule = s_tir.Schedule(self.module)
            Trace(config["trace"]).apply_to_schedule(schedule)
            scheduled = with_vector_math(schedule.mod["main"])
        else:
            scheduled = default_schedule(func, self.tvm_target) or func
        rng = np.random.default_rng(0)
        return scheduled, [random_argument(shape, dtype, rng) for shape, dtype in arguments_of(func)]


def arguments_of(func: Any) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of every buffer that the function takes."""
    return [(tuple(int(extent) for extent in param.ty.shape), str(param.ty.dtype)) for param in func.params]


def is_tunable(func: Any) -> bool:
    """Whether every argument is a buffer and all extents are known."""
    types = [param.ty for param in func.params]
    return all(hasattr(ty, "shape") and all(hasattr(extent, "value") for extent in ty.shape) for ty in types)


def random_argument(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Normal numbers; zeros for integers, which may be indices."""
    return random_array(shape, rng).astype(dtype) if dtype.startswith("float") else np.zeros(shape, dtype)
