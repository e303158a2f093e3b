"""What was learnt once, on disk: one JSON line each, appended; kept under the user's cache directory.

`TVM_STRUCTURED_CACHE` moves the directory. Lines that are damaged or foreign are passed over, so an interrupted
run loses at most the line it was writing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path


def cache_directory() -> Path:
    """Where costs are kept; TVM_STRUCTURED_CACHE wins over the platform's own place."""
    chosen = os.environ.get("TVM_STRUCTURED_CACHE")
    return Path(chosen) if chosen else user_cache_path("tvm_structured")


class LineStore:
    """Values by key. Keys name everything that a value depends on."""

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.field = path, field
        self._known: dict[str, Any] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                self._read(line)

    def is_value(self, value: Any) -> bool:
        """Whether a value that was read can be one of ours."""
        raise NotImplementedError

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if isinstance(record, Mapping) and self.is_value(record.get(self.field)):
            self._known[str(record.get("key"))] = record[self.field]

    def get(self, key: str) -> Any | None:
        return self._known.get(key)

    def put(self, key: str, value: Any, what: str) -> None:
        """Remember a value; `what` is for people who read the file. A directory that cannot be written is no error."""
        self._known[key] = value
        line = json.dumps({"key": key, self.field: value, "what": what}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # one write in append mode: lines of processes that run at the same time do not mix
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            return

    def __len__(self) -> int:
        return len(self._known)
