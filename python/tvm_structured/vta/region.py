"""Several lowered operators as one run: where their tensors lie in DRAM, and one table of all their instructions.

Operators follow each other in DRAM: the result of one is, where it lies, the input of the next. Emitted functions fill
DRAM before the run and read it afterwards, so that a compiled module needs nothing but TVM's runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import VTAConfig
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.lowered import Lowered, aligned
from tvm_structured.vta.machine import PAGE

Tensor = str


@dataclass(frozen=True, eq=False)
class Step:
    """A lowered operator and the tensors that it reads and makes."""

    lowered: Lowered
    inputs: tuple[Tensor, ...]
    output: Tensor


@dataclass(frozen=True, eq=False)
class Placed:
    """A tensor in DRAM: its first byte and how it lies there."""

    address: int
    layout: Layout


@dataclass(frozen=True, eq=False)
class Region:
    """Steps in DRAM. `constants` lie from byte `first_constant` on; `table` has the rows that are executed."""

    config: VTAConfig
    steps: tuple[Step, ...]
    inputs: tuple[Placed, ...]
    results: tuple[Placed, ...]
    constants: NDArray[np.uint8]
    first_constant: int
    dram_bytes: int
    table: NDArray[np.int64]

    @classmethod
    def plan(
        cls,
        config: VTAConfig,
        steps: Sequence[Step],
        inputs: Mapping[Tensor, Layout],
        results: Sequence[tuple[Tensor, Layout]],
    ) -> Region:
        """`inputs` are there before the run, `results` are read after it; all other tensors share memory in time.

        Raises VTAError where a program is faulty, or touches memory that is not its own.
        """
        first = aligned(PAGE, config)
        constants, places = gather_constants(steps, first)
        memory = DramPlan(config, first + constants.size)
        last_use = {name: index for index, step in enumerate(steps) for name in step.inputs}
        kept = {name for name, _ in results}
        addresses = {name: memory.take(layout.nbytes) for name, layout in inputs.items()}
        sizes = {name: layout.nbytes for name, layout in inputs.items()}
        placed = []
        for index, (step, place) in enumerate(zip(steps, places, strict=True)):
            lowered = step.lowered
            addresses[step.output], sizes[step.output] = memory.take(lowered.output.nbytes), lowered.output.nbytes
            scratch = memory.take(lowered.sizes["scratch"])
            regions = {f"input{i}": addresses[name] for i, name in enumerate(step.inputs)}
            moved = lowered.placed(
                {**regions, "output": addresses[step.output], "constants": place, "scratch": scratch}
            )
            placed.append(Step(moved, step.inputs, step.output))
            memory.give(scratch, lowered.sizes["scratch"])
            for name in {*step.inputs, step.output}:
                if last_use.get(name, -1) <= index and name not in kept:
                    memory.give(addresses[name], sizes[name])
        return cls(
            config,
            tuple(placed),
            tuple(Placed(addresses[name], layout) for name, layout in inputs.items()),
            tuple(Placed(addresses[name], layout) for name, layout in results),
            constants,
            first,
            memory.end,
            table_of_steps(placed),
        )


def gather_constants(steps: Sequence[Step], first: int) -> tuple[NDArray[np.uint8], list[int]]:
    """All constants behind each other, and where those of each step begin in DRAM."""
    parts, places, end = [np.zeros(0, np.uint8)], [], first
    for step in steps:
        raw = step.lowered.constants
        size = aligned(raw.size, step.lowered.config)
        parts.append(np.pad(raw, (0, size - raw.size)))
        places.append(end)
        end += size
    return np.concatenate(parts), places


def table_of_steps(steps: Sequence[Step]) -> NDArray[np.int64]:
    """The instructions of all programs in the order of execution, less those that only move tokens."""
    tables = []
    for step in steps:
        program = step.lowered.program
        program.check_memory(step.lowered.regions)
        order = program.order().indices
        rows = program.table[order]
        tables.append(rows[rows[:, 0] >= 0])
    return np.ascontiguousarray(np.concatenate(tables))


class DramPlan:
    """Memory from a byte on; what was given back is used again, the first part that is large enough first."""

    def __init__(self, config: VTAConfig, first: int) -> None:
        self.config, self.end = config, first
        self.free: list[tuple[int, int]] = []  # (first byte, bytes), in order

    def take(self, nbytes: int) -> int:
        size = aligned(max(nbytes, 1), self.config)
        for index, (start, available) in enumerate(self.free):
            if available >= size:
                self.free[index : index + 1] = [(start + size, available - size)] if available > size else []
                return start
        start = self.end
        self.end += size
        return start

    def give(self, start: int, nbytes: int) -> None:
        spans = sorted([*self.free, (start, aligned(max(nbytes, 1), self.config))])
        self.free = spans[:1]
        for first, size in spans[1:]:
            before, length = self.free[-1]
            if before + length == first:
                self.free[-1] = (before, length + size)
            else:
                self.free.append((first, size))
