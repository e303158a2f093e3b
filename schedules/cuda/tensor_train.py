"""Tensor train on CUDA: every stage is new[a, i, b] = sum_k A[i, k] old[a, k, b] (see `structures.tt_order`).

fused   few rows: one kernel. A block of threads makes one value (or some) of the last output digits, all stages in
        shared memory; blocks repeat what they have in common, which is the smallest part.
staged  many rows: a product on tensor cores for each stage, intermediates of x's type in L2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Kernel
from tvm_structured.schedules.cuda.functions import numpy_type
from tvm_structured.schedules.cuda.gemm import Gemm
from tvm_structured.schedules.cuda.products import tiles
from tvm_structured.schedules.cuda.threads import Threads, all_of, f32, launch, scratch, under
from tvm_structured.schedules.cuda.tile import Operand, Tile, pack_operand
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.schedules.emit import arg, prim_func
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.base import Structure
from tvm_structured.structures.tensor_train import TensorTrain
from tvm_structured.structures.tt_order import Stage, cheapest_order, core_matrix, last_core_first

ROOM = 5 * 1024  # float32 values of one intermediate in static shared memory, which holds two


FUSED_ROWS = 2  # beyond, a product for each stage was measured to be faster (16 x 16 x 16, rank 4, H200)


class TensorTrainKernel(Kernel):
    """`way` "fused" with `chunks`, how much of each output digit a block makes, and threads; "staged" with tiles."""

    name = "tensor_train"

    def configs(self, structure: Structure, site: GpuSite) -> Iterator[Config]:  # type: ignore[override]
        assert isinstance(structure, TensorTrain)
        fused = [
            {"way": "fused", "chunks": chunks, "threads": threads}
            for chunks in chunkings(structure, site)
            for threads in (512, 256, 128)
        ]
        stages = cheapest_order(structure.out_modes, structure.in_modes, structure.ranks).stages
        count = site.rows if isinstance(site.rows, int) else 64
        spaces = [list(tiles(site, count * s.lead * s.trail, s.rows)) for s in stages]
        staged = [
            {"way": "staged", "tiles": [space[min(i, len(space) - 1)] for space in spaces]}
            for i in range(max(len(space) for space in spaces))
        ]
        is_few = isinstance(site.rows, int) and site.rows <= FUSED_ROWS
        yield from [*fused, *staged] if is_few else [*staged, *fused]

    def pack(self, structure: Structure, site: GpuSite, config: Config) -> dict[str, np.ndarray]:  # type: ignore[override]
        assert isinstance(structure, TensorTrain)
        cores = [np.asarray(core, np.float32) for core in structure.cores]
        dtype = numpy_type(site.dtype)
        if config["way"] == "fused":
            # (depth, rows): neighbouring threads make neighbouring rows
            matrices = [np.ascontiguousarray(core_matrix(core, True).T) for core in cores]
            return {f"core{k}": matrix.astype(dtype) for k, matrix in enumerate(matrices)}
        order = cheapest_order(structure.out_modes, structure.in_modes, structure.ranks)
        packed = {}
        for stage, tile in zip(order.stages, config["tiles"], strict=True):
            matrix = core_matrix(cores[stage.core], order.is_last_core_first)
            packed[f"core{stage.core}"] = pack_operand(matrix[None, None], Tile.of(tile), dtype)
        return packed

    def prim_func(self, structure: Structure, site: GpuSite, config: Config) -> Any:  # type: ignore[override]
        assert isinstance(structure, TensorTrain)
        tensorize = config.get("tensorize", True)
        packed = self.pack(structure, site, config)
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, structure.shape[1]), site.dtype)
            cores = {name: arg(name, array.shape, site.dtype) for name, array in packed.items()}
            writer = RowWriter(site, structure.shape[0])
            if config["way"] == "fused":
                emit_fused(structure, site, config, x, [cores[f"core{k}"] for k in range(len(cores))], writer)
            else:
                emit_staged(structure, site, config["tiles"], x, cores, writer, tensorize)
        return made.func


# -- one kernel -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A stage as one block of threads runs it: `chunk` of the core's `out` values of its output digit."""

    stage: Stage
    rank: int
    out: int
    chunk: int
    trail: int

    @property
    def size(self) -> int:
        return self.stage.lead * self.rank * self.chunk * self.trail


def parts_of(structure: TensorTrain, chunks: tuple[int, ...]) -> list[Part]:
    stages = last_core_first(structure.out_modes, structure.in_modes, structure.ranks).stages
    return [
        Part(s, structure.ranks[s.core], structure.out_modes[s.core], chunks[s.core], math.prod(chunks[s.core + 1 :]))
        for s in stages
    ]


def chunkings(structure: TensorTrain, site: GpuSite) -> list[tuple[int, ...]]:
    """Chunks of the output digits, the best first: at least as many blocks as multiprocessors, little repeated."""
    rows = site.rows if isinstance(site.rows, int) else 1
    found = []
    partial = [list(structure.out_modes)]
    for k in reversed(range(len(structure.out_modes))):
        for chunk in divisors(structure.out_modes[k]):
            partial.append([*structure.out_modes[:k], chunk, *[1] * (len(structure.out_modes) - k - 1)])
    for chunks in dict.fromkeys(tuple(p) for p in partial):
        parts = parts_of(structure, chunks)
        if any(part.size > ROOM for part in parts[:-1]):
            continue
        blocks = rows * math.prod(m // c for m, c in zip(structure.out_modes, chunks, strict=True))
        work = sum(part.size * part.stage.depth for part in parts)
        found.append((work * -(-blocks // site.gpu.multiprocessors), blocks, chunks))
    return [chunks for *_, chunks in sorted(found)[:3]]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def emit_fused(
    structure: TensorTrain, site: GpuSite, config: Config, x: Any, cores: list[Any], writer: RowWriter
) -> None:
    chunks = tuple(config["chunks"])
    parts = parts_of(structure, chunks)
    counts = [m // c for m, c in zip(structure.out_modes, chunks, strict=True)]
    grid = (math.prod(counts), site.rows)
    with launch(grid, config["threads"], not config.get("tensorize", True)) as (t, (block, row)):
        where, rest = [], block  # which chunk of each output digit
        for count in reversed(counts):
            where.insert(0, rest % count)
            rest = rest // count
        room = max([part.size for part in parts[:-1]], default=1)
        buffers = [t.shared((1, room), "float32") for _ in range(min(2, len(parts) - 1))]

        for number, part in enumerate(parts):
            old = (lambda index: f32(x[row, index])) if number == 0 else buffers[(number - 1) % 2].at_first
            is_last = number == len(parts) - 1

            def output(i: Any, part: Part = part, old: Any = old, number: int = number, last: bool = is_last) -> None:
                core, chunk = part.stage.core, where[part.stage.core]
                b, digit = i % part.trail, i // part.trail % part.chunk
                r, a = i // (part.trail * part.chunk) % part.rank, i // (part.trail * part.chunk * part.rank)
                total = t.registers(1)
                total[0] = f32(0.0)
                with I.serial(0, part.stage.depth) as k:
                    factor = f32(cores[core][k, r * part.out + chunk * part.chunk + digit])
                    total[0] = total[0] + factor * old((a * part.stage.depth + k) * part.trail + b)
                if last:
                    writer.store(total[0], row, column_of(structure, chunks, where, i))
                else:
                    buffers[number % 2][0, i] = total[0]

            with t.last_stage() if is_last else t.stage():
                each_output(t, part.size, output)


def column_of(structure: TensorTrain, chunks: tuple[int, ...], where: list[Any], i: Any) -> Any:
    """The output feature of number i among those of a block."""
    column, stride = 0, 1
    for k in reversed(range(len(chunks))):
        column = column + (where[k] * chunks[k] + i % chunks[k]) * stride
        i, stride = i // chunks[k], stride * structure.out_modes[k]
    return column


def each_output(t: Threads, size: int, body: Any) -> None:
    """body(i) for i < size, spread over the threads."""
    with I.serial(0, -(-size // t.count)) as turn:
        i = turn * t.count + t.tx
        under(True if size % t.count == 0 else i < size, lambda: body(i))


# -- a kernel for each stage ----------------------------------------------------------------------------------


def emit_staged(
    structure: TensorTrain,
    site: GpuSite,
    chosen: list[Any],
    x: Any,
    cores: dict[str, Any],
    writer: RowWriter,
    tensorize: bool,
) -> None:
    stages = cheapest_order(structure.out_modes, structure.in_modes, structure.ranks).stages
    old = x
    for number, (stage, tile) in enumerate(zip(stages, chosen, strict=True)):
        is_last = number == len(stages) - 1
        size = stage.lead * stage.rows * stage.trail
        new = writer.y if is_last else scratch((site.rows, size), site.dtype)
        onto = writer if is_last else RowWriter.onto(new, site.rows, size, site.dtype)
        emit_stage(stage, site, Tile.of(tile), old, cores[f"core{stage.core}"], onto, tensorize)
        old = new


def emit_stage(
    stage: Stage, site: GpuSite, tile: Tile, old: Any, core: Any, writer: RowWriter, tensorize: bool
) -> None:
    """rows of the product: (row of x, a, b); its columns: i."""
    each = stage.lead * stage.trail
    vectors = stage.trail == 1 and stage.depth % 8 == 0

    def at(batch: Any, plane: Any, row: Any, k: Any) -> tuple[Any, Any]:
        a, b = row // stage.trail % stage.lead, row % stage.trail
        return row // each, (a * stage.depth + k) * stage.trail + b

    operand = Operand(old, at, stage.depth, vectors, rows_first=stage.trail > 1)
    gemm = Gemm(tile, site.dtype, site.rows * each, stage.rows, operand, core, tensorize=tensorize)

    def store(t: Threads, _: Any, row: Any, exists: Any, column: Any, values: Any) -> None:
        a, b = row // stage.trail % stage.lead, row % stage.trail
        first = (a * stage.rows + column) * stage.trail + b
        if stage.trail == 1 and stage.rows % 2 == 0:

            def pair() -> None:
                writer.store_run(t, [value[0] for value in values], row // each, True, first)

            under(all_of([exists, column < stage.rows]), pair)
            return
        for j in range(2):
            condition = all_of([exists, column + j < stage.rows])
            writer.store(values[j][0], row // each, first + j * stage.trail, condition)

    gemm.emit(store)
