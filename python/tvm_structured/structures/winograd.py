"""Winograd: the same convolution with fewer multiplications, F(m x m, r x r).

Y = A^T [(G g G^T) * (B^T d B)] A turns a tile d of (m + r - 1)^2 inputs and a kernel g of r x r into m x m outputs with
one multiplication for each of the (m + r - 1)^2 points (Lavin & Gray 2016, equation 8). The matrices are those of
Toom-Cook: evaluate at points, multiply, interpolate, transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.arrays import contract
from tvm_structured.structures.base import Size, Structure, as_budget, factor, fits
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.layer import Array, Conv2d, Layer, as_layer

Matrix = tuple[tuple[Fraction, ...], ...]


def fractions(text: str) -> tuple[Fraction, ...]:
    return tuple(Fraction(word) for word in text.split())


# Finite points for n = tile + kernel - 1; infinity joins them. Opposite pairs share their work, and every number is a
# short binary fraction, so that A and B are exact in float32. For n = 6 these have half the rounding error of the usual
# 0, 1, -1, 2, -2 (found by trying pairs of eighths), for n = 8 the usual ones are best.
POINTS = {
    4: fractions("0 1 -1"),
    6: fractions("0 3/4 -3/4 3/2 -3/2"),
    8: fractions("0 1 -1 2 -2 1/2 -1/2"),
}
TILES = {3: (4, 2, 6), 5: (4, 2)}  # kernel size -> tiles
SMALLEST_FOR_4 = 8  # outputs in one dimension


@cache
def transforms(tile: int, kernel: int) -> tuple[Matrix, Matrix, Matrix]:
    """(A^T, G, B^T) of F(tile, kernel), exact: (tile, n), (n, kernel) and (n, n) with n = tile + kernel - 1.

    With the points p_0 .. p_{n-2}, M(x) = prod (x - p_i), M_i(x) = M(x) / (x - p_i) and N_i = M_i(p_i):
        A^T[k, i] = p_i^k          and for infinity 1 in the last row
        G[i, k]   = p_i^k / N_i    and for infinity 1 in the last column
        B^T[i]    = coefficients of M_i(x), lowest first, and for infinity those of M(x)
    Signs are moved between G and B^T so that every N_i counts as positive.
    """
    size = tile + kernel - 1
    points = POINTS[size]
    a_t = [[p**k for p in points] + [Fraction(k == tile - 1)] for k in range(tile)]
    g, b_t = [], []
    for i, point in enumerate(points):
        rest = points[:i] + points[i + 1 :]
        scale = Fraction(1)
        for other in rest:
            scale *= point - other
        sign = 1 if scale > 0 else -1
        g.append([sign * point**k / scale for k in range(kernel)])
        b_t.append([sign * c for c in [*product_of_roots(rest), Fraction(0)]])
    g.append([Fraction(k == kernel - 1) for k in range(kernel)])
    b_t.append(product_of_roots(points))
    return freeze(a_t), freeze(g), freeze(b_t)


def product_of_roots(roots: tuple[Fraction, ...]) -> list[Fraction]:
    """Coefficients of prod (x - root), lowest power first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def freeze(rows: list[list[Fraction]]) -> Matrix:
    return tuple(tuple(row) for row in rows)


def operations(matrix: Matrix) -> int:
    """Operations to multiply the matrix by a vector: an addition for each further term, a product unless it is by 1."""
    return sum(max(0, sum(c != 0 for c in row) - 1) + sum(c not in (0, 1, -1) for c in row) for row in matrix)


@dataclass(frozen=True, eq=False)
class Winograd(Structure):
    """A convolution r x r, stride 1, computed on tiles of `tile` x `tile` outputs. Exact but for rounding.

    weight: (out, in, r, r), as in the model. Relative rounding errors in float32 are near 1e-7 for tile 2, 3e-7 for 4
    and 1e-6 for 6.
    """

    name: ClassVar[str] = "winograd"
    accepts: ClassVar[tuple[type[Layer], ...]] = (Conv2d,)
    is_lossless: ClassVar[bool] = True

    tile: int
    weight: Any = factor()

    @property
    def kernel(self) -> int:
        """r, the height and width of the kernel."""
        return int(self.weight.shape[2])

    @classmethod
    def takes(cls, layer: Layer) -> bool:
        """Square kernels of 3 or 5 with stride 1, dilation 1 and one group."""
        return (
            isinstance(layer, Conv2d)
            and layer.kernel[0] == layer.kernel[1]
            and layer.kernel[0] in TILES
            and (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)
        )

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        """All tiles have as many parameters; those come first that are chosen unasked."""
        if isinstance(layer, Conv2d) and cls.takes(layer):
            for tile in TILES[layer.kernel[0]]:
                yield {"tile": tile}

    @classmethod
    def from_dense(cls, layer: Layer, *, tile: int = 4) -> Self:  # type: ignore[override]
        layer = as_layer(layer)
        if not isinstance(layer, Conv2d) or not cls.takes(layer):
            raise ModelError(
                f"{layer.name}: Winograd needs a 3 x 3 or 5 x 5 convolution with stride 1, dilation 1 and one group, "
                f"got a weight of shape {layer.weight.shape}; leave this layer dense"
            )
        if tile not in TILES[layer.kernel[0]]:
            raise ModelError(
                f"{layer.name}: no Winograd tile {tile} for kernels of {layer.kernel[0]}; use one of "
                f"{sorted(TILES[layer.kernel[0]])}"
            )
        out, inner = layer.matrix.shape
        return cls((int(out), int(inner)), tile, layer.weight)

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        """Every layer that it takes is a member; the tile is the one with the fewest operations on its image."""
        layer = as_layer(layer)
        if not isinstance(layer, Conv2d) or not cls.takes(layer):
            return None
        return cls.from_dense(layer, tile=best_tile(layer))

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        """A member where the budget asks for fewer operations or a small error; it never has fewer parameters."""
        layer, budget = as_layer(layer), as_budget(budget)
        if not isinstance(layer, Conv2d) or not cls.takes(layer):
            return None
        best = best_tile(layer)
        for tile in sorted(TILES[layer.kernel[0]], key=lambda tile: (tile != best, tile)):
            member = cls.from_dense(layer, tile=tile)
            if fits(member, layer, budget):
                return member
        return None

    @property
    def points(self) -> int:
        """Points in one dimension, tile + r - 1."""
        return self.tile + self.kernel - 1

    def dense(self) -> Any:
        """(out, r * r * in), channel fastest; of the kind of the weight."""
        return self.weight.swapaxes(1, 2).swapaxes(2, 3).reshape(self.shape)

    def transformed_weight(self) -> Array:
        """G g G^T in float32, computed in float64, (points^2, out, in): vec(G g G^T) = (G kron G) vec(g)."""
        g = as_array(transforms(self.tile, self.kernel)[1])
        out, inner = self.weight.shape[:2]
        kernels = np.asarray(self.weight, np.float64).reshape(out * inner, self.kernel**2)
        return (np.kron(g, g) @ kernels.T).astype(np.float32).reshape(self.points**2, out, inner)

    def apply(self, x: Any) -> Any:
        """x (batch, in, h, w) -> (batch, out, h - r + 1, w - r + 1): the convolution without padding, by tiles.

        numpy or torch, whichever x and the weight are; gradients flow.
        """
        m = self.tile
        height, width = x.shape[2] - self.kernel + 1, x.shape[3] - self.kernel + 1
        rows, columns = -(-height // m), -(-width // m)
        a_t, g, b_t = (as_array(matrix) for matrix in transforms(m, self.kernel))
        if isinstance(x, np.ndarray):
            a_t, g, b_t = (matrix.astype(x.dtype) for matrix in (a_t, g, b_t))
        tiles = overlapping_tiles(x, m, self.points, rows, columns)
        weight = contract("ik,ockl,jl->ijoc", g, self.weight, g)
        data = contract("ik,bcyxkl,jl->ijbcyx", b_t, tiles, b_t)
        products = contract("ijoc,ijbcyx->ijboyx", weight, data)
        outputs = contract("ik,klboyx,jl->boyixj", a_t, products, a_t)
        return outputs.reshape(x.shape[0], self.shape[0], rows * m, columns * m)[:, :, :height, :width]

    def flops(self, rows: int) -> int:
        """Operations for `rows` output positions: both transforms and the products, tiles taken as full.

        For each tile of tile^2 positions: B^T d B for every input channel, one product and sum for each point and
        pair of channels, A^T M A for every output channel. The transform of the weight is done at compile time.
        """
        return -(-rows * tile_operations(self.tile, self.kernel, *self.weight.shape[:2]) // self.tile**2)

    def describe(self) -> str:
        return f"tile={self.tile}"


def tile_operations(tile: int, kernel: int, out: int, inner: int) -> int:
    """Operations of one tile; `operations` of a one-dimensional transform are done for rows, then for columns."""
    a_t, _, b_t = transforms(tile, kernel)
    points = tile + kernel - 1
    data = 2 * points * operations(b_t)
    inverse = (points + tile) * operations(a_t)
    return inner * data + 2 * points**2 * inner * out + out * inverse


def best_tile(layer: Conv2d) -> int:
    """The tile with the fewest operations on the layer's image, edges counted; 4 where the image is not known.

    On outputs below 8 x 8 it is 2: the transformed weight, (points / r)^2 times as large as the weight, would be read
    for too few tiles. Tile 6 costs digits and is never chosen here.
    """
    if layer.output_hw is None:
        return 4
    height, width = layer.output_hw
    if min(height, width) < SMALLEST_FOR_4:
        return 2
    out, inner = int(layer.weight.shape[0]), int(layer.weight.shape[1])

    def work(tile: int) -> int:
        return -(-height // tile) * -(-width // tile) * tile_operations(tile, layer.kernel[0], out, inner)

    return min((2, 4), key=work)


def as_array(matrix: Matrix) -> Array:
    """The exact matrix in float64."""
    return np.array([[float(c) for c in row] for row in matrix])


def overlapping_tiles(x: Any, step: int, size: int, rows: int, columns: int) -> Any:
    """(batch, in, h, w) -> (batch, in, rows, columns, size, size), tiles `step` apart, zeros beyond the image."""
    height, width = (rows - 1) * step + size, (columns - 1) * step + size
    below, right = height - x.shape[2], width - x.shape[3]
    if isinstance(x, np.ndarray):
        padded: Any = np.pad(x, ((0, 0), (0, 0), (0, below), (0, right)))
    else:
        import torch

        padded = torch.nn.functional.pad(x, (0, right, 0, below))
    y = np.arange(rows)[:, None] * step + np.arange(size)
    z = np.arange(columns)[:, None] * step + np.arange(size)
    return padded[:, :, y[:, None, :, None], z[None, :, None, :]]
