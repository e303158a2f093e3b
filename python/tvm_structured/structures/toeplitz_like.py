"""Toeplitz-like: displacement rank up to 4, a short sum of products of two Toeplitz matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.base import Size, Structure, factor
from tvm_structured.structures.displacement import LARGEST_RANK, displaced, displacement_rank, shift_signs
from tvm_structured.structures.layer import Array, Dense, Layer, as_layer, to_detect
from tvm_structured.structures.toeplitz_fit import fit, undisplaced
from tvm_structured.structures.truncated_svd import Triplets, leading_svd

LONGEST = 1 << 14  # of a transform
SHORTEST = 1 << 8


@dataclass(frozen=True, eq=False)
class ToeplitzLike(Structure):
    """W = sum_i A_i B_i, Toeplitz matrices A_i (out, in) and B_i (in, in) of wrapped vectors.

    With (e, f) = `shift_signs`: A_i[a, k] = (Z_e^k c_i)[a] and B_i[k, j] = ((Z_f^T)^(in - 1 - k) h_i)[j].
    columns: c, (rank, out); rows: h, (rank, in). Displacement Z_e W - W Z_f = sum_i g_i h_i^T, where
    c_i = (Z_e^in - f)^-1 g_i. Circulants have rank 1, Toeplitz matrices 2. The projection (`toeplitz_fit`) is
    exact for members. Source: Pan, "Structured Matrices and Polynomials", 2001, chapter 4.
    """

    name: ClassVar[str] = "toeplitz_like"
    accepts: ClassVar[tuple[type[Layer], ...]] = (Dense,)

    columns: Any = factor()
    rows: Any = factor()

    def __post_init__(self) -> None:
        expected = tuple((self.columns.shape[0], extent) for extent in self.shape)
        shapes = tuple(self.columns.shape), tuple(self.rows.shape)
        if shapes != expected:
            raise ModelError(f"{self.name}: a {self.shape} matrix has factors of shapes {expected}, got {shapes}")

    @property
    def rank(self) -> int:
        return int(self.columns.shape[0])

    @property
    def length(self) -> int:
        """Of the transforms: a power of two, long enough for nothing to wrap around."""
        out, inner = self.shape
        return max(SHORTEST, 1 << (inner + max(out, inner) - 2).bit_length())

    @classmethod
    def takes(cls, layer: Layer) -> bool:
        """Dense layers whose transforms are no longer than LONGEST."""
        return super().takes(layer) and layer.matrix.shape[1] + max(layer.matrix.shape) - 1 <= LONGEST

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        for rank in range(1, min(LARGEST_RANK, *layer.matrix.shape) + 1):
            if rank * sum(layer.matrix.shape) < layer.num_params:
                yield {"rank": rank}

    @classmethod
    def from_dense(cls, layer: Layer, *, rank: int) -> Self:  # type: ignore[override]
        """A near member (`toeplitz_fit`), exact for members. Raises ModelError for a rank outside 1..4."""
        layer = as_layer(layer)
        out, inner = (int(extent) for extent in layer.matrix.shape)
        if not 1 <= rank <= min(LARGEST_RANK, out, inner):
            raise ModelError(f"{layer.name}: displacement rank {rank} is outside 1..{min(LARGEST_RANK, out, inner)}")
        return cls._from_displacement(layer, leading_svd(displaced(layer.matrix), rank), rank)

    @classmethod
    def members(cls, layer: Layer) -> Iterator[Self]:
        """All from one decomposition of the displacement."""
        ranks = [int(size["rank"]) for size in cls.sizes(layer)]
        if ranks:
            triplets = leading_svd(displaced(layer.matrix), ranks[-1])
            yield from (cls._from_displacement(layer, triplets, rank) for rank in ranks)

    @classmethod
    def _from_displacement(cls, layer: Layer, triplets: Triplets, rank: int) -> Self:
        u, s, vh = triplets
        columns, rows = fit(layer.matrix, (u[:, :rank], s[:rank], vh[:rank]))
        dtype, (out, inner) = layer.weight.dtype, layer.matrix.shape
        return cls((int(out), int(inner)), columns.astype(dtype), rows.astype(dtype))

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        """As for every structure; a few rows and columns of the displacement exclude most weights."""
        layer, tol = to_detect(layer, tol)
        least = displacement_rank(layer.matrix, tol) if cls.takes(layer) else None
        if least is None:
            return None
        for size in cls.sizes(layer):
            if size["rank"] >= least:
                member = cls.from_dense(layer, **size)
                if member.error(layer) <= tol:
                    return member
        return None

    # -- meaning ----------------------------------------------------------------------------------------

    def symbols(self) -> tuple[Any, Any]:
        """(rank, length) each: the first columns of the cyclic matrices that hold the A_i and the B_i."""
        (out, inner), (e, f), length = self.shape, shift_signs(self.shape), self.length
        # offsets a - k from 1 - in to out - 1, and k - j; negative ones lie at the end
        offsets = np.concatenate([np.arange(out), np.arange(1 - inner, 0)])
        wraps = -(offsets // out)
        left = self.columns[:, offsets % out] * as_signs(np.where(wraps % 2, e, 1), self.columns)
        offsets = np.concatenate([np.arange(inner), np.arange(1 - inner, 0)])
        place = inner - 1 - offsets  # j + in - 1 - k
        right = self.rows[:, place % inner] * as_signs(np.where(place >= inner, f, 1), self.rows)
        return spread(left, out, length), spread(right, inner, length)

    def apply(self, x: Any) -> Any:
        out, inner = self.shape
        if x.shape[-1] != inner:
            raise ModelError(f"{self.name} takes {inner} features, got an input of shape {tuple(x.shape)}")
        fft, length, dtype = fourier(x), self.length, x.dtype
        left, right, x = (widened(array) for array in (*self.symbols(), x))
        spectrum = fft.rfft(x, n=length)[..., None, :] * fft.rfft(right, n=length)
        between = fft.irfft(spectrum, n=length)[..., :inner]
        total = (fft.rfft(between, n=length) * fft.rfft(left, n=length)).sum(-2)
        y = fft.irfft(total, n=length)[..., :out]
        return y.astype(dtype) if isinstance(y, np.ndarray) else y.to(dtype)

    def dense(self) -> Any:
        """(out, in); differentiable where the factors are torch tensors. Numpy factors go by the displacement."""
        if hasattr(self.columns, "detach"):
            return super().dense()
        return undisplaced(self.columns, self.rows, self.shape).astype(self.columns.dtype)

    def flops(self, rows: int) -> int:
        """2 + 2 rank complex transforms of 5 L log2 L operations, and the products between, for two rows at once."""
        length = self.length
        transforms = (2 + 2 * self.rank) * 5 * length * int(math.log2(length))
        return -(-rows // 2) * (transforms + 14 * self.rank * length)

    def describe(self) -> str:
        return f"rank={self.rank}"


def fourier(x: Any) -> Any:
    """numpy.fft or torch.fft."""
    if isinstance(x, np.ndarray):
        return np.fft
    import torch

    return torch.fft


def as_signs(signs: Array, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return signs.astype(like.dtype)
    import torch

    return torch.as_tensor(signs, dtype=like.dtype, device=like.device)


def spread(values: Any, first: int, length: int) -> Any:
    """(rank, count) -> (rank, length), zeros behind the first ones and the others at the end."""
    shape = (values.shape[0], length - values.shape[1])
    if isinstance(values, np.ndarray):
        return np.concatenate([values[:, :first], np.zeros(shape, values.dtype), values[:, first:]], axis=1)
    import torch

    return torch.cat([values[:, :first], values.new_zeros(shape), values[:, first:]], dim=1)


def widened(x: Any) -> Any:
    """At least float32: torch transforms nothing narrower on CPUs."""
    if isinstance(x, np.ndarray) or x.element_size() >= 4:
        return x
    return x.float()
