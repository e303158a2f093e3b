"""Names of layers: one for each weight with its geometry, whatever its number of uses."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from tvm_structured.relay_passes.fold_weights import Origin
from tvm_structured.structures.layer import Array


@dataclass(frozen=True, eq=False)
class NamedWeight:
    """A layer's name and its weight as one Relax constant, shared by all uses."""

    name: str
    array: Array
    geometry: Any
    const: Any


class LayerNames:
    """Hands out names: the parameter's own; "#2", "#3" follow where one parameter makes several layers.

    Constants without a name are called constant_0, constant_1, ... in order of their first use as a layer;
    equal constants are one. `reserved` names belong to layers that were named before.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self.reserved = frozenset(reserved)
        self.layers: dict[str, NamedWeight] = {}
        self.constants: dict[tuple[Any, ...], str] = {}

    def assign(self, origin: Origin, array: Array, geometry: Any) -> NamedWeight:
        """The layer of that weight and geometry: the one already there, or a new one."""
        base = self.base_name(origin)
        for count in itertools.count(1):
            name = base if count == 1 else f"{base}#{count}"
            found = self.layers.get(name)
            if found is None and name not in self.reserved:
                break
            if found is not None and found.geometry == geometry and is_identical(found.array, array):
                return found
        array = np.ascontiguousarray(array)
        self.layers[name] = NamedWeight(name, array, geometry, relax.const(array, str(array.dtype)))
        return self.layers[name]

    def base_name(self, origin: Origin) -> str:
        if origin.name is not None:
            return origin.name + origin.part
        value = origin.value
        key = (value.shape, str(value.dtype), hashlib.sha1(np.ascontiguousarray(value).tobytes()).digest())
        return self.constants.setdefault(key, f"constant_{len(self.constants)}") + origin.part


def is_identical(a: Array, b: Array) -> bool:
    """Equal bit by bit, NaN included."""
    return a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
