"""From sums in ACC to int8: bias, shifts, multipliers, residual and clip on the ALU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import Memory
from tvm_structured.vta.lower.builder import Builder, Slots
from tvm_structured.vta.lower.uop_kernels import Loop
from tvm_structured.vta.operators.base import Weighted
from tvm_structured.vta.operators.requantize import LARGEST_ACC, LARGEST_IMMEDIATE, Integers, Scale, rounding

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
    """(acc + rounding(shift)) >> shift; beyond 15 in two steps, which is the same."""
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


@dataclass
class Epilogue:
    """The steps after the sums of one layer. Vectors of constants are kept in slots of ACC."""

    builder: Builder
    layer: Weighted
    slots: Slots
    blocks: int  # of output channels
    bias: Integers = field(init=False)
    multiplier: Integers = field(init=False)
    pre_shift: int = field(init=False)
    shift: int = field(init=False)
    bound: int = field(init=False)

    def __post_init__(self) -> None:
        layer, q = self.layer, self.layer.requantize
        self.pre_shift, self.shift = q.pre_shift, q.shift
        channels = layer.out_channels
        self.multiplier = np.broadcast_to(np.asarray(q.multiplier, np.int64), (channels,))
        room = LARGEST_ACC - int(layer.acc_bound().max())
        if self.pre_shift == 0 and (self.multiplier == 1).all() and rounding(self.shift) <= room:
            self.pre_shift, self.shift = self.shift, 0  # one shift, whose rounding joins the bias
        bias = np.zeros(channels, np.int64) if layer.bias is None else layer.bias.astype(np.int64)
        self.bias = bias + rounding(self.pre_shift)
        self.bound = int(q.check(layer.name, layer.acc_bound()).max())
        if layer.residual is not None:
            self.bound += layer.residual.bound

    @staticmethod
    def vectors(layer: Weighted) -> int:
        """Kinds of constant vectors that a layer needs, at most."""
        return int(layer.bias is not None) + int(not layer.requantize.is_scalar or abs(int(np.max(np.abs(
            np.asarray(layer.requantize.multiplier, np.int64))))) > LARGEST_IMMEDIATE)  # fmt: skip

    def __call__(
        self, tile: AccTile, first_block: int, load_residual: Callable[[int], None] | None = None, spare: int = 0
    ) -> None:
        """On the sums of output blocks `first_block` and on. `load_residual(spare)` loads the second input to ACC
        from element `spare`, laid out as the tile."""
        b, q = self.builder, self.layer.requantize
        self._vector("ADD", self.bias, 0, tile, first_block)
        shift_right(b, tile, self.pre_shift, is_rounded=True)
        self._vector("MUL", self.multiplier, 1, tile, first_block)
        shift_right(b, tile, self.shift)
        if self.layer.residual is not None and load_residual is not None:
            load_residual(spare)
            other = AccTile(spare, tile.channels, tile.channel_stride, tile.pixels, tile.pixel_stride)
            scale(b, other, self.layer.residual)
            b.alu("ADD", tile.first, spare, *tile.loops())
        clip(b, tile, q.low, q.high, self.bound)

    def _vector(self, operation: str, values: Integers, neutral: int, tile: AccTile, first_block: int) -> None:
        """One value for each channel: an immediate where all are equal, else a vector for each block."""
        block = self.builder.config.block
        part = values[first_block * block : (first_block + tile.channels) * block]
        if (part == part[0]).all() and abs(int(part[0])) <= LARGEST_IMMEDIATE:
            if part[0] != neutral:
                immediate(self.builder, tile, operation, int(part[0]))
            return
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
