"""Geometry of a convolution on the accelerator, and which tiles of it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.lower.builder import MOST_ITERATIONS
from tvm_structured.vta.lower.by_product import can_be_product, residual_by_product
from tvm_structured.vta.lower.epilogue import SMALL_PART, Steps, is_immediate
from tvm_structured.vta.lower.schedule import Schedule, best_first, extents, slot_count, slots_needed
from tvm_structured.vta.operators.base import Weighted
from tvm_structured.vta.operators.windows import Padding, Pair

FEW_PIXELS = 64  # for which a tile of weights is not loaded


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
    def all_steps(self) -> Steps:
        return Steps.of(self.layer)

    @cached_property
    def adds_by_product(self) -> bool:
        """Whether the GEMM core adds the bias: one cycle an element in place of two, for a tile of weights a block."""
        added, pixels = self.all_steps.added, self.rows * self.output[0] * self.output[1]
        few = self.out <= self.config.depth(Memory.WGT) // SMALL_PART and pixels >= FEW_PIXELS
        return few and not is_immediate(added) and can_be_product(self.config, added)

    @cached_property
    def steps(self) -> Steps:
        """Of the ALU."""
        return self.all_steps.without_added if self.adds_by_product else self.all_steps

    def room(self, s: Schedule) -> tuple[int, int]:
        """Elements of INP and WGT for inputs and weights; behind them lie those of the residual and the bias."""
        residual = s.out * s.rows * s.columns if s.residual_by_product else 0
        inp = self.config.depth(Memory.INP) - residual - self.adds_by_product
        wgt = self.config.depth(Memory.WGT) - s.residual_by_product - (self.out if self.adds_by_product else 0)
        return inp, wgt

    def acc_size(self, s: Schedule) -> int:
        """Elements of ACC for one tile, with its residual where that is loaded there."""
        copies = 2 if self.layer.residual is not None and not s.residual_by_product else 1
        return s.out * s.rows * s.columns * copies

    @property
    def has_residual(self) -> bool:
        return self.layer.residual is not None

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
        inp_room, wgt_room = self.room(s)
        inp = slot_count(inp_room, height * width * s.inner, s.threads, steps, steps_in * parts["pixels"])
        return inp, slot_count(wgt_room, self.weights(s), s.threads, steps, all_weights)

    def fits(self, s: Schedule) -> bool:
        parts, (height, width) = self.parts(s), self.window(s)
        acc = self.config.depth(Memory.ACC) - self.steps.vectors * self.steps.blocks_kept(self.config, s.out)
        inp_room, wgt_room = self.room(s)
        inputs = slots_needed(s.threads, parts["steps"] * parts["pixels"] * parts["out"])
        return (
            self.acc_size(s) * s.threads <= acc
            and height * width * s.inner * inputs <= inp_room
            and self.weights(s) * slots_needed(s.threads, parts["steps"] * parts["out"]) <= wgt_room
            and (not s.residual_by_product or residual_by_product(self.config, self.layer.residual))
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
                            ways = [s, replace(s, residual_by_product=True)] if self.has_residual else [s]
                            for way in filter(self.fits, ways):
                                each = way, replace(way, weights_stay=False)
                                found += [(self.estimate(t), t) for t in each]
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
        if s.residual_by_product:
            loads += pixels * self.out * element / 8 + 25 * parts["pixels"] * self.out
        around = 6 if not self.has_residual else 8 if s.residual_by_product else 14  # cycles an element, about
        compute = (
            self.products * taps * pixels + around * pixels * self.out + 8 * every + 60 * parts["out"] * parts["pixels"]
        )
        stores = 3 * pixels * self.out + parts["pixels"] * self.out * 8
        work = [compute, loads, stores]
        if s.threads == 1:
            return float(sum(work))
        return max(work) + (one_input + one_weight) + 0.02 * sum(work)
