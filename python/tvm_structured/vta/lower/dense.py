"""Matrix products of tiles: dense layers, and every factor of a chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.lower.builder import MOST_ITERATIONS, Builder, Slots, tiles
from tvm_structured.vta.lower.epilogue import AccTile, Epilogue, Steps
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.problem import Problem, check_values
from tvm_structured.vta.lower.schedule import Schedule, best_first, extents, slot_count, slots_needed
from tvm_structured.vta.lower.tile_matrix import TileMatrix
from tvm_structured.vta.lower.uop_kernels import Loop
from tvm_structured.vta.operators import Int8Dense
from tvm_structured.vta.operators.base import Weighted


@dataclass(frozen=True, eq=False)
class Product(Problem):
    """One layer, its weight as tiles, and the blocks of rows of its input."""

    config: VTAConfig
    layer: Weighted
    matrix: TileMatrix
    rows: int
    reason: str = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.layer.name

    @cached_property
    def steps(self) -> Steps:
        return Steps.of(self.layer)

    @property
    def spare(self) -> int:
        """Copies of a tile in ACC beside the sums."""
        return int(self.layer.residual is not None)

    def fits(self, s: Schedule) -> bool:
        m = self.matrix
        chunks = -(-m.columns // s.inner) * -(-self.rows // s.rows)
        weights = chunks * -(-m.rows // s.out)
        acc = self.config.depth(Memory.ACC) - self.steps.vectors * self.steps.blocks_kept(self.config, s.out)
        return (
            s.rows * s.inner * slots_needed(s.threads, chunks) <= self.config.depth(Memory.INP)
            and self.most_tiles(s) * slots_needed(s.threads, weights) <= self.config.depth(Memory.WGT)
            and s.rows * s.out * (1 + self.spare) * s.threads <= acc
            and s.rows <= MOST_ITERATIONS
        )

    def slots(self, s: Schedule) -> tuple[int, int]:
        """Slots of INP and WGT: for all that is ever loaded, or for what one tile of sums needs."""
        outs, chunks, rows = -(-self.matrix.rows // s.out), -(-self.matrix.columns // s.inner), -(-self.rows // s.rows)
        inp = slot_count(self.config.depth(Memory.INP), s.rows * s.inner, s.threads, chunks, chunks * rows)
        return inp, slot_count(self.config.depth(Memory.WGT), self.most_tiles(s), s.threads, chunks, chunks * outs)

    def most_tiles(self, s: Schedule) -> int:
        full = s.out * s.inner
        # only sharing and skipping make it worth counting
        return full if len(self.matrix.tiles) == self.matrix.rows * self.matrix.columns else min(
            full, self.matrix.most_tiles(s.out, s.inner)
        )  # fmt: skip

    def schedules(self, threads: int = 2) -> Iterator[Schedule]:
        """All that fit, best estimate first."""
        found = []
        for out in extents(self.matrix.rows, self.config.depth(Memory.ACC)):
            for inner in extents(self.matrix.columns, self.config.depth(Memory.INP)):
                for rows in extents(self.rows, self.config.depth(Memory.INP)):
                    s = Schedule(threads, out, inner, rows)
                    if self.fits(s):
                        for stay in (True, False):
                            s = Schedule(threads, out, inner, rows, weights_stay=stay)
                            found.append((self.estimate(s), s))
        return best_first(found)

    def estimate(self, s: Schedule) -> float:
        """Cycles, roughly: what is loaded, and what is started."""
        m = self.matrix
        parts = [-(-m.rows // s.out), -(-m.columns // s.inner), -(-self.rows // s.rows)]
        every = parts[0] * parts[1] * parts[2]
        weights = min(len(m.entries), self.most_tiles(s) * parts[0] * parts[1]) * self.config.element_bytes(Memory.WGT)
        inputs = self.rows * m.columns * self.config.element_bytes(Memory.INP)
        held_inputs, held_weights = self.slots(s)
        if s.weights_stay:
            weights *= 1 if held_weights >= parts[1] else parts[2]
            inputs *= 1 if held_inputs >= parts[1] * parts[2] else parts[0]
        else:
            weights *= 1 if held_weights >= parts[1] * parts[0] else parts[2]
            inputs *= 1 if held_inputs >= parts[1] else parts[0]
        compute = len(m.entries) * self.rows + 12 * every + parts[0] * parts[2] * 50
        loads = (weights + inputs) / 8 + 25 * (every + min(every, parts[1] * parts[2]))
        return max(compute, loads) + 0.1 * min(compute, loads) + loads / max(every, 1)

    def emit(self, b: Builder, s: Schedule, sources: Sequence[str], target: str) -> None:
        emit_product(b, self, s, sources, target)


def emit_product(b: Builder, product: Product, s: Schedule, sources: Sequence[str], target: str) -> None:
    """Instructions of the product, from the regions `sources` to region `target`."""
    m, layer = product.matrix, product.layer
    product.check_fits(product.fits(s), s)
    vectors, kept_blocks = product.steps.vectors, product.steps.blocks_kept(b.config, s.out)
    kept = vectors * kept_blocks
    size = s.rows * s.out * (1 + product.spare)
    accs = Slots(kept, size, s.threads)
    inp_slots, wgt_slots = product.slots(s)
    inps, wgts = Slots(0, s.rows * s.inner, inp_slots), Slots(0, product.most_tiles(s), wgt_slots)
    epilogue = Epilogue(b, layer, product.steps, kept_blocks, Slots(0, kept_blocks, vectors))

    def inputs(row: int, rows: int, column: int, columns: int) -> int:
        start, is_present = inps.take((row, column))
        if not is_present:
            b.load(Memory.INP, start, sources[0], row * m.columns + column, columns, rows, m.columns)
        return start

    def weights(numbers: np.ndarray) -> int:
        key = numbers.tobytes()
        start, is_present = wgts.take(key)
        if not is_present:
            first = b.constant(Memory.WGT, (id(m), key), len(numbers), lambda: m.tiles[numbers])
            b.load(Memory.WGT, start, "WGT", first, len(numbers))
        return start

    def one(count: int, row: int, rows: int, out: int, outs: int) -> None:
        acc, _ = accs.take(count)
        b.zero(acc, rows * outs)
        for column, columns in tiles(m.columns, s.inner):
            entries = m.part((out, out + outs), (column, column + columns))
            if not len(entries):
                continue
            numbers, first, place = np.unique(entries[:, 2], return_index=True, return_inverse=True)
            order = np.argsort(first)  # in DRAM as they are used
            rank = np.argsort(order)
            inp, wgt = inputs(row, rows, column, columns), weights(numbers[order])
            uops = entries + np.array([acc - out, inp - column, 0])
            uops[:, 2] = wgt + rank[place.reshape(-1)]
            b.gemm(uops, Loop(rows, outs, columns) if rows > 1 else None)
        tile = AccTile(acc, outs, 1, rows, outs)

        def load_residual(spare: int) -> None:
            b.load(Memory.ACC_8BIT, spare, sources[1], row * m.rows + out, outs, rows, m.rows)

        epilogue(tile, out, lambda: epilogue.add_loaded(tile, acc + rows * outs, load_residual))
        b.store(acc, target, row * m.rows + out, outs, rows, m.rows)

    outer, inner = list(tiles(m.rows, s.out)), list(tiles(product.rows, s.rows))
    pairs = [(r, o) for o in outer for r in inner] if s.weights_stay else [(r, o) for r in inner for o in outer]
    for count, ((row, rows), (out, outs)) in enumerate(pairs):
        one(count, row, rows, out, outs)


def dense_problem(layer: Int8Dense, inputs: tuple[Layout, ...], config: VTAConfig) -> Problem:
    check_values(config, layer)
    return Product(config, layer, TileMatrix.from_dense(layer.weight, config.block, False, False), inputs[0].rows)
