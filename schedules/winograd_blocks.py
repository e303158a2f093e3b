"""Winograd's transforms on images in blocks of channels, which need no transposition: see `winograd_tiles`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.channel_blocks import BlockWriter
from tvm_structured.schedules.emit import Emitter, either, scratch, serial, when
from tvm_structured.schedules.winograd_tiles import TileGrid, transform_square
from tvm_structured.structures.winograd import transforms


def gather_blocks(
    e: Emitter,
    grid: TileGrid,
    x: Any,
    place: tuple[Any, Any, Any],
    channel: Any,
    _: int,
    store: Callable[[Any, Any, Any, Any], None],
) -> None:
    """store(point, row, column, vector) of B^T d B for the block that begins at `channel`.

    x is (batch, blocks, pixels * lanes); the rest as in `gather_tiles`.
    """
    (image, tile_row, tile_column), m, lanes = place, grid.tile, e.lanes
    (height, width), (top, left) = grid.shape.image, grid.shape.padding[:2]
    b_t = transforms(m, grid.shape.kernel[0])[2]
    size = grid.points
    window = scratch((size * size * lanes,))
    with serial(0, grid.rows) as tr:
        with serial(0, grid.columns) as tc:
            row, column = (tile_row + tr) * m - top, (tile_column + tc) * m - left

            def pixel(i: Any, j: Any) -> Any:
                return e.load(x, image, channel // lanes, ((row + i) * width + (column + j)) * lanes)

            def put(i: Any, j: Any, value: Any) -> None:
                store(i * size + j, tr, tc, value)

            def edge() -> None:
                with serial(0, size) as i:
                    with serial(0, size) as j:
                        at, y, z = (i * size + j) * lanes, row + i, column + j
                        either(
                            tirx.all(y >= 0, y < height, z >= 0, z < width),
                            lambda: e.store(window, pixel(i, j), at),
                            lambda: e.store(window, e.splat(0.0), at),
                        )
                transform_square(e, b_t, lambda i, j: e.load(window, (i * size + j) * lanes), put)

            either(
                tirx.all(row >= 0, row + size <= height, column >= 0, column + size <= width),
                lambda: transform_square(e, b_t, pixel, put),
                edge,
            )


def scatter_blocks(
    e: Emitter,
    grid: TileGrid,
    writer: BlockWriter,
    place: tuple[Any, Any, Any],
    channel: Any,
    num_channels: Extent,
    load: Callable[[Any, Any, Any], Any],
) -> None:
    """Store A^T M A of a rectangle for the block that begins at `channel`, if it has channels.

    load(point, row, column) reads M.
    """
    shape, m = grid.shape, grid.tile
    image, tile_row, tile_column = place
    height, width = shape.output
    a_t = transforms(m, shape.kernel[0])[0]

    def tiles() -> None:
        block = channel // e.lanes
        features = writer.features(block)
        with serial(0, grid.rows) as tr:
            with serial(0, grid.columns) as tc:
                row, column = (tile_row + tr) * m, (tile_column + tc) * m

                def put(i: Any, j: int, value: Any) -> None:
                    def store() -> None:
                        writer.store(value, image, block, (row + i) * width + column + j, features)

                    if height % m == 0 and width % m == 0:
                        store()
                        return
                    with when(tirx.all(row + i < height, column + j < width)):
                        store()

                transform_square(e, a_t, lambda i, j: load(i * grid.points + j, tr, tc), put)

    if isinstance(num_channels, int):
        tiles()
        return
    with when(num_channels > 0):
        tiles()
