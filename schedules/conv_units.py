"""How a direct convolution is cut into pieces of work, and what its two forms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.emit import serial
from tvm_structured.schedules.images import ImageShape

UNROLLED_TAPS = 16  # more taps than that stay a loop over the rows of the kernel
UNROLLED_CHANNELS = 4


@dataclass(frozen=True)
class Units:
    """Pieces of work: every image, group, strip of `rows` output rows and part of the blocks of output channels.

    The last strip is moved up where rows are left over: it computes a few rows again, to the same values.
    """

    shape: ImageShape
    rows: int
    parts: int
    block: int  # output channels that are computed together

    @property
    def blocks(self) -> int:
        """Blocks in a group; the last one may hold channels that do not exist."""
        return -(-self.shape.outs // self.block)

    @property
    def strips(self) -> int:
        return -(-self.shape.output[0] // self.rows)

    @property
    def total(self) -> Extent:
        return self.shape.batch * (self.shape.groups * self.strips * self.parts)

    def at(self, unit: Any) -> tuple[Any, Any, Any, Any, Extent]:
        """(image, group, first output row, first block, number of blocks)."""
        per_part = -(-self.blocks // self.parts)
        part = unit % self.parts if self.parts > 1 else 0
        strip = unit // self.parts % self.strips if self.strips > 1 else 0
        group = unit // (self.parts * self.strips) % self.shape.groups if self.shape.groups > 1 else 0
        image = unit // (self.parts * self.strips * self.shape.groups)
        first_row = strip * self.rows
        if self.shape.output[0] % self.rows:
            first_row = tirx.min(first_row, self.shape.output[0] - self.rows)
        first = part * per_part
        count = per_part if self.blocks % self.parts == 0 else tirx.min(per_part, self.blocks - first)
        return image, group, first_row, first, count

    def num_outs(self, first: Any, size: int) -> Extent:
        """How many of the `size` output channels from `first` on exist in a group."""
        return size if self.shape.outs % self.block == 0 else tirx.max(tirx.min(size, self.shape.outs - first), 0)


def packed_shape(shape: ImageShape, size: int) -> tuple[int, int, int, int]:
    """Of `pack_blocks`: (groups, blocks, depth, size)."""
    return shape.groups, -(-shape.outs // size), shape.depth, size


def pack_blocks(matrix: np.ndarray, shape: ImageShape, size: int, channel_first: bool) -> np.ndarray:
    """(groups * outs, kh * kw * channels), channel fastest -> (groups, blocks, depth, size).

    depth = (channel, tap) where `channel_first`, else (tap, channel).
    """
    groups, count, depth, size = packed_shape(shape, size)
    weight = matrix.reshape(groups, shape.outs, shape.taps, shape.channels)
    weight = weight.swapaxes(2, 3) if channel_first else weight
    padded = np.zeros((groups, count * size, depth), np.float32)
    padded[:, : shape.outs] = weight.reshape(groups, shape.outs, depth)
    return np.ascontiguousarray(padded.reshape(groups, count, size, depth).transpose(0, 1, 3, 2))


@dataclass(frozen=True)
class Term:
    """One product of the sum: the index into the packed weight, and where the image's operand lies.

    `phase` is the (vertical, horizontal) phase of the stride, `shift` the rows and columns within it.
    """

    channel: Any
    index: Any
    phase: tuple[int, int]
    shift: tuple[Any, Any]


def each_term(shape: ImageShape, phases: tuple[int, int], body: Callable[[Term], None]) -> None:
    """body(term) for all terms. `phases` is the stride by which the image was split, (1, 1) for a whole image.

    Few taps are unrolled; of many only one row is, or nothing if even that is long. Kernel row ky lies in phase
    ky * dilation % stride, which repeats after stride / gcd(stride, dilation) rows; loops run over those that share a
    phase, so that a phase is always a number.
    """
    (kh, kw), (dv, dh), (sv, sh) = shape.kernel, shape.dilation, phases
    (vertical, down), (horizontal, right) = ((s // gcd(s, d), d // gcd(s, d)) for s, d in ((sv, dv), (sh, dh)))

    def taps(channel: Any) -> None:
        for first in range(min(vertical, kh)):
            count = len(range(first, kh, vertical))
            repeat(count, shape.taps > UNROLLED_TAPS, lambda y, first=first: row(channel, first, y))

    def row(channel: Any, first_y: int, y: Any) -> None:
        for first in range(min(horizontal, kw)):
            count = len(range(first, kw, horizontal))
            repeat(count, kw > UNROLLED_TAPS, lambda x, first=first: tap(channel, first_y, y, first, x))

    def tap(channel: Any, first_y: int, y: Any, first_x: int, x: Any) -> None:
        ky, kx = y * vertical + first_y, x * horizontal + first_x
        shift = y * down + first_y * dv // sv, x * right + first_x * dh // sh
        body(Term(channel, channel * shape.taps + ky * kw + kx, (first_y * dv % sv, first_x * dh % sh), shift))

    unroll = max(1, min(UNROLLED_CHANNELS, UNROLLED_TAPS // shape.taps))
    full, rest = divmod(shape.channels, unroll)
    if full:
        with serial(0, full) as outer:
            for inner in range(unroll):
                taps(outer * unroll + inner)
    for channel in range(shape.channels - rest, shape.channels):
        taps(channel)


def each_tap_first(shape: ImageShape, body: Callable[[Term], None]) -> None:
    """body(term) for all terms of a whole image, taps outside and channels inside.

    Neighbouring taps of one channel broadcast the same pixels. Unrolled side by side LLVM would keep those for the
    next tap, and run out of registers.
    """
    (kh, kw), (dv, dh) = shape.kernel, shape.dilation

    def channels(tap: Any) -> None:
        shift = (tap // kw * dv, tap % kw * dh)
        full, rest = divmod(shape.channels, UNROLLED_CHANNELS)
        if full:
            with serial(0, full) as outer:
                for inner in range(UNROLLED_CHANNELS):
                    term(tap, outer * UNROLLED_CHANNELS + inner, shift)
        for channel in range(shape.channels - rest, shape.channels):
            term(tap, channel, shift)

    def term(tap: Any, channel: Any, shift: tuple[Any, Any]) -> None:
        body(Term(channel, tap * shape.channels + channel, (0, 0), shift))

    repeat(kh * kw, True, channels)


def repeat(count: int, as_loop: bool, body: Callable[[Any], None]) -> None:
    """body(i) for i below `count`, as a loop or unrolled."""
    if as_loop and count > 1:
        with serial(0, count) as i:
            body(i)
        return
    for i in range(count):
        body(i)
