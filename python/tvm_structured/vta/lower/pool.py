"""Pooling on the ALU: one instruction for each place in the window, over the pixels for which it is inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.lower.activations import Activations
from tvm_structured.vta.lower.builder import MOST_ITERATIONS, Builder, Slots, tiles
from tvm_structured.vta.lower.epilogue import AccTile, clip, immediate, scale
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.problem import Problem, check_clip
from tvm_structured.vta.lower.schedule import Schedule, best_first, extents
from tvm_structured.vta.lower.uop_kernels import Loop
from tvm_structured.vta.operators import Int8AvgPool, Int8MaxPool
from tvm_structured.vta.operators.windows import Pair

Span = tuple[int, int]  # first, count


@dataclass(frozen=True, eq=False)
class Pooling(Problem):
    """Windows of one operator; `images` are blocks of the batch times blocks of channels."""

    config: VTAConfig
    operator: Int8MaxPool | Int8AvgPool
    images: int
    size: Pair
    output: Pair
    reason: str = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.operator.name

    def window(self, s: Schedule) -> int:
        """Elements of one image under a full tile and a part of the kernel."""
        down, across = self.operator.stride
        height, width = (s.rows - 1) * down + s.kernel[0], (s.columns - 1) * across + s.kernel[1]
        return min(height, self.size[0]) * min(width, self.size[1])

    def fits(self, s: Schedule) -> bool:
        whole = s.out * (s.rows * s.columns + self.window(s)) * s.threads
        return whole <= self.config.depth(Memory.ACC) and s.rows * s.columns <= MOST_ITERATIONS

    def schedules(self, threads: int = 2) -> Iterator[Schedule]:
        found = []
        depth, kernel = self.config.depth(Memory.ACC), self.operator.kernel
        for part in sorted({kernel, (1, kernel[1]), (1, min(kernel[1], 8)), (1, 1)}, reverse=True):
            for columns in extents(self.output[1], depth):
                for rows in extents(self.output[0], depth):
                    for out in extents(self.images, depth):
                        s = Schedule(threads, out, 1, rows, columns, part)
                        if self.fits(s):
                            found.append((self.estimate(s), s))
            if found:
                break
        return best_first(found)

    def estimate(self, s: Schedule) -> float:
        parts = -(-self.images // s.out) * -(-self.output[0] // s.rows) * -(-self.output[1] // s.columns)
        kernel = self.operator.kernel
        steps = parts * -(-kernel[0] // s.kernel[0]) * -(-kernel[1] // s.kernel[1])
        return steps * s.out * (24 + 2.3 * self.window(s)) + parts * (8 * kernel[0] * kernel[1] + 60)

    def emit(self, b: Builder, s: Schedule, sources: Sequence[str], target: str) -> None:
        self.check_fits(self.fits(s), s)
        slots, activations = Slots(0, s.out * (s.rows * s.columns + self.window(s)), s.threads), Activations(b)
        count = 0
        for images in tiles(self.images, s.out):
            for y in tiles(self.output[0], s.rows):
                for x in tiles(self.output[1], s.columns):
                    acc, _ = slots.take(count)
                    count += 1
                    self._tile(b, s, activations, acc, images, y, x, sources[0], target)

    def _tile(
        self, b: Builder, s: Schedule, activations: Activations, acc: int, images: Span, y: Span, x: Span,
        source: str, target: str,
    ) -> None:  # fmt: skip
        operator, pixels = self.operator, y[1] * x[1]
        tile = AccTile(acc, images[1], pixels, pixels, 1)
        b.zero(acc, tile.count)
        if isinstance(operator, Int8MaxPool):
            immediate(b, tile, "MIN", -128)
        for ky in tiles(operator.kernel[0], s.kernel[0]):
            for kx in tiles(operator.kernel[1], s.kernel[1]):
                self._step(b, activations, acc, acc + tile.count, images, y, x, ky, kx, source)
        if isinstance(operator, Int8AvgPool):
            scale(b, tile, operator.scale)
        clip(b, tile, operator.low, operator.high, 128 if isinstance(operator, Int8MaxPool) else 1 << 31)
        height, width = self.output
        for image in range(images[1]):
            first = ((images[0] + image) * height + y[0]) * width + x[0]
            window = (pixels, 1, 0) if x[1] == width else (x[1], y[1], width)
            b.store(acc + image * pixels, target, first, *window)

    def _step(
        self, b: Builder, activations: Activations, acc: int, window: int, images: Span, y: Span, x: Span, ky: Span,
        kx: Span, source: str,
    ) -> None:  # fmt: skip
        """Some places of the window."""
        rows, columns = (self._inside(axis, tile, taps) for axis, tile, taps in ((0, y, ky), (1, x, kx)))
        if not rows[1] or not columns[1]:
            return
        area = rows[1] * columns[1]
        for image in range(images[1]):
            first = ((images[0] + image) * self.size[0] + rows[0]) * self.size[1] + columns[0]
            whole = columns[1] == self.size[1]
            shape = (area, 1, 0) if whole else (columns[1], rows[1], self.size[1])
            activations.load(window + image * area, source, first, *shape)
        operation = "MAX" if isinstance(self.operator, Int8MaxPool) else "ADD"
        every = np.arange(images[1])
        for i in range(ky[0], ky[0] + ky[1]):
            top, down = self._pixels(0, y, i)
            for j in range(kx[0], kx[0] + kx[1]):
                left, across = self._pixels(1, x, j)
                if not down or not across:
                    continue
                place = (self._source(0, top, i) - rows[0]) * columns[1] + self._source(1, left, j) - columns[0]
                b.alu(
                    operation,
                    acc + every * y[1] * x[1] + (top - y[0]) * x[1] + left - x[0],
                    window + every * area + place,
                    Loop(down, x[1], self.operator.stride[0] * columns[1]),
                    Loop(across, 1, self.operator.stride[1]),
                )

    def _source(self, axis: int, pixel: int, tap: int) -> int:
        """Row or column of the input."""
        return pixel * self.operator.stride[axis] + tap - self.operator.padding[axis]

    def _inside(self, axis: int, tile: Span, taps: Span) -> Span:
        """Rows or columns of the input that a tile needs."""
        first = max(self._source(axis, tile[0], taps[0]), 0)
        last = min(self._source(axis, tile[0] + tile[1] - 1, taps[0] + taps[1] - 1), self.size[axis] - 1)
        return first, max(last - first + 1, 0)

    def _pixels(self, axis: int, tile: Span, tap: int) -> Span:
        """Pixels of a tile for which one place of the window lies inside the input."""
        stride, offset = self.operator.stride[axis], tap - self.operator.padding[axis]
        first = max(tile[0], -(offset // stride))
        last = min(tile[0] + tile[1] - 1, (self.size[axis] - 1 - offset) // stride)
        return first, max(last - first + 1, 0)


def pool_problem(operator: Int8MaxPool | Int8AvgPool, inputs: tuple[Layout, ...], config: VTAConfig) -> Problem:
    check_clip(config, operator.name, operator.low, operator.high)
    shape = inputs[0]
    output = operator.output_shape(shape.shape)
    return Pooling(config, operator, shape.rows * shape.channels, shape.size, (output[2], output[3]))
