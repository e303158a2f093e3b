"""Low rank: W = U V with U (out, r) and V (r, in)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.base import Size, Structure, factor, fits, as_budget
from tvm_structured.structures.layer import Array, Conv2d, Dense, Layer, as_layer


@dataclass(frozen=True, eq=False)
class LowRank(Structure):
    """y = U (V x). Smaller than dense iff rank < out * in / (out + in).

    u: (out, rank); v: (rank, in). The projection is the truncated SVD (Eckart-Young: Frobenius-optimal),
    with the singular values shared evenly between the two factors.
    """

    name: ClassVar[str] = "low_rank"
    accepts: ClassVar[tuple[type[Layer], ...]] = (Dense, Conv2d)

    u: Any = factor()
    v: Any = factor()

    @property
    def rank(self) -> int:
        return int(self.v.shape[0])

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        limit = largest_useful_rank(layer.matrix.shape)
        rank = 1
        while rank <= limit:
            yield {"rank": rank}
            rank *= 2

    @classmethod
    def from_dense(cls, layer: Layer, *, rank: int) -> Self:
        matrix = as_layer(layer).matrix
        if not 1 <= rank <= min(matrix.shape):
            raise ModelError(f"{layer.name}: rank {rank} is outside 1..{min(matrix.shape)} of shape {matrix.shape}")
        return cls._from_svd(layer, svd(matrix), rank)

    @classmethod
    def _from_svd(cls, layer: Layer, usv: tuple[Array, Array, Array], rank: int) -> Self:
        u, s, vh = usv
        root = np.sqrt(s[:rank])
        dtype = layer.weight.dtype
        shape = (int(layer.matrix.shape[0]), int(layer.matrix.shape[1]))
        return cls(shape, (u[:, :rank] * root).astype(dtype), (root[:, None] * vh[:rank]).astype(dtype))

    @classmethod
    def detect(cls, layer: Any, tol: float = 1e-5) -> Self | None:
        layer = as_layer(layer)
        if not cls.takes(layer):
            return None
        usv = svd(layer.matrix)
        rank = max(1, rank_within(usv[1], tol))
        return cls._from_svd(layer, usv, rank) if rank <= largest_useful_rank(layer.matrix.shape) else None

    @classmethod
    def project(cls, layer: Any, budget: Any) -> Self | None:
        layer, budget = as_layer(layer), as_budget(budget)
        if not cls.takes(layer):
            return None
        usv = svd(layer.matrix)
        limit = largest_useful_rank(layer.matrix.shape)
        if budget.max_error is None:
            ranks = range(limit, 0, -1)
        else:
            ranks = range(max(1, rank_within(usv[1], budget.max_error)), limit + 1)
        out, inner = layer.matrix.shape
        for rank in ranks:
            cheap = (budget.max_params is None or rank * (out + inner) <= budget.max_params * layer.num_params) and (
                budget.max_flops is None or rank * (out + inner) <= budget.max_flops * out * inner
            )
            if cheap:
                member = cls._from_svd(layer, usv, rank)
                return member if fits(member, layer, budget) else None
        return None

    def apply(self, x: Any) -> Any:
        return (x @ self.v.T) @ self.u.T

    def flops(self, rows: int) -> int:
        return 2 * rows * self.rank * sum(self.shape)

    def describe(self) -> str:
        return f"rank={self.rank}"


def largest_useful_rank(shape: tuple[int, ...]) -> int:
    """The largest rank with fewer numbers than the dense matrix."""
    out, inner = shape
    return (out * inner - 1) // (out + inner)


def rank_within(s: Array, tol: float) -> int:
    """The smallest rank whose truncation leaves a relative Frobenius error of at most `tol`."""
    squares = s.astype(np.float64) ** 2
    tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])  # tails[r]: what rank r leaves out
    return int(np.argmax(tails <= tol**2 * tails[0]))


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Thin SVD in the precision of the weight, but at least float32."""
    return np.linalg.svd(matrix.astype(np.result_type(matrix.dtype, np.float32)), full_matrices=False)
