"""Default CPU schedules for everything that is not a structured operator; the first rule that takes a function wins."""

from __future__ import annotations

from typing import Any

from tvm_structured.schedules import injective, matmul, reduction
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.nest import open_schedule


def apply(func: Any, target: Any) -> Any | None:
    """Each block by itself, its outer loops parallel."""
    opened = open_schedule(func)
    if opened is None:
        return None
    for nest in opened[1]:
        reduction.schedule_alone(nest, Cpu.of(target))
    return opened[0]


RULES = (injective.apply, matmul.apply, reduction.apply, apply)
