"""Blocks of a row in vector lanes: x (rows, in) -> element c of `lanes` blocks in one vector, and back to y."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from tvm_structured.schedules import fft
from tvm_structured.schedules.emit import Emitter, local, scratch, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import branch
from tvm_structured.structures.circulant_pattern import Blocks


class LaneBlocks:
    """n vectors: vector c holds element c of `lanes` consecutive blocks. In registers where they fit."""

    def __init__(self, e: Emitter, blocks: Blocks) -> None:
        self.e, self.blocks, self.n = e, blocks, blocks.length
        self.chunks = -(-self.n // e.lanes)
        self.in_registers = self.chunks == 1
        array = local if fft.is_straight(self.n) else scratch  # a long block does not belong on the stack
        self.store = e.registers(e.lanes) if self.in_registers else array((self.chunks * e.lanes, e.lanes))
        # a power of two below the lanes: consecutive vectors are separated by shuffles, else squares are transposed
        self.dense_lanes = self.n < e.lanes and self.n & (self.n - 1) == 0

    def get(self, c: Any) -> Any:
        return self.store[c][0] if self.in_registers else self.e.load(self.store, c, 0)

    def set(self, c: Any, vector: Any) -> None:
        if self.in_registers:
            self.e.set(self.store[c], vector)
        else:
            self.e.store(self.store, vector, c, 0)

    # -- x ---------------------------------------------------------------------------------------

    @property
    def is_contiguous(self) -> bool:
        """Whether a tap's padding never separates two blocks."""
        return self.blocks.taps == 1 or self.blocks.width % self.n == 0

    def load(self, x: Any, row: Any, group: Any) -> None:
        """Group number `group` of a row; zero where there are no features."""
        in_groups = -(-self.blocks.factor_shape[1] // self.e.lanes)
        inside = self.groups_inside()
        is_inside = inside == in_groups if inside in (0, in_groups) else group < inside
        branch(
            is_inside,
            lambda: self._load(x, row, group, False),
            lambda: self._load(x, row, group, True),
        )

    def groups_inside(self) -> int:
        """How many groups, from the first one, can be read without masks."""
        if not self.is_contiguous:
            return 0
        reach = 0 if self.dense_lanes else self.chunks * self.e.lanes - self.n  # the last vector reads so much further
        return max(0, self.blocks.shape[1] - reach) // (self.e.lanes * self.n)

    def _load(self, x: Any, row: Any, group: Any, masked: bool) -> None:
        e, inner = self.e, self.blocks.shape[1]

        def vector(feature: Any, limit: Any) -> Any:
            if not masked:
                return e.bind(e.load(x, row, feature))
            mask = e.bind_mask(feature, limit)
            # two statements: inside the Select TVM would take the load's mask for true and read out of bounds
            loaded = e.bind(e.load_masked(x, mask, row, feature))
            return e.bind(tirx.Select(mask, loaded, e.splat(0.0)))

        if self.dense_lanes and self.is_contiguous:
            first = group * (e.lanes * self.n)
            for c, element in enumerate(
                fft.deinterleave(e, [vector(first + q * e.lanes, inner) for q in range(self.n)])
            ):
                self.set(c, element)
            return

        def square(chunk: Any) -> None:
            rows = []
            for lane in range(e.lanes):
                start, limit = self.block_range(group * e.lanes + lane)
                rows.append(vector(start + chunk * e.lanes, limit))
            for c, element in enumerate(fft.deinterleave(e, rows)):
                self.set(chunk * e.lanes + c, element)

        self.each_chunk(square, self.chunks)

    def block_range(self, block: Any) -> tuple[Any, Any]:
        """Where a block of x begins and where its tap ends."""
        inner, width = self.blocks.shape[1], self.blocks.width
        if self.is_contiguous:
            return block * self.n, inner
        tap = block // self.blocks.columns
        return tap * width + block % self.blocks.columns * self.n, tirx.min((tap + 1) * width, inner)

    def each_chunk(self, body: Any, count: int) -> None:
        """body(chunk) in a loop; straight where registers need to be known."""
        if count == 1:
            body(0)
        elif count:
            with serial(0, count) as chunk:
                body(chunk)

    # -- y ---------------------------------------------------------------------------------------

    def write(self, writer: RowWriter, row: Any, group: Any) -> None:
        """Store group number `group` of a row of y, through the epilogue."""
        out, lanes = self.blocks.shape[0], self.e.lanes
        out_groups = -(-self.blocks.rows // lanes)
        inside = out // (self.n * lanes)
        is_inside = inside == out_groups if inside in (0, out_groups) else group < inside
        branch(
            is_inside,
            lambda: self._write(writer, row, group, False),
            lambda: self._write(writer, row, group, True),
        )

    def _write(self, writer: RowWriter, row: Any, group: Any, masked: bool) -> None:
        e, out = self.e, self.blocks.shape[0]
        if self.dense_lanes:
            first = group * (e.lanes * self.n)
            for q, vector in enumerate(fft.interleave(e, [self.get(c) for c in range(self.n)])):
                writer.store(vector, row, first + q * e.lanes, masked)
            return

        def square(chunk: Any, partial: bool) -> None:
            vectors = fft.interleave(e, [self.get(chunk * e.lanes + c) for c in range(e.lanes)])
            for lane, vector in enumerate(vectors):
                start = (group * e.lanes + lane) * self.n
                end = tirx.min(start + self.n, out) if masked else start + self.n
                writer.store(vector, row, start + chunk * e.lanes, masked or partial, end if partial else None)

        full = self.n // e.lanes
        self.each_chunk(lambda chunk: square(chunk, False), full)
        if self.n % e.lanes:
            square(full, True)
