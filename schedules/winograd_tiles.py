"""The transforms of Winograd kernels: image -> tiles in the transformed domain -> image, channels in lanes.

With a channel to a lane the transforms need no shuffle. Images are channel-major, so `lanes` channels of a window are
transposed into scratch first, and results are transposed back on their way to the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tvm import tirx

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.emit import Emitter, either, local, scratch, serial
from tvm_structured.schedules.images import ImageShape, ImageWriter, transpose
from tvm_structured.structures.winograd import Matrix, transforms


@dataclass(frozen=True)
class TileGrid:
    """Tiles of the output, and rectangles of them that are worked on together.

    The last rectangle of a row or column moves back where tiles are left over, and computes a few again.
    """

    shape: ImageShape
    tile: int
    rows: int  # tiles of a rectangle
    columns: int

    @property
    def points(self) -> int:
        """Points in one dimension."""
        return self.tile + self.shape.kernel[0] - 1

    @property
    def size(self) -> tuple[int, int]:
        """Tiles of the image, vertically and horizontally."""
        height, width = self.shape.output
        return -(-height // self.tile), -(-width // self.tile)

    @property
    def tiles(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def in_rectangle(self) -> int:
        return self.rows * self.columns

    @property
    def rectangles(self) -> int:
        return -(-self.size[0] // self.rows) * -(-self.size[1] // self.columns)

    def origin(self, rectangle: Any) -> tuple[Any, Any]:
        """(row, column) of a rectangle's first tile."""
        across = -(-self.size[1] // self.columns)
        row, column = rectangle // across * self.rows, rectangle % across * self.columns
        return tirx.min(row, self.size[0] - self.rows), tirx.min(column, self.size[1] - self.columns)


def linear_forms(e: Emitter, matrix: Matrix, values: Sequence[Any]) -> list[Any]:
    """matrix @ values, in registers. Pairs of opposite points are evaluated as sum and difference."""
    columns, matrix = pair_columns(e, matrix, values)
    partner = {i: j for i, j in row_pairs(matrix)}
    results: list[Any] = [None] * len(matrix)
    for i, row in enumerate(matrix):
        if results[i] is not None:
            continue
        if i not in partner:
            results[i] = e.bind(weighted_sum(e, row, columns))
            continue
        other = matrix[partner[i]]
        common = [c if c == d else Fraction(0) for c, d in zip(row, other, strict=True)]
        opposite = [c if c != d else Fraction(0) for c, d in zip(row, other, strict=True)]
        even, odd = (e.bind(weighted_sum(e, terms, columns)) for terms in (common, opposite))
        results[i], results[partner[i]] = e.bind(even + odd), e.bind(even - odd)
    return results


def pair_columns(e: Emitter, matrix: Matrix, values: Sequence[Any]) -> tuple[list[Any], Matrix]:
    """Replace columns j, j + 1 that agree up to signs by their values' sum and difference, one each to a row."""
    columns, kept = [], []
    transposed = list(zip(*matrix, strict=True))
    j = 0
    while j < len(values):
        a = transposed[j]
        b = transposed[j + 1] if j + 1 < len(values) else ()
        signs = {x == y for x, y in zip(a, b, strict=True) if x or y} if b else set()
        if signs == {True, False} and all(abs(x) == abs(y) for x, y in zip(a, b, strict=True)):
            columns += [e.bind(values[j] + values[j + 1]), e.bind(values[j] - values[j + 1])]
            kept.append(tuple(x if x == y else Fraction(0) for x, y in zip(a, b, strict=True)))
            kept.append(tuple(x if x != y else Fraction(0) for x, y in zip(a, b, strict=True)))
            j += 2
        else:
            columns.append(values[j])
            kept.append(a)
            j += 1
    return columns, tuple(zip(*kept, strict=True))


def row_pairs(matrix: Matrix) -> list[tuple[int, int]]:
    """Neighbouring rows that agree in some places and are opposite in the others."""
    pairs, i = [], 0
    while i + 1 < len(matrix):
        signs = {c == d for c, d in zip(matrix[i], matrix[i + 1], strict=True) if c or d}
        same = all(abs(c) == abs(d) for c, d in zip(matrix[i], matrix[i + 1], strict=True))
        if same and signs == {True, False}:
            pairs.append((i, i + 1))
            i += 1
        i += 1
    return pairs


def weighted_sum(e: Emitter, row: Sequence[Fraction], values: Sequence[Any]) -> Any:
    """sum row[i] * values[i], a positive term first so that nothing has to be negated."""
    total = None
    for c, value in sorted(zip(row, values, strict=True), key=lambda pair: pair[0] < 0):
        if c == 0:
            continue
        term = value if abs(c) == 1 else value * e.splat(float(abs(c)))
        if total is None:
            total = term if c > 0 else e.splat(0.0) - term
        else:
            total = total + term if c > 0 else total - term
    return e.splat(0.0) if total is None else total


def transform_square(
    e: Emitter, matrix: Matrix, load: Callable[[Any, Any], Any], store: Callable[[Any, Any, Any], None]
) -> None:
    """store(i, j, value) of matrix @ d @ matrix^T for the square d that load(i, j) reads.

    Columns, then rows, as two loops: unrolled, a square would not fit the registers either, and take long to compile.
    """
    results, size = len(matrix), len(matrix[0])
    half = local((results * size * e.lanes,))
    with serial(0, size) as j:
        column = [e.bind(load(i, j)) for i in range(size)]
        for i, value in enumerate(linear_forms(e, matrix, column)):
            e.store(half, value, (i * size + j) * e.lanes)
    with serial(0, results) as i:
        row = [e.bind(e.load(half, (i * size + j) * e.lanes)) for j in range(size)]
        for j, value in enumerate(linear_forms(e, matrix, row)):
            store(i, j, value)


def gather_tiles(
    e: Emitter,
    grid: TileGrid,
    x: Any,
    place: tuple[Any, Any, Any],
    channel: Any,
    num_channels: int,
    store: Callable[[Any, Any, Any, Any], None],
) -> None:
    """store(point, row, column, vector) of B^T d B for `num_channels` <= lanes channels from `channel` on.

    x is (batch, channels, pixels); `place` is (image, row, column of the rectangle's first tile), and rows and columns
    of tiles count from there.
    """
    m, overlap = grid.tile, grid.points - grid.tile
    pitch = -(-(grid.columns * m + overlap) // e.lanes) * e.lanes
    window = scratch(((grid.rows * m + overlap) * pitch * e.lanes,))
    with serial(0, grid.rows * m + overlap) as r:
        window_row(e, grid, (x, *place), r, (channel, num_channels), (window, pitch))

    b_t = transforms(m, grid.shape.kernel[0])[2]
    with serial(0, grid.rows) as tr:
        with serial(0, grid.columns) as tc:
            corner = (tr * m * pitch + tc * m) * e.lanes
            transform_square(
                e,
                b_t,
                lambda i, j: e.load(window, corner + (i * pitch + j) * e.lanes),
                lambda i, j, value: store(i * grid.points + j, tr, tc, value),
            )


def window_row(
    e: Emitter,
    grid: TileGrid,
    source: tuple[Any, Any, Any, Any],
    r: Any,
    channels: tuple[Any, int],
    target: tuple[Any, int],
) -> None:
    """Row r of the rectangle's window into `target` (window, pitch), pixel by pixel with channels in lanes.

    `source` is x and the rectangle's place; zeros outside the image.
    """
    (x, image, tile_row, tile_column), (window, pitch), (first, num_channels) = source, target, channels
    (height, width), (top, left) = grid.shape.image, grid.shape.padding[:2]
    row = tile_row * grid.tile + r - top

    def square(column: Any, begin: Any, mask: Any) -> None:
        vectors = []
        for i in range(num_channels):
            index = (image, first + i, row * width + column)
            if mask is None:
                vectors.append(e.bind(e.load(x, *index)))
                continue
            vectors.append(e.load_or_zero(x, mask, *index))
        for i, pixel in enumerate(transpose(e, vectors)):
            e.store(window, pixel, begin + i * e.lanes)

    def convert() -> None:
        with serial(0, pitch // e.lanes) as v:
            column = tile_column * grid.tile + v * e.lanes - left
            begin = (r * pitch + v * e.lanes) * e.lanes
            either(
                tirx.all(column >= 0, column + e.lanes <= width),
                lambda: square(column, begin, None),
                lambda: square(column, begin, inside_mask(e, column, width)),
            )

    def clear() -> None:
        with serial(0, pitch) as i:
            e.store(window, e.splat(0.0), (r * pitch + i) * e.lanes)

    either(tirx.all(row >= 0, row < height), convert, clear)


def inside_mask(e: Emitter, first: Any, limit: int) -> Any:
    """Lane i is on where 0 <= first + i < limit; unlike `Emitter.mask` for a negative `first` too.

    Not bound to a name: TVM's analysis of named values cannot take vectors of truth values apart.
    """
    below = e.mask(0, tirx.max(limit - first, 0))
    return tirx.And(below, tirx.Not(e.mask(0, tirx.max(-first, 0))))


def scatter_tiles(
    e: Emitter,
    grid: TileGrid,
    writer: ImageWriter,
    place: tuple[Any, Any, Any],
    channel: Any,
    num_channels: Extent,
    load: Callable[[Any, Any, Any], Any],
) -> None:
    """Store A^T M A of a rectangle for `num_channels` <= lanes output channels from `channel` on.

    load(point, row, column) reads M.
    """
    shape, m, lanes = grid.shape, grid.tile, e.lanes
    image, tile_row, tile_column = place
    height, width = shape.output
    pitch = -(-grid.columns * m // lanes) * lanes
    pixels = scratch((grid.rows * m * pitch * lanes,))
    a_t = transforms(m, shape.kernel[0])[0]
    with serial(0, grid.rows) as tr:
        with serial(0, grid.columns) as tc:
            corner = (tr * m * pitch + tc * m) * lanes
            transform_square(
                e,
                a_t,
                lambda i, j: load(i * grid.points + j, tr, tc),
                lambda i, j, value: e.store(pixels, value, corner + (i * pitch + j) * lanes),
            )
    first_row, first_column = tile_row * m, tile_column * m
    square = local((lanes * lanes,))
    with serial(0, tirx.min(grid.rows * m, height - first_row)) as r:
        with serial(0, pitch // lanes) as v:
            begin = (r * pitch + v * lanes) * lanes
            vectors = [e.bind(e.load(pixels, begin + i * lanes)) for i in range(lanes)]
            for i, vector in enumerate(transpose(e, vectors)):
                e.store(square, vector, i * lanes)
            column = first_column + v * lanes
            limit = tirx.min(width, first_column + grid.columns * m)
            mask = e.bind_mask(column, limit)
            with serial(0, num_channels) as c:
                at = (first_row + r) * width + column
                writer.store(e.load(square, c * lanes), image, channel + c, at, mask)
