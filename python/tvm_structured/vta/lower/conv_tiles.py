"""Geometry of a convolution on the accelerator, and which tiles of it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.lower.builder import MOST_ITERATIONS
from tvm_structured.vta.lower.epilogue import Steps
from tvm_structured.vta.lower.schedule import Schedule, best_first, extents, slot_count, slots_needed
from tvm_structured.vta.operators.base import Weighted
from tvm_structured.vta.operators.windows import Padding, Pair


@dataclass(frozen=True, eq=False)
class ConvTiles:
    """A convolution in blocks. `pairs` (out blocks, in blocks): whether a tile of weights has any non-zero number."""

    config: VTAConfig
    layer: Weighted
    rows: int  # of the batch, in blocks
    size: Pair
    output: Pair
    kernel: Pair
    stride: Pair
    padding: Padding
    pairs: NDArray[np.bool_]
    cuts: dict[Pair, tuple[int, int]] = field(default_factory=dict, repr=False)  # what `_cut` found

    @cached_property
    def steps(self) -> Steps:
        return Steps.of(self.layer)

    @cached_property
    def is_full(self) -> bool:
        return bool(self.pairs.all())

    @cached_property
    def products(self) -> int:
        """Tiles of weights under one tap."""
        return int(self.pairs.sum())

    @property
    def out(self) -> int:
        return int(self.pairs.shape[0])

    @property
    def inner(self) -> int:
        return int(self.pairs.shape[1])

    @property
    def row_step(self) -> int:
        """Rows of the input from one row of a tile to the next; a kernel of one row skips what it does not use."""
        return self.stride[0] if self.kernel[0] == 1 else 1

    def window(self, s: Schedule) -> Pair:
        """Rows and columns of the input under a full tile and a part of the kernel."""
        rows = (s.rows - 1) * (self.stride[0] // self.row_step) + s.kernel[0]
        return rows, (s.columns - 1) * self.stride[1] + s.kernel[1]

    def parts(self, s: Schedule) -> dict[str, int]:
        """How many tiles in every direction."""
        return {
            "out": -(-self.out // s.out),
            "steps": -(-self._cut(s.out, s.inner)[0] // s.inner)
            * -(-self.kernel[0] // s.kernel[0])
            * -(-self.kernel[1] // s.kernel[1]),
            "pixels": self.rows * -(-self.output[0] // s.rows) * -(-self.output[1] // s.columns),
        }

    def spans(self, out: int) -> list[tuple[int, int]]:
        """Input blocks [first, end) that each tile of `out` output blocks uses."""
        spans = []
        for first in range(0, self.out, out):
            used = np.flatnonzero(self.pairs[first : first + out].any(axis=0))
            spans.append((int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0))
        return spans

    def _cut(self, out: int, inner: int) -> tuple[int, int]:
        """The widest span of input blocks, and the most tiles of weights in one step, when cut like this."""
        key = (out, inner)
        if key not in self.cuts:
            widest = most = 1
            for number, (begin, end) in enumerate(self.spans(out)):
                widest = max(widest, end - begin)
                rows = self.pairs[number * out : (number + 1) * out]
                for first in range(begin, end, inner):
                    most = max(most, int(rows[:, first : min(first + inner, end)].sum()))
            self.cuts[key] = widest, most
        return self.cuts[key]

    def weights(self, s: Schedule) -> int:
        """Tiles of weights in one step, at most."""
        return self._cut(s.out, s.inner)[1] * s.kernel[0] * s.kernel[1]

    def slots(self, s: Schedule) -> Pair:
        """Slots of INP and WGT: for all that is ever loaded, or for what one tile of sums needs."""
        parts, (height, width) = self.parts(s), self.window(s)
        steps, all_weights = parts["steps"], parts["steps"] * parts["out"]
        steps_in = steps if self.is_full else all_weights
        depth = self.config.depth
        inp = slot_count(depth(Memory.INP), height * width * s.inner, s.threads, steps, steps_in * parts["pixels"])
        return inp, slot_count(depth(Memory.WGT), self.weights(s), s.threads, steps, all_weights)

    def fits(self, s: Schedule) -> bool:
        parts, (height, width) = self.parts(s), self.window(s)
        acc = self.config.depth(Memory.ACC) - self.steps.vectors * self.steps.blocks_kept(self.config, s.out)
        tile = s.out * s.rows * s.columns * (2 if self.layer.residual is not None else 1)
        inputs = slots_needed(s.threads, parts["steps"] * parts["pixels"] * parts["out"])
        return (
            tile * s.threads <= acc
            and height * width * s.inner * inputs <= self.config.depth(Memory.INP)
            and self.weights(s) * slots_needed(s.threads, parts["steps"] * parts["out"])
            <= self.config.depth(Memory.WGT)
            and s.rows * s.columns <= MOST_ITERATIONS
        )

    def schedules(self, threads: int) -> Iterator[Schedule]:
        """All that fit, best estimate first."""
        found = []
        depth = self.config.depth
        kernels = {self.kernel, (1, self.kernel[1]), (1, 1)}
        for kernel in sorted(kernels, reverse=True):
            for columns in extents(self.output[1], depth(Memory.ACC)):
                for rows in extents(self.output[0], depth(Memory.ACC) // columns):
                    for inner in extents(self.inner, depth(Memory.INP)):
                        for out in extents(self.out, max(depth(Memory.ACC) // (rows * columns), 1)):
                            s = Schedule(threads, out, inner, rows, columns, kernel)
                            if self.fits(s):
                                found += [
                                    (self.estimate(t), t)
                                    for t in (s, Schedule(threads, out, inner, rows, columns, kernel, False))
                                ]
            if found:
                break  # a cut kernel only where a whole one does not fit
        return best_first(found)

    def estimate(self, s: Schedule) -> float:
        """Cycles, roughly: micro-ops and pipeline starts against what is loaded and stored."""
        parts, (height, width) = self.parts(s), self.window(s)
        element, every = self.config.element_bytes(Memory.INP), parts["out"] * parts["steps"] * parts["pixels"]
        taps, pixels = self.kernel[0] * self.kernel[1], self.rows * self.output[0] * self.output[1]
        in_slots, wgt_slots = self.slots(s)
        steps = parts["steps"]
        one_input = s.inner * (25 + height * width * element / 8 + 2 * height)
        one_weight = 25 + self.weights(s) * self.config.element_bytes(Memory.WGT) / 8
        inputs = steps * parts["pixels"] * (1 if self.is_full else parts["out"])
        weights = steps * parts["out"]
        input_loads, weight_loads = every, every
        if s.weights_stay:
            weight_loads = weights if wgt_slots >= steps else every
            input_loads = inputs if in_slots >= inputs else every
        else:
            input_loads = inputs if in_slots >= steps else every
            weight_loads = weights if wgt_slots >= weights else every
        loads = input_loads * one_input + weight_loads * one_weight
        compute = (
            self.products * taps * pixels + 6 * pixels * self.out + 8 * every + 60 * parts["out"] * parts["pixels"]
        )
        stores = 3 * pixels * self.out + parts["pixels"] * self.out * 8
        work = [compute, loads, stores]
        if s.threads == 1:
            return float(sum(work))
        return max(work) + (one_input + one_weight) + 0.02 * sum(work)
