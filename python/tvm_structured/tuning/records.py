"""What a tuning database holds: one JSON object a line.

task    what a key stands for, with all that is needed to measure it again
trial   one measured configuration; without seconds: it failed
best    the end of a task: the winner of a last comparison with the hand schedule, in turns
cost    seconds of a whole layer in one form, see `costs.cost_key`
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tvm_structured.tuning.tasks import config_text


@dataclass(frozen=True)
class Origin:
    """What a time was measured for: it means nothing for anything else."""

    key: str  # of the task
    target: str
    is_cold: bool
    tvm: str
    kernel: str  # version of the kernel's sources


@dataclass(frozen=True)
class TaskRecord:
    kind: ClassVar[str] = "task"
    key: str
    what: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    kind: ClassVar[str] = "trial"
    origin: Origin
    number: int
    config: Mapping[str, Any]
    seconds: float | None
    error: str = ""

    @property
    def text(self) -> str:
        return config_text(self.config)


@dataclass(frozen=True)
class Best:
    """`seconds` and `default_seconds` were taken in turns; `trials` is how many were looked at before."""

    kind: ClassVar[str] = "best"
    origin: Origin
    trials: int
    config: Mapping[str, Any]
    seconds: float
    default_seconds: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the hand schedule."""
        return self.default_seconds / self.seconds


@dataclass(frozen=True)
class CostRecord:
    kind: ClassVar[str] = "cost"
    key: str
    seconds: float
    what: str
    version: str


Record = TaskRecord | Trial | Best | CostRecord


def to_line(record: Record) -> str:
    """The record as one line of JSON, its origin flattened into it."""
    values = asdict(record)
    values |= values.pop("origin", {})
    return json.dumps({"kind": record.kind, **values}, allow_nan=False)


def from_line(line: str) -> Record:
    """Raises ValueError, with the reason, for a line that is no record."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    kind = values.pop("kind", None)
    family = {family.kind: family for family in (TaskRecord, Trial, Best, CostRecord)}.get(kind)
    if family is None:
        raise ValueError(f"kind {kind!r} is unknown")
    try:
        if family in (Trial, Best):
            values["origin"] = Origin(**{name: values.pop(name) for name in Origin.__dataclass_fields__})
        record: Record = family(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a {kind} record is missing something or has too much ({error})") from None
    check(record)
    return record


def check(record: Record) -> None:
    """Raises ValueError where a value has the wrong type or makes no sense."""
    texts = [record.what] if isinstance(record, (TaskRecord, CostRecord)) else [*vars(record.origin).values()]
    keys = record.key if isinstance(record, (TaskRecord, CostRecord)) else record.origin.key
    if not all(isinstance(value, (str, bool)) for value in texts) or not isinstance(keys, str):
        raise ValueError(f"a {record.kind} record with a name that is no text")
    for name in ("seconds", "default_seconds"):
        value = getattr(record, name, None)
        if value is None and (name != "seconds" or isinstance(record, (Trial, TaskRecord))):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < math.inf):
            raise ValueError(f"{name} {value!r} is no time")
    for name, kinds in (("config", Mapping), ("spec", Mapping), ("number", int), ("trials", int)):
        if hasattr(record, name) and not isinstance(getattr(record, name), kinds):
            raise ValueError(f"{name} {getattr(record, name)!r} has the wrong type")
