"""DeBut: y = F_N ... F_1 x, neighbouring factors multiplied at compile time, the rest fused over chunks in cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from tvm_structured.schedules.base import Config, Kernel, Site
from tvm_structured.schedules.debut_plan import (
    ROWS_IN_REGISTERS,
    Stage,
    Tile,
    cheapest_cuts,
    merge,
    narrowed,
    split_for_threads,
    tile_of,
)
from tvm_structured.schedules.debut_stage import Place, StageEmitter, Store, pack_stage
from tvm_structured.schedules.emit import Emitter, arg, either, held, local, parallel, prim_func, scratch, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import even_blocks
from tvm_structured.structures.base import Structure
from tvm_structured.structures.debut_fit import merge_all

LARGEST_ON_STACK = 16 << 10  # floats; larger intermediates go to the heap
LARGEST_BETWEEN = 1 << 16  # floats of one intermediate of all vectors at once: both stay in the level-2 cache
MOST_ROWS = 32
FEW_OPERATIONS = 400_000  # starting the other threads takes as long as these on one
FEW_ROWS = 4  # input vectors for each thread, up to which the work on each vector is shared out


class DeButKernel(Kernel):
    """Threads over input vectors; where they are few, over blocks of the first stages and, in a second region, over
    positions of the others."""

    name = "debut"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        known = site.rows if isinstance(site.rows, int) else None
        threads = 1 if known is not None and structure.flops(known) < FEW_OPERATIONS else site.cpu.cores
        few = known is not None and known <= FEW_ROWS * threads
        most = ROWS_IN_REGISTERS if known is None else rows_in_cache(structure)  # an unknown rest goes one by one
        units = dict.fromkeys((most, ROWS_IN_REGISTERS, ROWS_IN_REGISTERS // 2, 2 * most))
        for unit, shares_vectors in itertools.product(units, (few, not few)):
            rows = unit if known is None else max(1, min(unit, known if shares_vectors else -(-known // threads)))
            cuts = cheapest_cuts(stages_of(structure), site.cpu, rows)
            yield {"cuts": list(cuts), "rows": rows, "threads": threads, "shares_vectors": shares_vectors}

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        grids = [np.asarray(grid, np.float64) for grid in structure.factors.values()]
        merged = [merge_all(grids[first:end]) for first, end in pairwise(config["cuts"])]
        plan = ChainPlan(structure, site, config)
        return {f"stage{k}": plan.pack(k, grid) for k, grid in enumerate(merged)}

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        e, plan = Emitter(site.cpu), ChainPlan(structure, site, config)
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, structure.shape[1]))
            shapes = {name: array.shape for name, array in self.pack(structure, site, config).items()}
            weights = [arg(name, shape) for name, shape in shapes.items()]
            writer = RowWriter(e, site.epilogue, site.rows, structure.shape[0])
            ChainEmitter(e, plan, site, config, x, weights, writer).emit()
        return made.func


def rows_in_cache(structure: Structure) -> int:
    """Input vectors of which two intermediates fit half of the level-2 cache."""
    longest = max(stage.outputs for stage in stages_of(structure))
    return min(MOST_ROWS, max(ROWS_IN_REGISTERS, LARGEST_BETWEEN // longest // ROWS_IN_REGISTERS * ROWS_IN_REGISTERS))


def stages_of(structure: Structure) -> tuple[Stage, ...]:
    return tuple(Stage(*(int(extent) for extent in grid.shape)) for grid in structure.factors.values())


class ChainPlan:
    """The merged stages and how they are cut in two: `first` for each of `blocks` blocks of their output, `then` for
    each of `chunks` runs of `width` positions on the diagonals. Both lists are those of one unit."""

    def __init__(self, structure: Structure, site: Site, config: Config) -> None:
        every = stages_of(structure)
        stages = [merge(every[first:end]) for first, end in pairwise(config["cuts"])]
        self.lanes = site.cpu.lanes
        cut, self.width = split_for_threads(stages, site.cpu)
        self.blocks = stages[cut - 1].blocks
        self.first = [replace(stage, blocks=stage.blocks // self.blocks) for stage in stages[:cut]]
        self.then = narrowed(stages[cut:], self.width)
        self.diagonal = stages[cut].t if self.then else 0  # positions in all
        self.chunks = -(-self.diagonal // self.width) if self.then else 0
        self.tiles = [tile_of(stage, site.cpu, config["rows"]) for stage in (*self.first, *self.then)]

    @property
    def pitch(self) -> int:
        """Floats of one block's output."""
        return self.chunks * self.width

    @property
    def row_pitch(self) -> int:
        """Floats from one input vector's intermediate to the next."""
        return spaced(self.blocks * self.pitch, self.lanes)

    def pack(self, number: int, grid: np.ndarray) -> np.ndarray:
        """`pack_stage`; of the stages behind the cut one for each chunk."""
        tile = self.tiles[number]
        if number < len(self.first):
            return pack_stage(grid, tile, self.lanes)
        blocks, r, s, t = grid.shape
        split = grid.reshape(blocks, r, s, t // self.diagonal, self.diagonal)
        padded = np.zeros((*split.shape[:-1], self.pitch))
        padded[..., : self.diagonal] = split
        chunks = padded.reshape(*split.shape[:-1], self.chunks, self.width)
        return np.stack([
            pack_stage(chunks[..., c, :].reshape(blocks, r, s, -1), tile, self.lanes) for c in range(self.chunks)
        ])  # fmt: skip


class ChainEmitter:
    """The loops around the stages: input vectors, threads, units, intermediates."""

    def __init__(
        self, e: Emitter, plan: ChainPlan, site: Site, config: Config, x: Any, weights: Sequence[Any], writer: RowWriter
    ) -> None:
        self.e, self.plan, self.x, self.weights, self.writer = e, plan, x, weights, writer
        self.rows, self.most, self.shares_vectors = site.rows, config["rows"], config["shares_vectors"]
        self.loop = parallel if config["threads"] > 1 else serial

    def emit(self) -> None:
        if isinstance(self.rows, int):
            self.sharing_vectors(self.rows) if self.shares_vectors else self.sharing_rows()
            return
        either(self.rows < 2, lambda: self.sharing_vectors(self.rows, 1), self.sharing_rows)

    def sharing_rows(self) -> None:
        """Every unit is a few input vectors, from the first stage to the last."""
        if isinstance(self.rows, int):
            first = 0
            for count, size in even_blocks(self.rows, self.most):
                self.some_rows(first, count, size)
                first += count * size
            return
        self.some_rows(0, self.rows // self.most, self.most)
        self.some_rows(self.rows // self.most * self.most, self.rows % self.most, 1)

    def some_rows(self, first: Any, count: Any, size: int) -> None:
        plan = self.plan
        with self.loop(0, count) as unit:
            row = first + unit * size
            row = row if isinstance(self.rows, int) else held(row)
            between = workspace(size * plan.row_pitch) if plan.then else None
            with serial(0, plan.blocks) as block:
                self.one_block(row, size, block, between)
            if plan.then:
                with serial(0, plan.chunks) as chunk:
                    self.one_chunk(row, size, chunk, between)

    def sharing_vectors(self, rows: Any, count: int | None = None) -> None:
        """Units are blocks, then chunks, of all input vectors (`count` of them where `rows` is an expression)."""
        plan, size = self.plan, rows if count is None else count
        between = scratch((size * plan.row_pitch,)) if plan.then else None
        with self.loop(0, rows * plan.blocks if count == 1 else plan.blocks) as block:
            self.one_block(0, size, block, between)
        if plan.then:
            with self.loop(0, rows * plan.chunks if count == 1 else plan.chunks) as chunk:
                self.one_chunk(0, size, chunk, between)

    def one_block(self, row: Any, size: int, block: Any, between: Any) -> None:
        """The first stages, for one block of the last one's output."""
        plan = self.plan
        inputs, outputs = plan.first[0].inputs, plan.first[-1].outputs

        def place(m: Any, group: Any, offset: Any) -> Any:
            return self.x, (row + m, block * inputs + group + offset)

        def store(value: Any, m: Any, first: Any, limit: Any) -> None:
            if between is None:
                end = None if limit is None else block * outputs + limit
                self.writer.store(value, row + m, block * outputs + first, limit=end)
            else:
                put(self.e, between, value, m * plan.row_pitch + block * plan.pitch, first, limit)

        weights = [self.weight(k, (), block * stage.blocks) for k, stage in enumerate(plan.first)]
        self.run(plan.first, plan.tiles, weights, size, place, store)

    def one_chunk(self, row: Any, size: int, chunk: Any, between: Any) -> None:
        """The stages behind the cut, for one run of positions."""
        plan, start = self.plan, len(self.plan.first)

        def place(m: Any, group: Any, offset: Any) -> Any:
            return between, (m * plan.row_pitch + group * plan.pitch + chunk * plan.width + offset,)

        def store(value: Any, m: Any, first: Any, limit: Any) -> None:
            run, at = first // plan.width, chunk * plan.width + first % plan.width
            end = (run + 1) * plan.diagonal if plan.pitch != plan.diagonal else None
            self.writer.store(value, row + m, run * plan.diagonal + at, limit=end)

        weights = [self.weight(start + k, (chunk,), 0) for k in range(len(plan.then))]
        self.run(plan.then, plan.tiles[start:], weights, size, place, store)

    def weight(self, number: int, lead: tuple[Any, ...], first_block: Any) -> Any:
        """weight(b, ..., lane): a vector of a stage's constants."""
        return lambda b, *index: self.e.load(self.weights[number], *lead, first_block + b, *index)

    def run(
        self,
        stages: Sequence[Stage],
        tiles: Sequence[Tile],
        weights: Sequence[Any],
        size: int,
        place: Place,
        store: Store,
    ) -> None:
        """Stages one after the other through two buffers in turn; the first reads with `place`, the last writes with
        `store`."""
        e = self.e
        buffers = [
            workspace(size * spaced(max(stage.outputs for stage in stages[parity:-1:2]), e.lanes))
            for parity in range(min(2, len(stages) - 1))
        ]
        for k, stage in enumerate(stages):
            into = store if k == len(stages) - 1 else stored(e, buffers[k % 2], spaced(stage.outputs, e.lanes))
            source = place if k == 0 else placed(buffers[(k - 1) % 2], stage, spaced(stage.inputs, e.lanes))
            StageEmitter(e, stage, tiles[k], weights[k], source, into).emit(size)


def spaced(extent: int, lanes: int) -> int:
    """Floats from row to row: one vector more, for rows a power of two apart would meet in the same few cache sets."""
    return extent + lanes


def placed(buffer: Any, stage: Stage, pitch: int) -> Place:
    """Reads of an intermediate, (rows, inputs)."""
    return lambda m, group, offset: (buffer, (m * pitch + group * stage.t + offset,))


def stored(e: Emitter, buffer: Any, pitch: int) -> Store:
    """Writes to an intermediate, (rows, outputs)."""
    return lambda value, m, first, limit: put(e, buffer, value, m * pitch, first, limit)


def put(e: Emitter, buffer: Any, value: Any, origin: Any, first: Any, limit: Any) -> None:
    if limit is None:
        e.store(buffer, value, origin + first)
    else:
        e.store_masked(buffer, value, e.bind_mask(first, limit), origin + first)


def workspace(size: int) -> Any:
    return local((size,)) if size <= LARGEST_ON_STACK else scratch((size,))
