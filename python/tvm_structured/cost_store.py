"""Measured costs on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tvm_structured.line_store import LineStore, cache_directory


class CostStore(LineStore):
    """Seconds by key; see `costs.cost_key`."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path or cache_directory() / "costs.jsonl", "seconds")

    def is_value(self, value: Any) -> bool:
        return isinstance(value, float) and value > 0
