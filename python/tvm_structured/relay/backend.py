"""`relay.backend.Executor` and `Runtime`, with which old scripts named what TVM 0.19 ran by default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm_structured.errors import ModelError


@dataclass(frozen=True)
class Executor:
    """Only "graph": today every module runs on TVM's virtual machine, behind the graph executor's interface."""

    name: str = "graph"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name != "graph":
            raise ModelError(f'executor {self.name!r}: TVM removed it after 0.19; use Executor("graph")')


@dataclass(frozen=True)
class Runtime:
    """Only "cpp"."""

    name: str = "cpp"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name != "cpp":
            raise ModelError(f'runtime {self.name!r}: TVM removed it after 0.19; use Runtime("cpp")')
