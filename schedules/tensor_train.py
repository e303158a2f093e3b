"""Tensor train: y = G_1 ... G_d x, one small GEMM for each group of cores, fused over chunks that stay in cache.

Every stage is new[a, i, b] = sum_k A[i, k] old[a, k, b] (`structures/tt_order.py`). Where b is long it fills the
lanes and A is broadcast; where it is short, the rows i fill them, old is broadcast and the result is interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Kernel, Site
from tvm_structured.schedules.emit import Emitter, arg, either, local, parallel, prim_func, scratch, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import pack_panels
from tvm_structured.schedules.tt_plan import MergedTrain, Tile, plans, tile_for
from tvm_structured.schedules.tt_stage import Source, Store, emit_stage, into
from tvm_structured.structures.base import Structure
from tvm_structured.structures.tensor_train import merge_cores
from tvm_structured.structures.tt_order import Stage, core_matrix

LARGEST_ON_STACK = 16 << 10  # floats; larger intermediates go to the heap


class TensorTrainKernel(Kernel):
    """Threads over input vectors and chunks of the first mode."""

    name = "tensor_train"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        rows = max(1, site.rows) if isinstance(site.rows, int) else None
        for plan in plans(extents_of(structure), site.cpu, rows):
            yield {
                "last_core_first": plan.is_last_core_first,
                "cuts": list(plan.cuts),
                "chunk": plan.chunk,
                "threads": plan.threads,
            }

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        cores, cuts = list(structure.factors.values()), config["cuts"]
        packed = {}
        for number, (stage, tile) in enumerate(tiled_stages(structure, site, config)):
            group = [np.asarray(core, np.float64) for core in cores[cuts[stage.core] : cuts[stage.core + 1]]]
            matrix = core_matrix(merge_cores(group), config["last_core_first"])
            width = tile.vectors * site.cpu.lanes if tile.lanes_on_rows else tile.scalars
            # a chunk of the first mode takes `stage.rows` of the rows, and its panels start anew
            parts = matrix.reshape(-1, stage.rows, stage.depth)
            packed[f"stage{number}"] = np.concatenate([pack_panels(part, width) for part in parts])
        return packed

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        e = Emitter(site.cpu)
        shapes = {name: array.shape for name, array in self.pack(structure, site, config).items()}
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, structure.shape[1]))
            weights = [arg(name, shape) for name, shape in shapes.items()]
            writer = RowWriter(e, site.epilogue, site.rows, structure.shape[0])
            train = TrainEmitter(e, structure, site, config, x, weights, writer)
            train.last_core_first() if config["last_core_first"] else train.first_core_first()
        return made.func


def extents_of(structure: Structure) -> MergedTrain:
    static = structure.sizes_of
    ranks = (1, *(int(core.shape[-1]) for core in structure.factors.values()))
    return MergedTrain(tuple(static["out_modes"]), tuple(static["in_modes"]), ranks)


def tiled_stages(structure: Structure, site: Site, config: Config) -> list[tuple[Stage, Tile]]:
    """The stages of one chunk, with their register blocks."""
    stages = extents_of(structure).merge(config["cuts"]).stages(config["last_core_first"], config["chunk"])
    return [(stage, tile_for(site.cpu, stage.lead, stage.rows, stage.depth, stage.trail)) for stage in stages]


class TrainEmitter:
    """The loops around the stages: input vectors, chunks, threads, intermediates."""

    def __init__(
        self, e: Emitter, structure: Structure, site: Site, config: Config, x: Any, weights: Any, writer: RowWriter
    ) -> None:
        self.e, self.x, self.weights, self.writer = e, x, weights, writer
        self.rows, self.threads = site.rows, config["threads"]
        self.loop = parallel if self.threads > 1 else serial
        self.stages = tiled_stages(structure, site, config)
        train = extents_of(structure).merge(config["cuts"])
        modes = train.in_modes if config["last_core_first"] else train.out_modes
        self.chunks = modes[0] // config["chunk"]

    def first_core_first(self) -> None:
        """One region: every unit is a chunk of the first out mode of one input vector, through all stages."""
        with self.loop(0, self.rows * self.chunks) as unit:
            row, chunk = self.split(unit)
            source = Source(self.e, self.stages[0][0], self.x, (row, 0), padded=False)
            self.run(0, len(self.stages), source, self.output(row, chunk), chunk)

    def last_core_first(self) -> None:
        """The last stage needs all chunks. With few input vectors it is a region of its own."""
        if len(self.stages) == 1 or (isinstance(self.rows, int) and self.rows >= self.threads):
            self.in_one_region()
        elif isinstance(self.rows, int):
            self.in_two_regions()
        else:
            either(self.rows < self.threads, self.in_two_regions, self.in_one_region)

    def in_one_region(self) -> None:
        """Every unit is one input vector."""
        last = len(self.stages) - 1
        final = self.stages[last][0]
        with self.loop(0, self.rows) as row:
            source = Source(self.e, final, self.x, (row, 0), padded=False)
            if last > 0:
                held = self.workspace(final.depth * final.trail)
                with serial(0, self.chunks) as chunk:
                    self.before_last(row, chunk, held)
                source = Source(self.e, final, held, (0,), padded=True)
            self.run(last, last + 1, source, self.output(row, 0))

    def in_two_regions(self) -> None:
        """Units are chunks of the first in mode, then parts of the last stage's output."""
        final, tile = self.stages[-1]
        held = scratch((self.rows, final.depth * final.trail + self.e.lanes))
        with self.loop(0, self.rows * self.chunks) as unit:
            row, chunk = self.split(unit)
            self.before_last(row, chunk, held, row)
        vectors = -(-final.trail // self.e.lanes)
        step = -(-vectors // (self.threads * tile.vectors)) * tile.vectors
        parts = 1 if tile.lanes_on_rows else -(-vectors // step)
        with self.loop(0, self.rows * parts) as unit:
            row, part = (unit // parts, unit % parts) if parts > 1 else (unit, 0)
            source = Source(self.e, final, held, (row, 0), padded=True)
            span = (part * step, I.min(step, vectors - part * step) if vectors % step else step)
            emit_stage(self.e, final, tile, self.weights[-1], source, self.output(row, 0), vectors=span)

    def before_last(self, row: Any, chunk: Any, held: Any, *held_row: Any) -> None:
        """All stages but the last, for one chunk, into its part of `held`."""
        first, last = self.stages[0][0], self.stages[-2][0]
        source = Source(self.e, first, self.x, (row, chunk * (first.lead * first.depth * first.trail)), padded=False)
        target = into(self.e, held, *held_row, chunk * (last.lead * last.rows * last.trail))
        self.run(0, len(self.stages) - 1, source, target)

    def run(self, first: int, end: int, source: Source, store: Store, chunk: Any = 0) -> None:
        """Stages first:end, one after the other through two buffers in turn; the last one writes with `store`."""
        sizes = [stage.lead * stage.rows * stage.trail for stage, _ in self.stages[first : end - 1]]
        buffers = [self.workspace(max(sizes[parity::2])) for parity in range(min(2, len(sizes)))]
        for number in range(first, end):
            stage, tile = self.stages[number]
            buffer = None if number == end - 1 else buffers[(number - first) % 2]
            target = store if buffer is None else into(self.e, buffer, 0)
            width = tile.vectors * self.e.lanes if tile.lanes_on_rows else tile.scalars
            first_block = chunk * -(-stage.rows // width) if number == 0 else 0
            emit_stage(self.e, stage, tile, self.weights[number], source, target, first_block)
            if buffer is not None:
                source = Source(self.e, self.stages[number + 1][0], buffer, (0,), padded=True)

    def output(self, row: Any, chunk: Any) -> Store:
        """Stores into y, through the epilogue."""
        last = self.stages[-1][0]
        origin = chunk * (last.lead * last.rows * last.trail)

        def store(value: Any, first: Any, limit: Any) -> None:
            self.writer.store(value, row, origin + first, limit=None if limit is None else origin + limit)

        return store

    def workspace(self, size: int) -> Any:
        """An intermediate of one unit; a vector may be read across its end."""
        size += self.e.lanes
        return local((size,)) if size <= LARGEST_ON_STACK else scratch((size,))

    def split(self, unit: Any) -> tuple[Any, Any]:
        return (unit // self.chunks, unit % self.chunks) if self.chunks > 1 else (unit, 0)
