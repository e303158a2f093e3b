"""Winograd convolution, F(m x m, r x r): transforms in registers around one GEMM for each point.

Two ways to order the work. Fused: a thread takes a rectangle of tiles through all stages, in its own cache; for large
images. Staged: all tiles are transformed, then the GEMMs are shared out by point, then all outputs are made, so that
the transformed weight, (points / r)^2 times the weight, is read once; for small images and many channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config, Extent, Kernel, Site
from tvm_structured.schedules.channel_blocks import BlockWriter, block_view
from tvm_structured.schedules.emit import Emitter, arg, ceildiv, parallel, prim_func, scratch, serial
from tvm_structured.schedules.gemm import multiply_block
from tvm_structured.schedules.images import ImageShape, ImageWriter, view
from tvm_structured.schedules.winograd_blocks import gather_blocks, scatter_blocks
from tvm_structured.schedules.winograd_cost import ranked_configs
from tvm_structured.schedules.winograd_tiles import TileGrid, gather_tiles, scatter_tiles
from tvm_structured.structures.base import Structure
from tvm_structured.structures.winograd import Winograd


class WinogradKernel(Kernel):
    """Fused or staged Winograd on NCHW images."""

    name = "winograd"
    takes_images = True

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
            x = arg("x", site.stored_x)
            order = (-(-shape.outs // width), grid.points**2)
            weight = arg("weight", (*(order if config["order"] == "fused" else order[::-1]), shape.channels, width))
            writer = (BlockWriter if site.blocked_y else ImageWriter)(e, site.epilogue, site.y_shape)
            source = block_view(x) if site.blocked_x else view(x, (*site.x_shape[:2], math.prod(shape.image)))
            emit = fused if config["order"] == "fused" else staged
            emit(e, grid, config, Images(e, grid, source, site.blocked_x, writer), weight)
        return made.func


@dataclass(frozen=True)
class Images:
    """x and y of a convolution, either of them NCHW or in blocks of channels, as tiles of the transformed domain."""

    e: Emitter
    grid: TileGrid
    x: Any
    has_blocks: bool
    writer: ImageWriter | BlockWriter

    def gather(self, place: Any, channel: Any, count: int, store: Callable[[Any, Any, Any, Any], None]) -> None:
        gather = gather_blocks if self.has_blocks else gather_tiles
        gather(self.e, self.grid, self.x, place, channel, count, store)

    def scatter(self, place: Any, channel: Any, count: Extent, load: Callable[[Any, Any, Any], Any]) -> None:
        if isinstance(self.writer, BlockWriter):
            scatter_blocks(self.e, self.grid, self.writer, place, channel, count, load)
        else:
            scatter_tiles(self.e, self.grid, self.writer, place, channel, count, load)


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
    ahead: Callable[[Any], None],
) -> None:
    """store(row, q, vector) of sum_k load(row, k) * panel(k, q); where rows are left the last block overlaps.

    ahead(k) asks for row k of the panel that comes next.
    """
    mr, nr = config["mr"], config["nr"]

    def block(first: Any) -> None:
        acc = multiply_block(e, mr, nr, channels, lambda i, k: load(first + i, k), panel, prefetch=ahead)
        for i in range(mr):
            for q in range(nr):
                store(first + i, q, acc[i][q][0])

    count = -(-rows // mr) if isinstance(rows, int) else (rows + mr - 1) // mr
    with serial(0, count) as i:
        block(tirx.min(i * mr, rows - mr))


def prefetch_row(e: Emitter, weight: Any, row: tuple[Any, Any, Any], vectors: int) -> None:
    """Large weights come from level 3 or memory; behind the last panel it asks for what nobody reads."""
    for q in range(vectors):
        e.prefetch(weight, *row, q * e.lanes)


def fused(e: Emitter, grid: TileGrid, config: Config, images: Images, weight: Any) -> None:
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
            lambda channel, count: images.gather(
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
                    lambda k: prefetch_row(e, weight, (block, point + 1, k), nr),
                )
            with serial(0, nr) as q:
                first = block * width + q * lanes
                images.scatter(
                    place,
                    first,
                    tirx.max(tirx.min(lanes, shape.outs - first), 0),
                    lambda point, r, c: e.load(sums, point * sum_stride + (r * grid.columns + c) * width + q * lanes),
                )


def staged(e: Emitter, grid: TileGrid, config: Config, images: Images, weight: Any) -> None:
    """Three parallel regions over a group of images: transforms, GEMMs, inverse transforms."""
    batch, group = grid.shape.batch, config["images"]
    width = config["nr"] * e.lanes
    data_stride = stride_of(group * grid.tiles * padded_channels(e, grid.shape.channels))
    sum_stride = stride_of(group * grid.tiles * -(-grid.shape.outs // width) * width)
    data, sums = (scratch((grid.points**2 * stride,)) for stride in (data_stride, sum_stride))
    stages = Stages(e, grid, config, (data, data_stride), (sums, sum_stride))

    def run(first: Any, count: Extent) -> None:
        stages.transform(images, first, count)
        stages.multiply(weight, count)
        stages.finish(images, first, count)

    if isinstance(batch, int) and batch <= group:
        run(0, batch)
    else:
        with serial(0, ceildiv(batch, group)) as g:
            run(g * group, tirx.min(group, batch - g * group))


@dataclass(frozen=True)
class Stages:
    """Transformed data and products of a group of images in scratch, (points^2, tiles, channels), and what fills them.

    Both are (buffer, elements between points).
    """

    e: Emitter
    grid: TileGrid
    config: Config
    data: tuple[Any, int]
    sums: tuple[Any, int]

    @property
    def depth(self) -> int:
        """Elements between tiles of the transformed data."""
        return padded_channels(self.e, self.grid.shape.channels)

    @property
    def width(self) -> int:
        """Output channels of a block."""
        return self.config["nr"] * self.e.lanes

    @property
    def outs(self) -> int:
        return -(-self.grid.shape.outs // self.width) * self.width

    def place(self, unit: Any, first_image: Any) -> tuple[Any, Any, Any]:
        return (first_image + unit // self.grid.rectangles, *self.grid.origin(unit % self.grid.rectangles))

    def tile(self, unit: Any, r: Any, c: Any) -> Any:
        """The number of a rectangle's tile within the group."""
        row, column = self.grid.origin(unit % self.grid.rectangles)
        return unit // self.grid.rectangles * self.grid.tiles + (row + r) * self.grid.size[1] + (column + c)

    def transform(self, source: Images, first_image: Any, images: Extent) -> None:
        e, (data, stride) = self.e, self.data
        full, rest = divmod(self.grid.shape.channels, e.lanes)

        def gather(unit: Any, channel: Any, count: int) -> None:
            source.gather(
                self.place(unit, first_image),
                channel,
                count,
                lambda point, r, c, value: e.store(
                    data, value, point * stride + self.tile(unit, r, c) * self.depth + channel
                ),
            )

        if full:
            with parallel(0, images * self.grid.rectangles * full) as unit:
                gather(unit // full, unit % full * e.lanes, e.lanes)
        if rest:
            with parallel(0, images * self.grid.rectangles) as unit:
                gather(unit, full * e.lanes, rest)

    def multiply(self, weight: Any, images: Extent) -> None:
        e, (data, data_stride), (sums, sum_stride) = self.e, self.data, self.sums
        blocks = self.outs // self.width
        with parallel(0, self.grid.points**2 * blocks) as unit:
            point, block = unit // blocks, unit % blocks
            gemm(
                e,
                images * self.grid.tiles,
                self.grid.shape.channels,
                self.config,
                lambda row, k: data[point * data_stride + row * self.depth + k],
                lambda k, q: e.load(weight, point, block, k, q * e.lanes),
                lambda row, q, value: e.store(
                    sums, value, point * sum_stride + row * self.outs + block * self.width + q * e.lanes
                ),
                lambda k: prefetch_row(e, weight, (point, block + 1, k), self.config["nr"]),
            )

    def finish(self, target: Images, first_image: Any, images: Extent) -> None:
        e, (sums, stride), outs = self.e, self.sums, self.grid.shape.outs
        vectors = -(-outs // e.lanes)
        with parallel(0, images * self.grid.rectangles * vectors) as unit:
            piece, channel = unit // vectors, unit % vectors * e.lanes
            target.scatter(
                self.place(piece, first_image),
                channel,
                e.lanes if outs % e.lanes == 0 else tirx.min(e.lanes, outs - channel),
                lambda point, r, c: e.load(sums, point * stride + self.tile(piece, r, c) * self.outs + channel),
            )
