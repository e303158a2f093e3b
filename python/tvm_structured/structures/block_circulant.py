"""Block-circulant: every n x n block of the matrix is circulant (CirCNN; per filter tap: CircConv)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.activation_fit import checked_moments, nearest_circulant
from tvm_structured.structures.base import Size, Structure, as_budget, best_of, factor, fits
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.circulant_pattern import Blocks, CirculantPattern
from tvm_structured.structures.layer import Array, Conv2d, Dense, Layer, as_layer, to_detect

USUAL_BLOCKS = (64, 32, 16, 12, 10, 8, 6, 5, 4, 3, 2)
LONGEST_GUESS = 128  # project looks for a pattern in the weight up to this block
LONGEST_FFT = 128  # beyond, the kernels multiply the even and odd parts of a block by matrices


@dataclass(frozen=True, eq=False)
class BlockCirculant(Structure):
    """W_ij[a, b] = c[i, j, (a - b) mod n], hence y_i = irfft(sum_j rfft(c_ij) * rfft(x_j)).

    c: (p, taps * q, n), n the block length (any number from 2), p = ceil(out / n), q = ceil(in / taps / n).
    The columns form `taps` equal groups, each zero-padded to q * n: one group for a matrix, one for every filter
    tap of a convolution (circulant along channels). `c_ij` is a block's first column.
    Parameters: out * in / n, and what the padding adds.
    """

    name: ClassVar[str] = "block_circulant"
    accepts: ClassVar[tuple[type[Layer], ...]] = (Dense, Conv2d)
    is_frobenius_optimal: ClassVar[bool] = True

    taps: int
    c: Any = factor()

    def __post_init__(self) -> None:
        expected = self.blocks.factor_shape
        if tuple(self.c.shape) != expected:
            raise ModelError(
                f"block_circulant: c of a {self.shape} matrix with {self.taps} taps and block {self.block} "
                f"has shape {expected}, got {tuple(self.c.shape)}"
            )

    @property
    def block(self) -> int:
        """The block length n."""
        return int(self.c.shape[-1])

    @property
    def blocks(self) -> Blocks:
        """The partition of the matrix."""
        return Blocks.of(self.shape, self.taps, self.block)

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        out, inner = layer.matrix.shape
        limit = min(out, inner // layer.taps)
        usual = [Blocks.of((out, inner), layer.taps, n) for n in USUAL_BLOCKS if n <= limit]
        for blocks in sorted(usual, key=lambda b: b.cost):
            if blocks.num_params < layer.num_params:
                yield {"block": blocks.length}

    @classmethod
    def from_dense(cls, layer: Layer, *, block: int, taps: int | None = None) -> Self:  # type: ignore[override]
        """The Frobenius-nearest member: the mean of each wrapped diagonal, over the entries the matrix has.

        `taps` is the layer's own unless given; 1 cuts a convolution's flattened matrix without regard to taps.
        """
        layer = as_layer(layer)
        matrix = layer.matrix
        shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        blocks = Blocks.of(shape, layer.taps if taps is None else taps, block, layer.name)
        return cls(shape, blocks.taps, blocks.diagonal_means(matrix).astype(layer.weight.dtype))

    @classmethod
    def drawn(  # type: ignore[override]
        cls, layer: Layer, rng: np.random.Generator, *, block: int, taps: int | None = None
    ) -> Self:
        out, inner = (int(extent) for extent in layer.matrix.shape)
        blocks = Blocks.of((out, inner), layer.taps if taps is None else taps, block, layer.name)
        return cls((out, inner), blocks.taps, rng.standard_normal(blocks.factor_shape, dtype=np.float32))

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        layer, tol = to_detect(layer, tol)
        if not cls.takes(layer):
            return None
        candidates = [
            (blocks.cost, index, blocks, pattern)
            for index, pattern in enumerate(patterns(layer))
            for blocks in pattern.candidates(layer.num_params, tol)
        ]
        for _, _, blocks, pattern in sorted(candidates, key=lambda c: c[:2]):
            if not pattern.wraps(blocks.length, tol):
                continue
            member = cls.from_dense(layer, block=blocks.length, taps=blocks.taps)
            if member.error(layer) <= tol:
                return member
        return None

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        """As for every structure, among: the usual blocks, those the weight's own pattern suggests, and the
        shortest block that the budget admits (0.1 of the parameters: 10, or 11 where padding costs too much)."""
        layer, budget = as_layer(layer), as_budget(budget)
        if not cls.takes(layer):
            return None
        affordable = cls._within(layer, budget)
        return best_of((cls.from_dense(layer, block=blocks.length) for blocks in affordable), layer, budget)

    @classmethod
    def _within(cls, layer: Layer, budget: Budget) -> list[Blocks]:
        """Partitions that keep to the budget's size and operations, smallest model first."""
        out, inner = (int(v) for v in layer.matrix.shape)
        width = inner // layer.taps

        def cheap(blocks: Blocks) -> bool:
            if blocks.num_params >= layer.num_params:
                return False
            probe = cls(blocks.shape, blocks.taps, np.empty(blocks.factor_shape, np.float32))
            return fits(probe, layer, budget)

        usual = [size["block"] for size in cls.sizes(layer)]
        suggested = CirculantPattern(layer.matrix, layer.taps).likely_lengths(LONGEST_GUESS)
        lengths = {*usual, *suggested}
        kept = [b for n in lengths if cheap(b := Blocks.of((out, inner), layer.taps, n))]
        for n in range(2, max(out, width) + 1):
            shortest = Blocks.of((out, inner), layer.taps, n)
            if cheap(shortest):
                if n not in lengths:
                    kept.append(shortest)
                break
        return sorted(kept, key=lambda b: b.cost)

    def refit(self, layer: Layer, moments: Array) -> Self:
        c = nearest_circulant(layer.matrix, checked_moments(layer, moments), self.blocks, self.c)
        return type(self)(self.shape, self.taps, c.astype(layer.weight.dtype))

    def dense(self) -> Any:
        """(out, in); of the kind of `c`, and differentiable where that is a torch tensor."""
        blocks, n = self.blocks, self.block
        index = (np.arange(n)[:, None] - np.arange(n)) % n
        square = self.c[:, :, index].swapaxes(1, 2)  # (p, n, taps * q, n)
        padded = square.reshape(blocks.rows * n, self.taps, blocks.columns * n)
        return padded[: self.shape[0], :, : blocks.width].reshape(self.shape)

    def apply(self, x: Any) -> Any:
        if x.shape[-1] != self.shape[1]:
            raise ModelError(f"block_circulant takes {self.shape[1]} features, got an input of shape {tuple(x.shape)}")
        if isinstance(x, np.ndarray) and isinstance(self.c, np.ndarray):
            return self._apply_numpy(x)
        return self._apply_torch(x)

    def _apply_numpy(self, x: Array) -> Array:
        blocks, lead, count = self.blocks, x.shape[:-1], math.prod(x.shape[:-1])
        dtype = np.result_type(x.dtype, self.c.dtype)
        taps = x.reshape(count, self.taps, blocks.width)
        padded = np.pad(taps, ((0, 0), (0, 0), (0, blocks.columns * self.block - blocks.width)))
        # one complex matrix product for each frequency, (rows, taps * q) x (taps * q, p)
        spectra = np.fft.rfft(padded.reshape(count, *self.c.shape[1:])).transpose(2, 0, 1)
        weights = np.fft.rfft(self.c).transpose(2, 1, 0)
        product = np.ascontiguousarray(spectra) @ np.ascontiguousarray(weights)
        y = np.fft.irfft(product.transpose(1, 2, 0), n=self.block)
        return (
            y.reshape(count, blocks.rows * self.block)[:, : self.shape[0]].reshape(*lead, self.shape[0]).astype(dtype)
        )

    def _apply_torch(self, x: Any) -> Any:
        torch = sys.modules["torch"]  # one of x and c is a tensor, so it is there
        x, c = (v if isinstance(v, torch.Tensor) else torch.tensor(v) for v in (x, self.c))
        dtype = torch.promote_types(x.dtype, c.dtype)
        wide = torch.promote_types(dtype, torch.float32)  # torch has no half-precision FFT on CPUs
        blocks, lead, count = self.blocks, x.shape[:-1], math.prod(x.shape[:-1])
        taps = x.to(wide).reshape(count, self.taps, blocks.width)
        padded = torch.nn.functional.pad(taps, (0, blocks.columns * self.block - blocks.width))
        spectra = torch.fft.rfft(padded.reshape(count, *self.c.shape[1:])).permute(2, 0, 1)
        product = spectra @ torch.fft.rfft(c.to(x.device, wide)).permute(2, 1, 0)
        y = torch.fft.irfft(product.permute(1, 2, 0), n=self.block)
        return y.reshape(count, blocks.rows * self.block)[:, : self.shape[0]].reshape(*lead, self.shape[0]).to(dtype)

    def flops(self, rows: int) -> int:
        """rows * ((taps * q + p) * transform + 2 * (3h + r) * p * taps * q): h = (n - 1) // 2 complex frequencies take
        three real products each, r = 1 (n odd) or 2 (even) real ones take one. A transform of n reals costs
        n * (2.5 for every prime factor 2 of n, f for every other one), and n^2 beyond LONGEST_FFT."""
        p, columns, n = self.blocks.factor_shape
        product = 2 * (3 * ((n - 1) // 2) + 2 - n % 2) * p * columns
        return rows * (math.ceil((columns + p) * transform_flops(n)) + product)

    def describe(self) -> str:
        return f"block={self.block}" + (f", taps={self.taps}" if self.taps > 1 else "")


def transform_flops(n: int) -> float:
    """Operations of one transform of n reals, as the kernels evaluate it."""
    if n > LONGEST_FFT:
        return n * n
    each, rest, f = 0.0, n, 2
    while rest > 1:
        while rest % f == 0:
            each, rest = each + (2.5 if f == 2 else f), rest // f
        f += 1
    return n * each


def patterns(layer: Layer) -> list[CirculantPattern]:
    """How the matrix may be cut: along the taps, and for a convolution also as one flat matrix."""
    return [CirculantPattern(layer.matrix, taps) for taps in dict.fromkeys((layer.taps, 1))]
