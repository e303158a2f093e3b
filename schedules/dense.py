"""Dense layers: y = act(x W^T + b)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config, Extent, Kernel, Site
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, arg, ceildiv, either, parallel, prim_func, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import (
    UNROLL,
    branch,
    chunked,
    each_block,
    multiply_block,
    pack_panels,
    register_block,
)
from tvm_structured.schedules.space import around, block_rows, fits_registers
from tvm_structured.structures.base import Structure

FLOPS_WORTH_A_THREAD = 400_000  # starting the other threads takes as long as so many operations on one
MOST_ROWS = 256  # rows of x of which a thread keeps a piece in L2 while it reads a panel
PIECES = {1: 1024, 2: 512, 4: 128}  # k of a piece of a panel, by vectors: it stays in L1 or L2 while all rows meet it
IN_CACHE = 512 << 10  # numbers of a weight to a core: more than that are prefetched


class DenseKernel(Kernel):
    """Packed GEMM, threads over panels (and over row chunks for large batches)."""

    name = "dense"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        is_tiny = isinstance(site.rows, int) and structure.flops(site.rows) < FLOPS_WORTH_A_THREAD
        threads = 1 if is_tiny else site.cpu.cores
        default = {**gemm_config(site.cpu, site.rows, *structure.shape), "threads": threads, "chunk": MOST_ROWS}
        axes = {**gemm_axes(site.cpu, site.rows, *structure.shape), "threads": (1, site.cpu.cores)}
        yield from around(default, axes, fits_registers(site.cpu))

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


def gemm_config(cpu: Cpu, rows: Extent, out: int, inner: int) -> dict[str, int]:
    """Register block, k of a piece, whether to prefetch: weights that come from far, if there is more to do with a
    piece than to load it (else the hardware's own prefetching is best)."""
    mr, nr = register_block(cpu, rows, out)
    is_single = isinstance(rows, int) and rows <= mr
    far = out * inner > IN_CACHE * cpu.cores and not is_single
    return {"mr": mr, "nr": nr, "kc": inner if is_single else PIECES[nr], "prefetch": int(far)}


def gemm_axes(cpu: Cpu, rows: Extent, out: int, inner: int) -> dict[str, Sequence[int]]:
    """What may be varied of `gemm_config`, and the most rows of a chunk."""
    vectors = -(-out // cpu.lanes)
    pieces = [kc for kc in (128, 256, 512, 1024, 2048) if kc < inner]
    axes: dict[str, Sequence[int]] = {
        "mr": block_rows(rows, 14 if cpu.registers >= 32 else 6),
        "nr": [nr for nr in (1, 2, 3, 4, 6, 8) if nr <= vectors],
        "kc": [inner, *reversed(pieces)],
        "prefetch": (0, 1),
    }
    if not isinstance(rows, int) or rows > 64:
        axes["chunk"] = (64, 128, 256, 512)
    return axes


def row_chunks(rows: Extent, panels: int, mr: int, cores: int, most: int = MOST_ROWS) -> tuple[Extent, Extent]:
    """(how many chunks of rows, rows in one): nearly equal, more of them where there are few panels."""
    if not isinstance(rows, int):
        return ceildiv(rows, most), most
    wanted = max(-(-rows // most), min(-(-rows // (4 * mr)), cores) if panels < cores else 1)
    size = ceildiv(ceildiv(rows, max(1, wanted)), mr) * mr
    return (1, rows) if size >= rows else (-(-rows // size), size)


def gemm(e: Emitter, x: Any, weight: Any, writer: RowWriter, rows: Extent, inner: int, config: Config) -> None:
    """y = epilogue(x W^T) for a packed weight. Partial sums of long reductions wait in y."""
    mr, nr = config["mr"], config["nr"]
    width = nr * e.lanes
    panels = -(-writer.out // width)
    masked = writer.out % width != 0
    chunks, size = row_chunks(rows, panels, mr, e.cpu.cores, config.get("chunk", MOST_ROWS))
    loop = parallel if config.get("threads", 2) > 1 else serial

    def column_block(panel: Any, first_row: Any, count: Extent) -> None:
        def piece(first_k: Any, depth: Extent, is_first: Any, is_last: Any) -> None:
            def block(row: Any, block_rows: int, number: Any) -> None:
                fetch = fetcher(panel, first_k, depth, number, count) if config["prefetch"] else None
                acc = multiply_block(
                    e,
                    block_rows,
                    nr,
                    depth,
                    lambda i, k: x[row + i, first_k + k],
                    lambda k, q: e.load(weight, panel, first_k + k, q * e.lanes),
                    each_group=fetch,
                )
                for i in range(block_rows):
                    for q in range(nr):
                        finish(acc[i][q][0], row + i, panel * width + q * e.lanes, is_first, is_last)

            each_block(count, mr, block, first_row)

        chunked(e, inner, config["kc"], piece)

    def fetcher(panel: Any, first_k: Any, depth: Extent, number: Any, count: Extent) -> Callable[[Any], None]:
        """The row blocks share the work of asking for the next piece, which comes next in memory."""
        sharing = -(-count // mr) if isinstance(count, int) else 4
        lines = max(1, -(-UNROLL * nr // sharing))

        def fetch(group: Any) -> None:
            # blocks beyond the last share, and rows whose number is not known, ask for the last share again
            share = tirx.min(number, UNROLL * nr // lines - 1)
            first = (share * (depth // UNROLL) + group) * (lines * e.lanes)
            for line in range(lines):
                e.prefetch(weight, panel, first_k + depth, first + line * e.lanes)

        return fetch

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
        chunk, panel = unit // panels, unit % panels
        first = chunk * size
        if not isinstance(rows, int):
            column_block(panel, first, tirx.min(size, rows - first))
        elif rows % size == 0:
            column_block(panel, first, size)
        else:
            either(
                chunk < chunks - 1,
                lambda: column_block(panel, first, size),
                lambda: column_block(panel, first, rows % size),
            )
