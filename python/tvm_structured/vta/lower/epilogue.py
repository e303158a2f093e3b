"""From sums in ACC to int8: bias, shifts, multipliers, residual and clip on the ALU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.lower.builder import Builder, Slots
from tvm_structured.vta.lower.uop_kernels import Loop
from tvm_structured.vta.operators.base import Weighted
from tvm_structured.vta.operators.requantize import LARGEST_ACC, LARGEST_IMMEDIATE, Integers, Joined, Scale, rounding

SMALL_PART = 16  # of ACC
LARGEST_SHIFT = 15  # whose rounding is an immediate


@dataclass(frozen=True)
class AccTile:
    """Elements first + c * channel_stride + p * pixel_stride of ACC, c < channels, p < pixels."""

    first: int
    channels: int
    channel_stride: int
    pixels: int
    pixel_stride: int

    @property
    def count(self) -> int:
        return self.channels * self.pixels

    def loops(self, moved: int | None = None, vectors: bool = False) -> tuple[Loop, Loop]:
        """Over channels and pixels; the source moves like the tile, or with `vectors` by one for each channel."""
        outer = Loop(self.channels, self.channel_stride, 1 if vectors else self.channel_stride)
        return outer, Loop(self.pixels, self.pixel_stride, 0 if vectors else self.pixel_stride)


def immediate(b: Builder, tile: AccTile, operation: str, imm: int) -> None:
    b.alu_immediate(operation, imm, tile.first, *tile.loops())


def shift_right(b: Builder, tile: AccTile, shift: int, is_rounded: bool = False) -> None:
    """(acc + rounding(shift)) >> shift; beyond 15 in two steps, which is the same. Only the shift if the rounding
    `is_rounded` into the sum already."""
    if shift == 0:
        return
    if not is_rounded:
        if shift > LARGEST_SHIFT:
            immediate(b, tile, "SHR", shift - LARGEST_SHIFT)
            shift = LARGEST_SHIFT
        immediate(b, tile, "ADD", rounding(shift))
    immediate(b, tile, "SHR", shift)


def scale(b: Builder, tile: AccTile, by: Scale) -> None:
    if by.multiplier != 1:
        immediate(b, tile, "MUL", by.multiplier)
    shift_right(b, tile, by.shift)


def clip(b: Builder, tile: AccTile, low: int, high: int, bound: int = 1 << 31) -> None:
    """What lies beyond `bound` cannot occur and is not clipped."""
    if -bound < low:
        immediate(b, tile, "MAX", low)
    if bound > high:
        immediate(b, tile, "MIN", high)


@dataclass(frozen=True, eq=False)
class Steps:
    """((acc + added) >> pre_shift) * multiplier + added_after >> shift, one number for each channel.

    `is_rounded`: `added_after`, or `added`, has the rounding of `shift`. |result| with the residual is at most `bound`.
    """

    added: Integers
    pre_shift: int
    multiplier: Integers
    added_after: Integers
    shift: int
    is_rounded: bool
    bound: int

    @classmethod
    def of(cls, layer: Weighted) -> Steps:
        q, bound = layer.requantize, layer.acc_bound
        multiplier = np.broadcast_to(np.asarray(q.multiplier, np.int64), bound.shape)
        bias = np.zeros(bound.shape, np.int64) if layer.bias is None else layer.bias.astype(np.int64)
        largest = int((bound * np.abs(multiplier)).max()) + q.rounding(q.shift)
        added, after, is_rounded = bias + q.rounding(q.pre_shift), np.zeros(bound.shape, np.int64), not q.rounds
        if q.rounds and q.pre_shift == 0 and layer.bias is not None and largest <= LARGEST_ACC:
            # bias and rounding are one addition: before a multiplier of 1, else behind the multiplication
            is_rounded = True
            if (multiplier == 1).all():
                added = bias + q.rounding(q.shift)
            else:
                added, after = after, bias * multiplier + q.rounding(q.shift)
        return cls(added, q.pre_shift, multiplier, after, q.shift, is_rounded, layer.result_bound())

    @property
    def without_added(self) -> Steps:
        """What is left where something else adds `added`."""
        return replace(self, added=np.zeros_like(self.added))

    @cached_property
    def vectors(self) -> int:
        """Kinds of constants that are no immediates."""
        return sum(not is_immediate(values) for values in (self.added, self.multiplier, self.added_after))

    def blocks_kept(self, config: VTAConfig, tile: int) -> int:
        """Blocks of channels whose vectors stay in ACC: all if that is little, since a load for each tile would wait
        for the read port; else those of a tile of so many blocks."""
        every = -(-len(self.multiplier) // config.block)
        return every if self.vectors * every <= config.depth(Memory.ACC) // SMALL_PART else tile


def is_immediate(values: Integers) -> bool:
    return bool((values == values[0]).all()) and abs(int(values[0])) <= LARGEST_IMMEDIATE


@dataclass(frozen=True, eq=False)
class Epilogue:
    """The steps after the sums of one layer. Vectors of constants are kept in slots of ACC."""

    builder: Builder
    layer: Weighted
    steps: Steps
    kept: int  # blocks in one slot, see `blocks_kept`
    slots: Slots

    def __call__(self, tile: AccTile, first_block: int, add_residual: Callable[[], None]) -> None:
        """On the sums of output blocks `first_block` and on. `add_residual` adds the second input, scaled."""
        b, q, residual = self.builder, self.layer.requantize, self.layer.residual
        steps = self.steps
        self._vector("ADD", steps.added, 0, tile, first_block)
        shift_right(b, tile, steps.pre_shift, is_rounded=True)
        self._vector("MUL", steps.multiplier, 1, tile, first_block)
        self._vector("ADD", steps.added_after, 0, tile, first_block)
        last = residual.shift if isinstance(residual, Joined) else 0  # bits that are cut off behind the residual
        shift_right(b, tile, steps.shift - last, steps.is_rounded or last > 0)
        if residual is not None:
            add_residual()
        shift_right(b, tile, last, steps.is_rounded)
        clip(b, tile, q.low, q.high, steps.bound)

    def add_loaded(self, tile: AccTile, spare: int, load: Callable[[int], None]) -> None:
        """The residual, which `load(spare)` loads to ACC from element `spare` on, laid out as the tile."""
        b, residual = self.builder, self.layer.residual
        assert residual is not None
        load(spare)
        other = AccTile(spare, tile.channels, tile.channel_stride, tile.pixels, tile.pixel_stride)
        scale(b, other, Scale(residual.multiplier) if isinstance(residual, Joined) else residual)
        b.alu("ADD", tile.first, spare, *tile.loops())

    def _vector(self, operation: str, values: Integers, neutral: int, tile: AccTile, first_block: int) -> None:
        """One value for each channel: an immediate where all are equal, else a vector for each block."""
        block = self.builder.config.block
        part = values[first_block * block : (first_block + tile.channels) * block]
        if is_immediate(part):
            if part[0] != neutral:
                immediate(self.builder, tile, operation, int(part[0]))
            return
        if self.kept * block >= len(values):
            source = self._load(operation, values, 0, self.kept) + first_block
        else:
            source = self._load(operation, part, first_block, tile.channels)
        self.builder.alu(operation, tile.first, source, *tile.loops(vectors=True))

    def _load(self, operation: str, part: Integers, first_block: int, count: int) -> int:
        b, config = self.builder, self.builder.config
        key = (operation, first_block, count)
        start, is_present = self.slots.take(key)
        if not is_present:

            def rows() -> NDArray[Any]:
                vectors = np.zeros(count * config.block, np.int64)
                vectors[: len(part)] = part
                return np.broadcast_to(vectors.reshape(count, 1, -1), (count, config.batch, config.block))

            b.load(Memory.ACC, start, "ACC", b.constant(Memory.ACC, (id(self.layer), *key), count, rows), count)
        return start
