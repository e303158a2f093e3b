"""Element by element on the ALU: additions and changes of scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.lower.activations import Activations
from tvm_structured.vta.lower.builder import MOST_ITERATIONS, Builder, Slots, tiles
from tvm_structured.vta.lower.epilogue import AccTile, clip, scale
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.problem import Problem, check_clip
from tvm_structured.vta.lower.schedule import Schedule
from tvm_structured.vta.operators import Int8Add, Int8Rescale, Scale


@dataclass(frozen=True, eq=False)
class Elementwise(Problem):
    """Sum of scaled inputs, clipped; the schedule's `columns` are the elements of a tile."""

    config: VTAConfig
    name: str
    elements: int
    scales: tuple[Scale, ...]
    low: int
    high: int
    reason: str = ""

    def schedules(self, threads: int = 2) -> Iterator[Schedule]:
        # as few parts as fit, and more of them, which start to store sooner
        room = min(self.config.depth(Memory.ACC) // (threads * len(self.scales)), MOST_ITERATIONS, self.elements)
        for size in dict.fromkeys((room, room // 2, room // 4)):
            if size:
                yield Schedule(threads, columns=size)

    def emit(self, b: Builder, s: Schedule, sources: Sequence[str], target: str) -> None:
        size = s.columns * len(self.scales)
        self.check_fits(size * s.threads <= self.config.depth(Memory.ACC) and s.columns <= MOST_ITERATIONS, s)
        slots, activations = Slots(0, size, s.threads), Activations(b)
        for first, count in tiles(self.elements, s.columns):
            start, _ = slots.take(first)
            parts = [AccTile(start + i * s.columns, 1, 0, count, 1) for i in range(len(self.scales))]
            for part, source, by in zip(parts, sources, self.scales, strict=True):
                activations.load(part.first, source, first, count)
                scale(b, part, by)
            for part in parts[1:]:
                b.alu("ADD", start, part.first, *part.loops())
            clip(b, parts[0], self.low, self.high, sum(by.bound for by in self.scales))
            b.store(start, target, first, count)


def add_problem(operator: Int8Add, inputs: tuple[Layout, ...], config: VTAConfig) -> Problem:
    return _problem(operator, (operator.scale_a, operator.scale_b), inputs, config)


def rescale_problem(operator: Int8Rescale, inputs: tuple[Layout, ...], config: VTAConfig) -> Problem:
    return _problem(operator, (operator.scale,), inputs, config)


def _problem(
    operator: Int8Add | Int8Rescale, scales: tuple[Scale, ...], inputs: tuple[Layout, ...], config: VTAConfig
) -> Problem:
    check_clip(config, operator.name, operator.low, operator.high)
    return Elementwise(config, operator.name, inputs[0].elements, scales, operator.low, operator.high)
