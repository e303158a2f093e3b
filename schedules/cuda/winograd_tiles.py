"""Tiles of images to and from the Winograd domain.

A block of threads takes 8 (4) neighbouring tiles of one row of tiles by 32 channels. Images pass through shared
memory, so that both sides are read and written in the order in which they lie: pixels or channels fastest (NCHW or
NHWC), channels fastest in the domain (points^2, tiles, channels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cuda.circulant_many import Scalars
from tvm_structured.schedules.cuda.epilogue import finished
from tvm_structured.schedules.cuda.threads import WARP, Shared, Threads, all_of, ceildiv, f32, launch, under
from tvm_structured.schedules.fft import weighted
from tvm_structured.schedules.gpu import GpuSite
from tvm_structured.structures.winograd import Winograd, transforms


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a layer: `tile` outputs and `points` inputs across."""

    tile: int
    kernel: int
    batch: Extent
    channels: int
    outs: int
    image: tuple[int, int]
    output: tuple[int, int]
    padding: tuple[int, int]  # top, left

    @classmethod
    def of(cls, structure: Winograd, site: GpuSite) -> TileGrid:
        assert site.conv is not None
        place = (1, 2, 3) if site.layout == "NCHW" else (3, 1, 2)
        (channels, *image), (outs, *output) = ([s[i] for i in place] for s in (site.x_shape, site.y_shape))
        sizes = tuple(image), tuple(output)
        padding = site.conv.padding[:2]
        return cls(structure.tile, structure.kernel, site.x_shape[0], channels, outs, *sizes, padding)

    @property
    def points(self) -> int:
        return self.tile + self.kernel - 1

    @property
    def group(self) -> int:
        """Tiles of a block of threads: as many as static shared memory holds."""
        return 8 if self.points < 8 else 4

    @property
    def down(self) -> int:
        return -(-self.output[0] // self.tile)

    @property
    def across(self) -> int:
        return -(-self.output[1] // self.tile)

    @property
    def count(self) -> Extent:
        """Tiles of all images."""
        return self.batch * (self.down * self.across)

    def number(self, row: Any, column: Any) -> Any:
        """A tile's place in the domain; `row` counts the rows of tiles of all images."""
        return row * self.across + column


def emit_data_transform(grid: TileGrid, site: GpuSite, x: Any, data: Any, channels: int, tensorize: bool) -> None:
    """data[f, tile, c] = (B^T d B)[f]; channels that do not exist are zero."""
    n, m, width = grid.points, grid.tile, (grid.group - 1) * grid.tile + grid.points
    b_t = [[float(c) for c in row] for row in transforms(m, grid.kernel)[2]]
    blocks = (ceildiv(grid.across, grid.group), ceildiv(channels, WARP), grid.batch * grid.down)
    with launch(blocks, WARP * grid.group, not tensorize) as (t, (bx, bc, row)):
        patch = Patch(t, grid, (n, width), site.layout)
        top, left = row % grid.down * m - grid.padding[0], bx * (grid.group * m) - grid.padding[1]

        def fetch(c: Any, i: Any, j: Any) -> None:
            at_y, at_x, channel = top + i, left + j, bc * WARP + c
            inside = [0 <= at_y, at_y < grid.image[0], 0 <= at_x, at_x < grid.image[1], channel < grid.channels]
            value = f32(x[image_index(site.layout, row // grid.down, channel, at_y, at_x)])
            patch.values[c, i, j] = tirx.if_then_else(all_of(inside), value, f32(0.0))

        with t.stage():
            patch.each(fetch)
        with t.last_stage():
            c, tile = t.tx % WARP, t.tx // WARP
            rows = [[t.value(patch.values[c, i, tile * m + j]) for j in range(n)] for i in range(n)]
            points = both_sides(t, b_t, rows)

            def store() -> None:
                for f, value in enumerate(points):
                    index = [f, grid.number(row, bx * grid.group + tile), bc * WARP + c]
                    I.buffer_store(data, tirx.Cast(site.dtype, value), index)

            under(all_of([bx * grid.group + tile < grid.across, bc * WARP + c < channels]), store)


def emit_inverse_transform(
    grid: TileGrid, site: GpuSite, products: Any, operands: Mapping[str, Any], y: Any, tensorize: bool
) -> None:
    """y = act(scale * A^T M A + bias + residual)."""
    n, m = grid.points, grid.tile
    a_t = [[float(c) for c in row] for row in transforms(m, grid.kernel)[0]]
    blocks = (ceildiv(grid.across, grid.group), ceildiv(grid.outs, WARP), grid.batch * grid.down)
    with launch(blocks, WARP * grid.group, not tensorize) as (t, (bx, bc, row)):
        patch = Patch(t, grid, (m, grid.group * m), site.layout)
        with t.stage():
            c, tile = t.tx % WARP, t.tx // WARP

            def transform() -> None:
                number = grid.number(row, bx * grid.group + tile)
                rows = [[t.value(products[i * n + j, number, bc * WARP + c]) for j in range(n)] for i in range(n)]
                for f, value in enumerate(both_sides(t, a_t, rows)):
                    patch.values[c, f // m, tile * m + f % m] = value

            under(all_of([bx * grid.group + tile < grid.across, bc * WARP + c < grid.outs]), transform)

        def store(c: Any, i: Any, j: Any) -> None:
            at_y, at_x, channel = row % grid.down * m + i, bx * (grid.group * m) + j, bc * WARP + c
            index = image_index(site.layout, row // grid.down, channel, at_y, at_x)

            def body() -> None:
                value = finished(patch.values[c, i, j], site, operands, index, channel)
                I.buffer_store(y, value, list(index))

            under(all_of([at_y < grid.output[0], at_x < grid.output[1], channel < grid.outs]), body)

        with t.last_stage():
            patch.each(store)


class Patch:
    """Pixels of 32 channels in shared memory, (channels, rows, columns)."""

    def __init__(self, t: Threads, grid: TileGrid, size: tuple[int, int], layout: str) -> None:
        self.t, self.size, self.layout = t, size, layout
        # an odd distance between channels: neighbouring threads work on neighbouring channels
        self.values: Any = OddRows(t, size)

    def each(self, body: Callable[[Any, Any, Any], None]) -> None:
        """body(channel, row, column) for all pixels, spread over the threads in the order of the image."""
        (rows, columns), threads = self.size, self.t.count
        count = WARP * rows * columns
        with I.serial(0, -(-count // threads)) as turn:
            i = turn * threads + self.t.tx
            if self.layout == "NCHW":
                place = i // (rows * columns), i // columns % rows, i % columns
            else:
                place = i % WARP, i // (columns * WARP), i // WARP % columns
            under(True if count % threads == 0 else i < count, lambda: body(*place))


class OddRows:
    """(32, rows, columns) float32, an odd number of words from channel to channel."""

    def __init__(self, t: Threads, size: tuple[int, int]) -> None:
        self.columns = size[1]
        self.flat: Shared = t.shared((WARP, size[0] * size[1]), "float32", padding=1 - size[0] * size[1] % 2)

    def __getitem__(self, index: Sequence[Any]) -> Any:
        c, i, j = index
        return self.flat[c, i * self.columns + j]

    def __setitem__(self, index: Sequence[Any], value: Any) -> None:
        c, i, j = index
        self.flat[c, i * self.columns + j] = value


def both_sides(t: Threads, matrix: list[list[float]], rows: list[list[Any]]) -> list[Any]:
    """matrix * rows * matrix^T, row by row."""
    e = Scalars(t)
    half = [[weighted(e, [row[j] for row in rows], line) for j in range(len(rows))] for line in matrix]
    return [bound(e, weighted(e, half_row, line)) for half_row in half for line in matrix]


def bound(e: Any, value: Any) -> Any:
    return f32(0.0) if value is None else e.bind(value)


def image_index(layout: str, image: Any, channel: Any, row: Any, column: Any) -> tuple[Any, ...]:
    return (image, channel, row, column) if layout == "NCHW" else (image, row, column, channel)
