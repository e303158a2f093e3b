"""Which structures a weight was found not to have, on disk: looking for them again would take the same time."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from tvm_structured import structures
from tvm_structured.guard import digest
from tvm_structured.line_store import LineStore, cache_directory
from tvm_structured.structures import Layer


class DetectionStore(LineStore):
    """Names of families by layer; see `layer_key`."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path or cache_directory() / "detections.jsonl", "absent")

    def is_value(self, value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    def absent(self, layer: Layer) -> frozenset[str]:
        """Families that the layer has no member of."""
        return frozenset(self.get(layer_key(layer)) or ())

    def remember(self, layer: Layer, absent: frozenset[str]) -> None:
        self.put(layer_key(layer), sorted(absent), f"{type(layer).__name__} {'x'.join(map(str, layer.weight.shape))}")


def layer_key(layer: Layer) -> str:
    """A digest of the weight, the type it is stored in, the geometry and the sources of all detectors."""
    geometry = {f.name: repr(getattr(layer, f.name)) for f in fields(layer) if f.name not in ("name", "weight")}
    described = (type(layer).__name__, layer.weight.shape, digest(layer.weight), geometry, sources())
    return hashlib.sha256(repr(described).encode()).hexdigest()[:32]


@functools.cache
def sources() -> str:
    """A digest of the package that detects: what another version of it did not find is looked for again."""
    found = hashlib.sha256()
    for source in sorted(Path(str(structures.__file__)).parent.glob("*.py")):
        found.update(source.read_bytes())
    return found.hexdigest()[:16]
