"""Bit fields of 128-bit instructions: where they are, how they are packed and unpacked.

Fields are placed from bit 0 upward in the order of their declaration; one that would cross bit 64 starts there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import IllegalInstructionError, VTAError
from tvm_structured.vta.config import VTAConfig

Width = int | Callable[[VTAConfig], int]
Words = NDArray[np.uint64]


def bits(width: Width, signed: bool = False) -> Any:
    """Declare a field of an instruction, 0 by default; its width may follow from the configuration."""
    return dataclasses.field(default=0, metadata={"width": width, "signed": signed})


@dataclass(frozen=True)
class Slot:
    """Where a field lies: bits [shift, shift + width) of a word."""

    name: str
    word: int
    shift: int
    width: int
    signed: bool

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest value."""
        if self.signed:
            return -(1 << (self.width - 1)), (1 << (self.width - 1)) - 1
        return 0, (1 << self.width) - 1

    def insert(self, value: int) -> int:
        """The bits of `value` in place. Raises IllegalInstructionError where it does not fit."""
        low, high = self.limits
        if not low <= value <= high:
            raise IllegalInstructionError(f"{value} does not fit {self.width} bits ({low} to {high})", field=self.name)
        return (value & ((1 << self.width) - 1)) << self.shift

    def extract(self, words: Words) -> NDArray[np.int64]:
        """Values of the field in words of shape (N, 2)."""
        raw = (words[:, self.word] >> np.uint64(self.shift)) & np.uint64((1 << self.width) - 1)
        values = raw.astype(np.int64)
        return values - ((values >> (self.width - 1)) << self.width) if self.signed else values


def place(declared: Iterable[tuple[str, int, bool]]) -> tuple[Slot, ...]:
    """Slots of (name, width, signed), in order. Raises VTAError where they exceed 128 bits."""
    slots, position = [], 0
    for name, width, signed in declared:
        if position < 64 < position + width:
            position = 64
        slots.append(Slot(name, position // 64, position % 64, width, signed))
        position += width
    if position > 128:
        raise VTAError(f"the fields of an instruction need {position} bits and have 128; use smaller buffers")
    return tuple(slots)


def declared_fields(cls: type[Any], config: VTAConfig) -> Iterable[tuple[str, int, bool]]:
    """(name, width, signed) of the fields that a dataclass declares with `bits`."""
    for field in dataclasses.fields(cls):
        width = field.metadata["width"]
        yield field.name, width(config) if callable(width) else width, field.metadata["signed"]


def pack_integers(values: NDArray[Any], width: int) -> NDArray[np.uint8]:
    """Integers of 2, 4, 8 or 32 bits as bytes: little endian, the first value in the lowest bits."""
    flat = np.ascontiguousarray(values).reshape(-1).astype(np.int64)
    if width >= 8:
        raw: NDArray[np.uint8] = flat.astype(f"<i{width // 8}").view(np.uint8)
        return raw
    per_byte = 8 // width
    shifted = (flat & ((1 << width) - 1)).reshape(-1, per_byte) << (np.arange(per_byte) * width)
    packed: NDArray[np.uint8] = shifted.sum(axis=1).astype(np.uint8)
    return packed


def unpack_integers(raw: NDArray[np.uint8], width: int) -> NDArray[np.int64]:
    """The signed integers that `pack_integers` packed."""
    if width >= 8:
        return np.ascontiguousarray(raw).view(f"<i{width // 8}").astype(np.int64)
    per_byte = 8 // width
    values = (raw.reshape(-1, 1).astype(np.int64) >> (np.arange(per_byte) * width)) & ((1 << width) - 1)
    signed: NDArray[np.int64] = (values - ((values >> (width - 1)) << width)).reshape(-1)
    return signed
