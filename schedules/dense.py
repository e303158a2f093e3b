"""Dense layers: y = act(x W^T + b)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config, Extent, Kernel, Site
from tvm_structured.schedules.emit import Emitter, arg, ceildiv, parallel, prim_func, row_blocks, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import branch, chunked, multiply_block, pack_panels, register_block
from tvm_structured.structures.base import Structure

FLOPS_WORTH_A_THREAD = 400_000  # starting the other threads takes as long as so many operations on one
ROWS_PER_UNIT = 128  # rows of x that one thread keeps in L2 while it reads a panel


class DenseKernel(Kernel):
    """Packed GEMM, threads over panels (and over row chunks for large batches)."""

    name = "dense"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        mr, nr = register_block(site.cpu, site.rows, structure.shape[0])
        few = isinstance(site.rows, int) and site.rows <= 16
        kc = structure.shape[1] if mr == 1 else 256 if few else 512
        is_tiny = isinstance(site.rows, int) and structure.flops(site.rows) < FLOPS_WORTH_A_THREAD
        yield {"mr": mr, "nr": nr, "kc": kc, "prefetch": 128, "threads": 1 if is_tiny else site.cpu.cores}

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        return {"weight": pack_panels(structure.dense(), config["nr"] * site.cpu.lanes)}

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        out, inner = structure.shape
        rows, e = site.rows, Emitter(site.cpu)
        width = config["nr"] * e.lanes
        with prim_func("dense") as made:
            x = arg("x", (rows, inner))
            weight = arg("weight", (-(-out // width), inner, width))
            writer = RowWriter(e, site.epilogue, rows, out)
            gemm(e, x, weight, writer, rows, inner, config)
        return made.func


def gemm(e: Emitter, x: Any, weight: Any, writer: RowWriter, rows: Extent, inner: int, config: Config) -> None:
    """y = epilogue(x W^T) for a packed weight. Partial sums of long reductions wait in y."""
    mr, nr = config["mr"], config["nr"]
    width = nr * e.lanes
    panels = -(-writer.out // width)
    masked = writer.out % width != 0
    ahead = config.get("prefetch", 0)
    chunks = ceildiv(rows, ROWS_PER_UNIT)
    loop = parallel if config.get("threads", 2) > 1 else serial

    def column_block(panel: Any, first_row: Any, count: Extent) -> None:
        def piece(first_k: Any, depth: Extent, is_first: Any, is_last: Any) -> None:
            def block(row: Any, block_rows: int) -> None:
                def fetch(k: Any) -> None:
                    for q in range(nr):
                        e.prefetch(weight, panel, first_k + k + ahead, q * e.lanes)

                acc = multiply_block(
                    e,
                    block_rows,
                    nr,
                    depth,
                    lambda i, k: x[row + i, first_k + k],
                    lambda k, q: e.load(weight, panel, first_k + k, q * e.lanes),
                    prefetch=fetch if ahead else None,
                )
                for i in range(block_rows):
                    for q in range(nr):
                        finish(acc[i][q][0], row + i, panel * width + q * e.lanes, is_first, is_last)

            row_blocks(count, mr, block, first_row)

        chunked(e, inner, config["kc"], piece)

    def finish(value: Any, row: Any, feature: Any, is_first: Any, is_last: Any) -> None:
        total = value if is_first is True else e.bind(value + partial(row, feature, is_first))
        branch(
            is_last,
            lambda: writer.store(total, row, feature, masked),
            lambda: store_partial(total, row, feature),
        )

    def partial(row: Any, feature: Any, is_first: Any) -> Any:
        if masked:
            mask = e.bind_mask(feature, writer.out)
            held = e.load_masked(writer.y, mask, row, feature)
        else:
            held = e.load(writer.y, row, feature)
        return tirx.Select(is_first, e.splat(0.0), held)

    def store_partial(value: Any, row: Any, feature: Any) -> None:
        if masked:
            e.store_masked(writer.y, value, e.bind_mask(feature, writer.out), row, feature)
        else:
            e.store(writer.y, value, row, feature)

    if isinstance(chunks, int) and chunks == 1:
        with loop(0, panels) as panel:
            column_block(panel, 0, rows)
        return
    with loop(0, panels * chunks) as unit:
        first = unit // panels * ROWS_PER_UNIT
        column_block(unit % panels, first, tirx.min(ROWS_PER_UNIT, rows - first))
