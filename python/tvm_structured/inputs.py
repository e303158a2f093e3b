"""Inputs of a compiled module, and the check of what a caller passes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tvm_structured.errors import ModelError


@dataclass(frozen=True)
class Input:
    """Name, extents (None where any size is accepted) and dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        extents = ", ".join("?" if extent is None else str(extent) for extent in self.shape)
        return f"{self.name}: {self.dtype}[{extents}]"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Input:
        return cls(described["name"], tuple(described["shape"]), described["dtype"])

    def accepts(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(
            mine is None or mine == theirs for mine, theirs in zip(self.shape, shape, strict=True)
        )


def check_inputs(expected: Sequence[Input], inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """The arrays in order. Raises ModelError naming the input that is missing, unknown or does not fit."""
    if not named and len(inputs) == len(expected) and all(map(fits, expected, inputs)):
        return list(inputs)  # the usual case, which must not cost as much as a small layer
    names = [spec.name for spec in expected]
    unknown = [name for name in named if name not in names]
    if unknown:
        raise ModelError(
            f"unknown input {unknown[0]!r}; the model takes {', '.join(map(str, expected)) or 'no inputs'}"
        )
    given = dict(zip(names, inputs, strict=False)) | dict(named)
    if len(inputs) + len(named) != len(expected) or len(given) != len(expected):
        wanted = ", ".join(map(str, expected)) or "none"
        raise ModelError(f"the model takes {len(expected)} inputs ({wanted}), got {len(inputs) + len(named)}")
    return [check_input(spec, given[spec.name]) for spec in expected]


def fits(spec: Input, value: Any) -> bool:
    """Whether an array is certainly right; whatever else it may be, `check_input` finds out."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return False
    return dtype in accepted_dtypes(spec.dtype) and tuple(value.shape) == spec.shape and 0 not in spec.shape


@functools.cache
def accepted_dtypes(name: str) -> frozenset[Any]:
    """The dtype as numpy and, where somebody has imported it, torch have it. A set: the two are slow to compare."""
    torch = sys.modules.get("torch")
    return frozenset({np.dtype(name), getattr(torch, name, np.dtype(name))})


def check_input(spec: Input, value: Any) -> Any:
    """The array as it is (lists and numbers become numpy), if shape and dtype fit."""
    array = value if hasattr(value, "shape") and hasattr(value, "dtype") else np.asarray(value, dtype=spec.dtype)
    shape = tuple(int(extent) for extent in array.shape)
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise ModelError(f"{spec.name}: got {dtype}, the model takes {spec.dtype}; convert the input first")
    if not spec.accepts(shape):
        raise ModelError(f"{spec.name}: got shape {shape}, the model takes {spec}")
    if 0 in shape:
        raise ModelError(f"{spec.name}: shape {shape} is empty; there is nothing to compute")
    return array
