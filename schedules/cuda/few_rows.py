"""Products for few rows of x: bound by the bytes of the weight and by the launch, so one kernel and no tiles.

A block of threads computes `group` output units for `rows` rows of x; its threads share out the input units among them
and add up their partial sums in shared memory. A unit is what a structure makes of it: a block of a circulant or
permuted-diagonal matrix, 16 bytes of a dense row. Weights are packed so that neighbouring threads read neighbouring
16 bytes:

    packed (out units / group, group, chunks of a unit, in units, elements of 16 bytes)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cuda.functions import numpy_type
from tvm_structured.schedules.cuda.threads import (
    BYTES,
    VECTOR_BYTES,
    Registers,
    Threads,
    all_of,
    ceildiv,
    f32,
    i32,
    launch,
    load_vector,
    multiple,
    under,
)

MOST_LANES = 8  # of 128 partial sums, 8 threads add up 16 each and one thread the 8


@dataclass(frozen=True)
class Few:
    """Threads of a block, output units and rows of x to a block."""

    threads: int = 128
    group: int = 2
    rows: int = 1

    @classmethod
    def of(cls, config: Any) -> Few:
        return cls(*config)


def pack_units(weight: np.ndarray, few: Few, dtype: str) -> np.ndarray:
    """(out units, in units, elements) -> the packed form of this module; what is missing is zero."""
    out, inner, size = weight.shape
    vector = VECTOR_BYTES // BYTES[dtype]
    groups, chunks = -(-out // few.group), -(-size // vector)
    padded = np.zeros((groups * few.group, inner, chunks * vector), np.float32)
    padded[:out, :, :size] = weight
    cut = padded.reshape(groups, few.group, inner, chunks, vector)
    return np.ascontiguousarray(cut.transpose(0, 1, 3, 2, 4)).astype(numpy_type(dtype))


class FewRows:
    """Emits one such kernel.

    rows: of x. units: (out, in). sums: results of one output unit for one row. share: so many output units in
    succession use the same weights; `few.group` is 1 then. stride: so many of the threads have work.
    multiply(kernel, acc, first, unit, weight, x, row): adds to `sums` registers of acc from `first` on what the unit
    contributes; `weight` and `x` are float32 registers. fetch(kernel, unit, row) -> x in float32 registers.
    """

    def __init__(
        self,
        few: Few,
        dtype: str,
        rows: Extent,
        units: tuple[int, int],
        size: int,
        sums: int,
        packed: Any,
        tensorize: bool,
        share: int = 1,
        stride: int | None = None,
    ) -> None:
        self.few, self.dtype, self.rows, self.units, self.size, self.sums = few, dtype, rows, units, size, sums
        self.packed, self.tensorize, self.share = packed, tensorize, share
        self.stride = few.threads if stride is None else stride
        self.vector = VECTOR_BYTES // BYTES[dtype]
        self.chunks = -(-size // self.vector)

    def emit(
        self,
        fetch: Callable[[FewRows, Any, Any], Registers],
        multiply: Callable[[FewRows, Registers, int, Any, Any, Registers, Registers], None],
        store: Callable[[FewRows, Any, Any, Any, Any, Any], None],
        turned: Callable[[FewRows, int, int], Any] | None = None,
    ) -> None:
        """store(kernel, total, row, output unit, which of its sums, conditions).

        turned(kernel, unit in the group, which): the sum that a thread's register `which` belongs to, if not that one.
        """
        few, out = self.few, self.units[0]
        grid = (ceildiv(out, few.group), ceildiv(self.rows, few.rows))
        with launch(grid, few.threads, not self.tensorize) as (self.t, (self.group, block_row)):
            t, self.first_row = self.t, block_row * few.rows
            count = few.group * few.rows * self.sums
            acc = t.registers(count)
            with t.last_stage():
                acc.fill()
                self._accumulate(acc, fetch, multiply)
            self._reduce(acc, count, store, turned)

    def _accumulate(self, acc: Registers, fetch: Any, multiply: Any) -> None:
        few, inner, t = self.few, self.units[1], self.t
        stride = self.stride
        turns = -(-inner // stride)
        weight = t.registers(few.group * self.chunks * self.vector)

        def turn(number: Any, certain: bool) -> None:
            unit = number * stride + t.tx
            works = True if stride == few.threads else t.tx < stride
            condition = all_of([works, True if certain else unit < inner])
            under(condition, lambda: self._unit(acc, weight, unit, fetch, multiply))

        full = inner // stride
        if full:
            with I.serial(0, full) as number:
                turn(number, True)
        if turns > full:
            turn(full, False)

    def _unit(self, acc: Registers, weight: Registers, unit: Any, fetch: Any, multiply: Any) -> None:
        few, t = self.few, self.t
        width = self.chunks * self.vector
        raw = t.registers(few.group * width, self.dtype)
        for g in range(few.group):
            for chunk in range(self.chunks):
                vector = load_vector(self.packed, (self.group // self.share, g, chunk, unit, 0), self.vector)
                raw.set_vector((g * self.chunks + chunk) * self.vector, vector, self.vector)
        for i in range(few.group * width):
            weight[i] = f32(raw[i])
        for r in range(few.rows):
            row = self.existing(self.first_row + r)
            x = fetch(self, unit, row)
            for g in range(few.group):
                first = (g * few.rows + r) * self.sums
                multiply(self, acc, first, unit, weight, g * width, x)

    def existing(self, row: Any) -> Any:
        """The row, or the last one there is."""
        if (isinstance(self.rows, int) and self.rows % self.few.rows == 0) or self.few.rows == 1:
            return row
        return tirx.Min(row, i32(self.rows) - 1)

    def fetch_run(self, x: Any, row: Any, first: Any, count: int, exists: Callable[[Any], Any] | None) -> Registers:
        """x[row, first : first + count] in float32 registers. Without `exists` all do, and `first` is aligned."""
        t = self.t
        values = t.registers(count)
        if exists is None and count % self.vector == 0:
            raw = t.registers(count, self.dtype)
            for k in range(0, count, self.vector):
                raw.set_vector(k, load_vector(x, (row, first + k), self.vector), self.vector)
            for k in range(count):
                values[k] = f32(raw[k])
            return values
        for k in range(count):
            value = f32(x[row, first + k])
            values[k] = value if exists is None else tirx.if_then_else(exists(k), value, f32(0.0))
        return values

    def fetch_one(self, x: Any, row: Any, column: Any, exists: Any) -> Any:
        """x[row, column] in float32, zero unless it exists."""
        value = f32(x[row, column])
        return value if exists is True else tirx.if_then_else(exists, value, f32(0.0))

    def _reduce(self, acc: Registers, count: int, store: Any, turned: Any) -> None:
        few, t, out = self.few, self.t, self.units[0]
        lanes = 1  # threads that add up the parts of one sum
        while lanes < MOST_LANES and lanes * 2 * count <= few.threads:
            lanes *= 2
        parts = t.shared((count, few.threads), "float32", padding=lanes)
        with t.stage():
            for i in range(count):
                which: Any = i % self.sums
                if turned is not None:
                    which = turned(self, i // (few.rows * self.sums), which)
                parts[i // self.sums * self.sums + which, t.tx] = acc[i]
        if lanes > 1:
            some = t.shared((count, lanes), "float32", padding=1)
            with t.stage():
                which, lane = t.tx // lanes, t.tx % lanes
                under(which < count, lambda: self._add(parts, which, lane, lanes, some))
            parts = some
        width = lanes if lanes > 1 else few.threads
        with t.last_stage():
            for turn in range(-(-count // few.threads)):
                which = turn * few.threads + t.tx
                condition = True if (turn + 1) * few.threads <= count else which < count
                under(condition, lambda which=which: self._finish(parts, which, width, out, store))

    def _add(self, parts: Any, which: Any, lane: Any, lanes: int, some: Any) -> None:
        total = self.t.registers(1)
        total[0] = f32(0.0)
        with I.serial(0, self.few.threads // lanes) as k:
            total[0] = total[0] + parts[which, k * lanes + lane]
        some[which, lane] = total[0]

    def _finish(self, parts: Any, which: Any, width: int, out: int, store: Any) -> None:
        few = self.few
        total = self.t.registers(1)
        total[0] = f32(0.0)
        with I.serial(0, width) as k:
            total[0] = total[0] + parts[which, k]
        unit = self.group * few.group + which // (few.rows * self.sums)
        row = self.first_row + which // self.sums % few.rows
        conditions = [True if out % few.group == 0 else unit < out]
        complete = few.rows == 1 or (isinstance(self.rows, int) and self.rows % few.rows == 0)
        conditions.append(True if complete else row < self.rows)
        store(self, total[0], row, unit, which % self.sums, conditions)


__all__ = ["Few", "FewRows", "Threads", "multiple", "pack_units"]
