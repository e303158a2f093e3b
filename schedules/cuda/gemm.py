"""Batched matrix products on CUDA: C[b] = A[b] B[b]^T, real or complex, float32 sums.

A block of threads owns a tile of C, a warp a part of it; tiles of A and B go through shared memory, `stages` of them
in flight (cp.async). fp16 and bf16 are multiplied by tensor cores, float32 by ordinary ones with the same tiles.
Where the rows of A come from and where those of C go is up to the caller, so that permutations, transforms and
epilogues cost no pass of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cuda import device_code
from tvm_structured.schedules.cuda.threads import (
    BYTES,
    VECTOR_BYTES,
    Registers,
    Threads,
    all_of,
    call,
    ceildiv,
    f32,
    launch,
    load_vector,
    when,
)
from tvm_structured.schedules.cuda.tile import Operand, Tile
from tvm_structured.schedules.emit import either

# (threads, batch, row, whether the row exists, first column, (re, im) for each of the neighbouring columns)
Store = Callable[[Threads, Any, Any, Any, Any, Sequence[Sequence[Any]]], None]


class Gemm:
    """One kernel: `batches` products of `rows` x `columns`. `b` is an argument packed by `pack_operand`.

    With a tile that splits k (one real product only) the parts take the place of batches: their sums are to be added.
    """

    def __init__(
        self,
        tile: Tile,
        dtype: str,
        rows: Extent,
        columns: int,
        a: Operand,
        b: Any,
        *,
        planes: int = 1,
        batches: int = 1,
        split_first: bool = False,
        tensorize: bool = True,
    ) -> None:
        self.tile, self.dtype, self.rows, self.columns = tile, dtype, rows, columns
        self.a, self.b, self.planes, self.batches, self.tensorize = a, b, planes, batches, tensorize
        self.split_first = split_first
        if tile.split > 1:
            assert batches == planes == 1, "only a single product is split"
            self.batches = tile.split
        self.steps = tile.steps(a.depth)
        self.vector = VECTOR_BYTES // BYTES[dtype]
        self.width = tile.depth + self.vector  # a row of a tile in shared memory, padded against bank conflicts
        self.mi, self.ni = tile.rows // tile.warps_m // 16, tile.columns // tile.warps_n // 8
        self.sums = self.mi * self.ni * 4

    def emit(self, store: Store) -> None:
        """store(threads, batch, row, exists, column, values) takes every pair of neighbouring sums."""
        tile = self.tile
        grid = (ceildiv(self.columns, tile.columns), self.batches, ceildiv(self.rows, tile.rows))
        with launch(grid, tile.threads, not self.tensorize) as (t, (bn, batch, bm)):
            self._emit_block(t, (batch, bm * tile.rows, bn))
            self._store(self.acc, store)

    def _emit_block(self, t: Threads, where: tuple[Any, Any, Any]) -> None:
        """The sums of one tile into registers; `where` is its batch, first row and number along the columns."""
        tile, self.t, self.where = self.tile, t, where
        # one allocation: TVM would let A and B share storage if it thought their lives apart
        shape = (tile.stages, self.planes, tile.rows + tile.columns, tile.depth)
        self.shared = t.shared(shape, self.dtype, padding=self.vector, opaque=True)
        self.acc = t.registers(self.planes * self.sums)
        with t.last_stage():
            self.acc.fill()
        self._multiply(self.acc)

    def _multiply(self, acc: Registers) -> None:
        tile, t = self.tile, self.t
        steps = self.steps
        ahead = tile.stages - 1
        with t.last_stage():
            for step in range(ahead):
                if step < steps:
                    self._fetch(step, step)
                self._commit()
        with I.serial(0, steps) as step:
            with t.stage():
                self._wait(max(ahead - 1, 0))
            with t.last_stage():
                with when(step + ahead < steps):
                    self._fetch(step + ahead, (step + ahead) % tile.stages)
                self._commit()
                self._products(acc, step % tile.stages)

    # -- tiles from global to shared memory --------------------------------------------------------------

    def _fetch(self, step: Any, slot: Any) -> None:
        tile, (batch, first_row, bn) = self.tile, self.where
        if tile.split > 1:
            batch, step = 0, batch * self.steps + step
        chunks = tile.depth // self.vector
        from_b = self.planes * tile.columns * chunks

        def copy_b(chunk: Any) -> None:
            plane, rest = chunk // (tile.columns * chunks), chunk % (tile.columns * chunks)
            column, k = rest // chunks, rest % chunks * self.vector
            self._copy((slot, plane, tile.rows + column, k), self.b, (batch, bn, step, plane, column, k), True)

        self._each(from_b, copy_b)

        def place(chunk: Any, per_row: int) -> tuple[Any, Any, Any]:
            plane, rest = chunk // (tile.rows * per_row), chunk % (tile.rows * per_row)
            return plane, rest // per_row, rest % per_row

        def copy_a(chunk: Any) -> None:
            plane, row, part = place(chunk, chunks)
            k = part * self.vector
            valid = self._valid(first_row + row, step * tile.depth + k)
            index = self.a.at(batch, plane, first_row + row, step * tile.depth + k)
            self._copy((slot, plane, row, k), self.a.buffer, index, valid)

        def fetch_a(element: Any) -> None:
            plane, row, k = place(element, tile.depth)
            if self.a.rows_first:
                row, k = element % tile.rows, element // tile.rows % tile.depth
            valid = self._valid(first_row + row, step * tile.depth + k)
            index = self.a.at(batch, plane, first_row + row, step * tile.depth + k)
            value = tirx.if_then_else(valid, self.a.buffer[tuple(index)], tirx.const(0, self.dtype))
            self.shared[slot, plane, row, k] = value

        if self.a.vectors:
            self._each(self.planes * tile.rows * chunks, copy_a)
        else:
            self._each(self.planes * tile.rows * tile.depth, fetch_a)

    def _valid(self, row: Any, k: Any) -> Any:
        conditions = []
        if not isinstance(self.rows, int) or self.rows % self.tile.rows:
            conditions.append(row < self.rows)
        if self.a.depth % (self.tile.depth * self.tile.split):
            conditions.append(k < self.a.depth)
        return all_of(conditions)

    def _each(self, count: int, body: Callable[[Any], None]) -> None:
        """body(i) for i < count, spread over the threads, neighbours to neighbours."""
        threads = self.t.count
        with I.unroll(0, -(-count // threads)) as turn:
            i = turn * threads + self.t.tx
            if count % threads == 0:
                body(i)
            else:
                with when(i < count):
                    body(i)

    def _copy(self, to: Sequence[Any], buffer: Any, index: Sequence[Any], valid: Any) -> None:
        """16 bytes to shared memory, zeros where not `valid`."""
        if self.tensorize:
            flag = tirx.const(True, "bool") if valid is True else valid
            addresses = self.shared.address(*to), I.address_of(buffer[tuple(index)])
            call("ts_copy16", *addresses, flag, source=device_code.COPY)
            return

        def plain() -> None:
            self.shared.set_vector(to, load_vector(buffer, index, self.vector), self.vector)

        def zeros() -> None:
            self.shared.set_vector(to, I.broadcast(tirx.const(0, self.dtype), self.vector), self.vector)

        if valid is True:
            plain()
        else:
            either(valid, plain, zeros)

    def _commit(self) -> None:
        if self.tensorize:
            call("ts_commit", source=device_code.COPY)

    def _wait(self, groups: int) -> None:
        if self.tensorize:
            call(f"ts_wait<{groups}>", source=device_code.COPY)

    # -- products --------------------------------------------------------------------------------------------

    def _corner(self) -> tuple[Any, Any]:
        """First row and column of this warp's part of the tile."""
        warp = self.t.warp
        return warp // self.tile.warps_n * (16 * self.mi), warp % self.tile.warps_n * (8 * self.ni)

    def _products(self, acc: Registers, slot: Any) -> None:
        row, column = self._corner()
        multiply = self._tile_products if self.tensorize else self._plain_products
        if not self.split_first:
            multiply(acc, slot, row, column, PRODUCTS[self.planes])
            return
        either(
            self.where[0] == 0,
            lambda: multiply(acc, slot, row, column, SPLIT),
            lambda: multiply(acc, slot, row, column, PRODUCTS[2]),
        )

    def _tile_products(self, acc: Registers, slot: Any, row: Any, column: Any, products: Products) -> None:

        def a(plane: int, k: Any) -> Any:
            return self.shared.address(slot, plane, row, k)

        def b(plane: int, k: Any) -> Any:
            return self.shared.address(slot, plane, self.tile.rows + column, k)

        apart = (self.tile.rows + self.tile.columns) * self.width
        if self.dtype == "float32":
            name = f"ts_fma<{self.mi}, {self.ni}, {self.width}, {self.tile.depth}>"
            for to, left, right, sign in products:
                call(name, acc.address(to * self.sums), a(left, 0), b(right, 0), f32(sign), source=device_code.FMA)
            return
        parameters = f"{'true' if self.dtype == 'bfloat16' else 'false'}, {self.mi}, {self.ni}, {self.width}"
        for k in range(0, self.tile.depth, 16):
            if products is not PRODUCTS[2]:
                for to, left, right, _ in products:
                    operands = acc.address(to * self.sums), a(left, k), b(right, k)
                    call(f"ts_mma<{parameters}>", *operands, source=device_code.MMA)
            else:
                operands = a(0, k), tirx.const(apart, "int32"), b(0, k), tirx.const(apart, "int32")
                call(f"ts_cmma<{parameters}>", acc.address(), *operands, source=device_code.MMA)

    def _plain_products(self, acc: Registers, slot: Any, row: Any, column: Any, products: Products) -> None:
        with I.serial(0, self.sums) as i:
            m = row + i // (4 * self.ni) * 16 + i % 4 // 2 * 8 + self.t.lane // 4
            n = self.tile.rows + column + i // 4 % self.ni * 8 + self.t.lane % 4 * 2 + i % 2
            with I.serial(0, self.tile.depth) as k:
                for to, left, right, sign in products:
                    term = f32(self.shared[slot, left, m, k]) * f32(self.shared[slot, right, n, k])
                    acc[to * self.sums + i] = acc[to * self.sums + i] + (term if sign > 0 else f32(0.0) - term)

    def _places(self) -> list[Place]:
        """Pairs of sums of this thread, as the fragments have them, in its warp's part of the tile."""
        return [
            Place((m * self.ni + n) * 4 + 2 * half, m * 16 + half * 8 + self.t.lane // 4, n * 8 + self.t.lane % 4 * 2)
            for m, n, half in itertools.product(range(self.mi), range(self.ni), range(2))
        ]

    def _row_exists(self, row: Any) -> Any:
        return True if isinstance(self.rows, int) and self.rows % self.tile.rows == 0 else row < self.rows

    def _store(self, acc: Registers, store: Store) -> None:
        batch, first_row, bn = self.where
        with self.t.last_stage():
            row, column = self._corner()
            for place in self._places():
                values = [[acc[p * self.sums + place.first + j] for p in range(self.planes)] for j in range(2)]
                at_row = first_row + row + place.row
                at_column = bn * self.tile.columns + column + place.column
                store(self.t, batch, at_row, self._row_exists(at_row), at_column, values)


class Place(NamedTuple):
    """A pair of sums: the number of the first, its row and column."""

    first: int
    row: Any
    column: Any


Products = tuple[tuple[int, int, int, float], ...]  # (sum, plane of A, plane of B, sign)
SPLIT: Products = ((0, 0, 0, 1.0), (1, 1, 1, 1.0))
PRODUCTS: dict[int, Products] = {
    1: ((0, 0, 0, 1.0),),
    2: ((0, 0, 0, 1.0), (1, 0, 1, 1.0), (0, 1, 1, -1.0), (1, 1, 0, 1.0)),
}
