"""Low rank on CUDA: y = U (V x), two launches: between them all of the thin intermediate must be known.

It has x's type and stays in L2. Few rows are bound by the bytes of U and V (`dense_rows`), more are two products on
tensor cores (`gemm`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Kernel
from tvm_structured.schedules.cuda.dense_rows import emit_rows, pack_rows
from tvm_structured.schedules.cuda.few_rows import Few
from tvm_structured.schedules.cuda.functions import numpy_type
from tvm_structured.schedules.cuda.gemm import Gemm
from tvm_structured.schedules.cuda.products import MANY, few_space, matrix, prefers_few, tiles
from tvm_structured.schedules.cuda.threads import Threads, all_of, ceildiv, launch, multiple, scratch, under
from tvm_structured.schedules.cuda.tile import Operand, Tile, pack_operand
from tvm_structured.schedules.cuda.writer import RowWriter
from tvm_structured.schedules.emit import arg, prim_func
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.base import Structure

THREADS = 128


class LowRankKernel(Kernel):
    """`way` "few" or "many" rows; tile of each product."""

    name = "low_rank"

    def configs(self, structure: Structure, site: GpuSite) -> Iterator[Config]:  # type: ignore[override]
        (out, inner), rank = structure.shape, structure.factors["v"].shape[0]
        few = [
            {"way": "few", "thin": thin, "wide": wide}
            for thin, wide in longest(few_space(site, rank, inner), few_space(site, out, rank))
        ]
        many = [
            {"way": "many", "thin": thin, "wide": wide}
            for thin, wide in longest(
                tiles(site, site.rows, rank, depth=inner), tiles(site, site.rows, out, depth=rank)
            )
        ]
        yield from [*few, *many] if prefers_few(site, 4 * MANY) else [*many, *few]

    def pack(self, structure: Structure, site: GpuSite, config: Config) -> dict[str, np.ndarray]:  # type: ignore[override]
        u, v = structure.factors["u"], structure.factors["v"]
        extra = (0, width_of(v.shape[0]) - v.shape[0])
        u, v = np.pad(u, ((0, 0), extra)), np.pad(v, (extra, (0, 0)))
        if config["way"] == "few":
            return {
                "v": pack_rows(v, Few.of(config["thin"]), site.dtype),
                "u": pack_rows(u, Few.of(config["wide"]), site.dtype),
            }
        dtype = numpy_type(site.dtype)
        return {
            "v": pack_operand(v[None, None], Tile.of(config["thin"]), dtype),
            "u": pack_operand(u[None, None], Tile.of(config["wide"]), dtype),
        }

    def prim_func(self, structure: Structure, site: GpuSite, config: Config) -> Any:  # type: ignore[override]
        (out, inner), rank = structure.shape, structure.factors["v"].shape[0]
        packed = {name: array.shape for name, array in self.pack(structure, site, config).items()}
        emit = product_of_few if config["way"] == "few" else product_of_many
        width = width_of(rank)
        with prim_func(self.name) as made:
            x = arg("x", (site.rows, inner), site.dtype)
            v, u = (arg(name, shape, site.dtype) for name, shape in packed.items())
            writer = RowWriter(site, out)
            thin = scratch((site.rows, width), site.dtype)
            emit(site, config, "thin", x, inner, v, RowWriter.onto(thin, site.rows, width, site.dtype))
            emit(site, config, "wide", thin, width, u, writer)
        return made.func


def width_of(rank: int) -> int:
    """Rows of the intermediate are aligned to 16 bytes; V has zeros behind its last row."""
    return multiple(rank, 8)


def longest(first: Iterator[Any], second: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """Both in step; the shorter one repeats its last."""
    a, b = list(first), list(second)
    for i in range(max(len(a), len(b))):
        yield a[min(i, len(a) - 1)], b[min(i, len(b) - 1)]


def product_of_few(
    site: GpuSite, config: Config, stage: str, x: Any, inner: int, weight: Any, writer: RowWriter
) -> None:
    few, tensorize = Few.of(config[stage]), config.get("tensorize", True)
    emit_rows(few, site.dtype, site.rows, x, inner, weight, writer, tensorize)


def product_of_many(
    site: GpuSite, config: Config, stage: str, x: Any, inner: int, weight: Any, writer: RowWriter
) -> None:
    tile, tensorize = Tile.of(config[stage]), config.get("tensorize", True)
    operand: Operand = matrix(x, inner, site.dtype)
    gemm = Gemm(tile, site.dtype, site.rows, writer.out, operand, weight, tensorize=tensorize)
    if tile.split == 1:

        def store(t: Threads, _: Any, row: Any, exists: Any, column: Any, values: Any) -> None:
            writer.store_run(t, [value[0] for value in values], row, exists, column)

        gemm.emit(store)
    else:
        add_parts(gemm, tile.split, writer, tensorize)


def add_parts(gemm: Gemm, count: int, writer: RowWriter, tensorize: bool) -> None:
    """The parts of a split product through memory, added by a kernel of its own."""
    rows, width = writer.site.rows, multiple(writer.out, 2)
    parts = scratch((count, rows, width), "float32")

    def store(t: Threads, part: Any, row: Any, exists: Any, column: Any, values: Any) -> None:
        for j in range(2):
            condition = all_of([exists, column + j < writer.out])
            under(condition, lambda j=j: I.buffer_store(parts, values[j][0], [part, row, column + j]))

    gemm.emit(store)
    with launch((ceildiv(writer.out, THREADS), rows), THREADS, not tensorize) as (t, (bx, row)):
        with t.last_stage():
            column = bx * THREADS + t.tx
            total = functools.reduce(operator.add, [parts[part, row, column] for part in range(count)])
            writer.store(total, row, column, True if writer.out % THREADS == 0 else column < writer.out)
