"""A matrix as square tiles: those of zeros are left out, and equal ones are kept once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tiles = NDArray[np.int8]  # (count, block, block)
LARGEST_TABLE = 1 << 24  # of parts by tiles, bytes; larger ones are sorted instead


@dataclass(frozen=True, eq=False)
class TileMatrix:
    """entries: (n, 3), row and column in tiles and the tile's number; by column, then row."""

    rows: int
    columns: int
    entries: NDArray[np.int64]
    tiles: Tiles
    counts: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)  # what `most_tiles` found

    @classmethod
    def from_dense(cls, weight: NDArray[Any], block: int, skip_zeros: bool, share: bool) -> TileMatrix:
        """Of (out, in) int8."""
        out, inner = weight.shape
        rows, columns = -(-out // block), -(-inner // block)
        whole = np.zeros((rows * block, columns * block), np.int8)
        whole[:out, :inner] = weight
        tiles = whole.reshape(rows, block, columns, block).transpose(2, 0, 1, 3).reshape(-1, block, block)
        column, row = np.divmod(np.arange(rows * columns), rows)
        return cls._of(rows, columns, row, column, np.ascontiguousarray(tiles), skip_zeros, share)

    @classmethod
    def from_coordinates(
        cls, shape: tuple[int, int], row: NDArray[np.int64], column: NDArray[np.int64], values: NDArray[Any], block: int
    ) -> TileMatrix:
        """Of the entries that are not zero, each given once; zero tiles are left out, equal ones shared."""
        rows, columns = -(-shape[0] // block), -(-shape[1] // block)
        places, position = np.unique(column // block * rows + row // block, return_inverse=True)
        tiles = np.zeros((len(places), block, block), np.int8)
        tiles[position.reshape(-1), row % block, column % block] = values
        return cls._of(rows, columns, places % rows, places // rows, tiles, True, True)

    @classmethod
    def _of(
        cls,
        rows: int,
        columns: int,
        row: NDArray[np.int64],
        column: NDArray[np.int64],
        tiles: Tiles,
        skip_zeros: bool,
        share: bool,
    ) -> TileMatrix:
        if skip_zeros:
            kept = tiles.reshape(len(tiles), -1).any(axis=1)
            row, column, tiles = row[kept], column[kept], tiles[kept]
        number = np.arange(len(tiles))
        if share and len(tiles):
            first, number = first_of_equal(tiles)
            tiles = tiles[first]
        return cls(rows, columns, np.stack([row, column, number.reshape(-1)], axis=1).astype(np.int64), tiles)

    def part(self, rows: tuple[int, int], columns: tuple[int, int]) -> NDArray[np.int64]:
        """Entries of the half-open ranges."""
        e = self.entries
        low, high = np.searchsorted(e[:, 1], columns)
        e = e[low:high]
        return e[(e[:, 0] >= rows[0]) & (e[:, 0] < rows[1])]

    def most_tiles(self, rows: int, columns: int) -> int:
        """Different tiles in any `rows` by `columns` part of a regular cut."""
        if not len(self.entries):
            return 1
        if (rows, columns) in self.counts:
            return self.counts[rows, columns]
        row, column, number = self.entries.T
        down, count = -(-self.rows // rows), len(self.tiles)
        part = column // columns * down + row // rows
        parts = down * -(-self.columns // columns)
        if count == len(self.entries):  # all differ: nothing to look for
            most = int(np.bincount(part).max())
        elif parts * count <= LARGEST_TABLE:
            is_there = np.zeros((parts, count), np.bool_)
            is_there[part, number] = True
            most = int(is_there.sum(axis=1).max())
        else:
            most = int(np.bincount(np.unique(part * count + number) // count).max())
        self.counts[rows, columns] = most
        return most


def first_of_equal(tiles: Tiles) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the different tiles first occur, and for every tile the number of its equal among them.

    Tiles are compared by a sum of their words with random factors, then byte by byte.
    """
    flat = tiles.reshape(len(tiles), -1)
    words = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 8))).view(np.uint64)
    sums = words @ random_factors(words.shape[1])  # modulo 2^64
    _, first, number = np.unique(sums, return_index=True, return_inverse=True)
    if (flat[first[number]] != flat).any():  # two that differ have the same sum
        _, first, number = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    return first, number.reshape(-1)


def random_factors(count: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(1 << 63, 1 << 64, count, np.uint64)
