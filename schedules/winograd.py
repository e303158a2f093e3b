"""Winograd convolution, F(m x m, r x r): transforms in registers around one GEMM for each point.

Two ways to order the work. Fused: a thread takes a rectangle of tiles through all stages, in its own cache; for large
images. Staged: all tiles are transformed, then the GEMMs are shared out by point, then all outputs are made, so that
the transformed weight, (points / r)^2 times the weight, is read once; for small images and many channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config, Extent, Kernel, Site
from tvm_structured.schedules.emit import Emitter, arg, ceildiv, parallel, prim_func, scratch, serial
from tvm_structured.schedules.gemm import multiply_block
from tvm_structured.schedules.images import ImageShape, ImageWriter, view
from tvm_structured.schedules.winograd_cost import ranked_configs
from tvm_structured.schedules.winograd_tiles import TileGrid, gather_tiles, scatter_tiles
from tvm_structured.structures.base import Structure
from tvm_structured.structures.winograd import Winograd


class WinogradKernel(Kernel):
    """Fused or staged Winograd on NCHW images."""

    name = "winograd"

    def configs(self, structure: Structure, site: Site) -> Iterator[Config]:
        assert isinstance(structure, Winograd)
        yield from ranked_configs(ImageShape.of(site), structure.tile, site.cpu)

    def pack(self, structure: Structure, site: Site, config: Config) -> dict[str, np.ndarray]:
        """G g G^T as (blocks, points^2, in, nr * lanes), or with points first where they are staged: as it is read."""
        assert isinstance(structure, Winograd)
        transformed = structure.transformed_weight()
        points, out, inner = transformed.shape
        width = config["nr"] * site.cpu.lanes
        blocks = -(-out // width)
        padded = np.zeros((points, blocks * width, inner), np.float32)
        padded[:, :out] = transformed
        packed = padded.reshape(points, blocks, width, inner).swapaxes(2, 3)
        return {"weight": np.ascontiguousarray(packed.swapaxes(0, 1) if config["order"] == "fused" else packed)}

    def prim_func(self, structure: Structure, site: Site, config: Config) -> Any:
        assert isinstance(structure, Winograd)
        shape, e = ImageShape.of(site), Emitter(site.cpu)
        grid = TileGrid(shape, structure.tile, config["rows"], config["columns"])
        width = config["nr"] * e.lanes
        with prim_func(self.name) as made:
            x = arg("x", site.x_shape)
            order = (-(-shape.outs // width), grid.points**2)
            weight = arg("weight", (*(order if config["order"] == "fused" else order[::-1]), shape.channels, width))
            writer = ImageWriter(e, site.epilogue, site.y_shape)
            flat = view(x, (shape.batch, shape.channels, shape.image[0] * shape.image[1]))
            emit = fused if config["order"] == "fused" else staged
            emit(e, grid, config, flat, weight, writer)
        return made.func


def each_channel_block(e: Emitter, channels: int, body: Callable[[Any, int], None]) -> None:
    """body(first channel, number) over blocks of `lanes` channels, the last one smaller."""
    full, rest = divmod(channels, e.lanes)
    if full:
        with serial(0, full) as block:
            body(block * e.lanes, e.lanes)
    if rest:
        body(full * e.lanes, rest)


def padded_channels(e: Emitter, channels: int) -> int:
    """Distance between tiles in scratch: whole vectors."""
    return stride_of(-(-channels // e.lanes) * e.lanes)


def stride_of(elements: int) -> int:
    """Distance between points in scratch: an odd number of cache lines, so that points do not share cache sets."""
    lines = -(-elements // 16)
    return (lines + 1 - lines % 2) * 16


def gemm(
    e: Emitter,
    rows: Extent,
    channels: int,
    config: Config,
    load: Callable[[Any, Any], Any],
    panel: Callable[[Any, int], Any],
    store: Callable[[Any, int, Any], None],
) -> None:
    """store(row, q, vector) of sum_k load(row, k) * panel(k, q); where rows are left the last block overlaps."""
    mr, nr = config["mr"], config["nr"]

    def block(first: Any) -> None:
        acc = multiply_block(e, mr, nr, channels, lambda i, k: load(first + i, k), panel)
        for i in range(mr):
            for q in range(nr):
                store(first + i, q, acc[i][q][0])

    count = -(-rows // mr) if isinstance(rows, int) else (rows + mr - 1) // mr
    with serial(0, count) as i:
        block(tirx.min(i * mr, rows - mr))


def fused(e: Emitter, grid: TileGrid, config: Config, x: Any, weight: Any, writer: ImageWriter) -> None:
    """Each thread: transform a rectangle, then for each block of output channels all its GEMMs and their outputs."""
    shape, lanes, nr = grid.shape, e.lanes, config["nr"]
    depth, width = padded_channels(e, shape.channels), nr * lanes
    data_stride, sum_stride = stride_of(grid.in_rectangle * depth), stride_of(grid.in_rectangle * width)
    with parallel(0, shape.batch * grid.rectangles) as unit:
        place = (unit // grid.rectangles, *grid.origin(unit % grid.rectangles))
        data = scratch((grid.points**2 * data_stride,))
        sums = scratch((grid.points**2 * sum_stride,))

        each_channel_block(
            e,
            shape.channels,
            lambda channel, count: gather_tiles(
                e,
                grid,
                x,
                place,
                channel,
                count,
                lambda point, r, c, value: e.store(
                    data, value, point * data_stride + (r * grid.columns + c) * depth + channel
                ),
            ),
        )
        with serial(0, -(-shape.outs // width)) as block:
            with serial(0, grid.points**2) as point:
                gemm(
                    e,
                    grid.in_rectangle,
                    shape.channels,
                    config,
                    lambda tile, k: data[point * data_stride + tile * depth + k],
                    lambda k, q: e.load(weight, block, point, k, q * lanes),
                    lambda tile, q, value: e.store(sums, value, point * sum_stride + tile * width + q * lanes),
                )
            with serial(0, nr) as q:
                first = block * width + q * lanes
                scatter_tiles(
                    e,
                    grid,
                    writer,
                    place,
                    first,
                    tirx.max(tirx.min(lanes, shape.outs - first), 0),
                    lambda point, r, c: e.load(sums, point * sum_stride + (r * grid.columns + c) * width + q * lanes),
                )


def staged(e: Emitter, grid: TileGrid, config: Config, x: Any, weight: Any, writer: ImageWriter) -> None:
    """Three parallel regions over a group of images: transforms, GEMMs, inverse transforms."""
    shape, width = grid.shape, config["nr"] * e.lanes
    group, tiles = config["images"], grid.tiles
    depth, outs = padded_channels(e, shape.channels), -(-shape.outs // width) * width
    data_stride, sum_stride = stride_of(group * tiles * depth), stride_of(group * tiles * outs)
    data = scratch((grid.points**2 * data_stride,))
    sums = scratch((grid.points**2 * sum_stride,))

    def stages(first: Any, images: Extent) -> None:
        def place(unit: Any) -> tuple[Any, Any, Any]:
            return (first + unit // grid.rectangles, *grid.origin(unit % grid.rectangles))

        def tile(unit: Any, r: Any, c: Any) -> Any:
            row, column = grid.origin(unit % grid.rectangles)
            return unit // grid.rectangles * tiles + (row + r) * grid.size[1] + (column + c)

        def gather(unit: Any, channel: Any, count: int) -> None:
            gather_tiles(
                e,
                grid,
                x,
                place(unit),
                channel,
                count,
                lambda point, r, c, value: e.store(
                    data, value, point * data_stride + tile(unit, r, c) * depth + channel
                ),
            )

        full, rest = divmod(shape.channels, e.lanes)
        if full:
            with parallel(0, images * grid.rectangles * full) as unit:
                gather(unit // full, unit % full * e.lanes, e.lanes)
        if rest:
            with parallel(0, images * grid.rectangles) as unit:
                gather(unit, full * e.lanes, rest)

        blocks = outs // width
        with parallel(0, grid.points**2 * blocks) as unit:
            point, block = unit // blocks, unit % blocks
            gemm(
                e,
                images * tiles,
                shape.channels,
                config,
                lambda row, k: data[point * data_stride + row * depth + k],
                lambda k, q: e.load(weight, point, block, k, q * e.lanes),
                lambda row, q, value: e.store(
                    sums, value, point * sum_stride + row * outs + block * width + q * e.lanes
                ),
            )

        vectors = -(-shape.outs // e.lanes)
        with parallel(0, images * grid.rectangles * vectors) as unit:
            piece, channel = unit // vectors, unit % vectors * e.lanes
            scatter_tiles(
                e,
                grid,
                writer,
                place(piece),
                channel,
                e.lanes if shape.outs % e.lanes == 0 else tirx.min(e.lanes, shape.outs - channel),
                lambda point, r, c: e.load(sums, point * sum_stride + tile(piece, r, c) * outs + channel),
            )

    if isinstance(shape.batch, int) and shape.batch <= group:
        stages(0, shape.batch)
    else:
        with serial(0, ceildiv(shape.batch, group)) as g:
            stages(g * group, tirx.min(group, shape.batch - g * group))
