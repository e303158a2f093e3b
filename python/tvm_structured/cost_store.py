"""Measured costs on disk: one JSON line each, appended; kept under the user's cache directory.

`TVM_STRUCTURED_CACHE` moves the directory. Lines that are damaged or foreign are passed over, so an interrupted
run loses at most the line it was writing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from platformdirs import user_cache_path


def cache_directory() -> Path:
    """Where costs are kept; TVM_STRUCTURED_CACHE wins over the platform's own place."""
    chosen = os.environ.get("TVM_STRUCTURED_CACHE")
    return Path(chosen) if chosen else user_cache_path("tvm_structured")


class CostStore:
    """Seconds by key. Keys name everything that a time depends on; see `costs.cost_key`."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_directory() / "costs.jsonl"
        self._known: dict[str, float] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if isinstance(record, Mapping) and isinstance(record.get("seconds"), float) and record["seconds"] > 0:
            self._known[str(record.get("key"))] = record["seconds"]

    def get(self, key: str) -> float | None:
        return self._known.get(key)

    def put(self, key: str, seconds: float, what: str) -> None:
        """Remember a cost; `what` is for people who read the file. A directory that cannot be written is no error."""
        self._known[key] = seconds
        line = json.dumps({"key": key, "seconds": seconds, "what": what}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # one write in append mode: lines of processes that run at the same time do not mix
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            return

    def __len__(self) -> int:
        return len(self._known)
