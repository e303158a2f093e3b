"""Low rank: W = U V with U (out, r) and V (r, in)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.activation_fit import checked_moments, nearest_low_rank
from tvm_structured.structures.base import Size, Structure, as_budget, factor, fits
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.layer import Array, Conv2d, Dense, Layer, as_layer, to_detect
from tvm_structured.structures.truncated_svd import (
    DIRECT,
    FLOAT32_FLOOR,
    POWER_STEPS,
    Triplets,
    exceeds_rank,
    leading_svd,
    svd,
    tails_of,
)


@dataclass(frozen=True, eq=False)
class LowRank(Structure):
    """y = U (V x). Smaller than dense iff rank < out * in / (out + in).

    u: (out, rank); v: (rank, in). The projection is the truncated SVD (Eckart-Young: Frobenius-optimal),
    with the singular values shared evenly between the two factors. Where both sides exceed `DIRECT` it comes
    from subspace iteration: optimal for weights that have the rank, else within about 1 % of the optimal error.
    """

    name: ClassVar[str] = "low_rank"
    accepts: ClassVar[tuple[type[Layer], ...]] = (Dense, Conv2d)
    is_frobenius_optimal: ClassVar[bool] = True

    u: Any = factor()
    v: Any = factor()

    def __post_init__(self) -> None:
        (out, inner), u, v = self.shape, tuple(self.u.shape), tuple(self.v.shape)
        if len(u) != 2 or len(v) != 2 or (u[0], v[1]) != (out, inner) or u[1] != v[0]:
            raise ModelError(f"low_rank: factors u {u} and v {v} do not multiply to a {out} x {inner} matrix")

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
    def from_dense(cls, layer: Layer, *, rank: int) -> Self:  # type: ignore[override]
        layer = as_layer(layer)
        check_rank(layer, rank)
        return cls._from_triplets(layer, leading_svd(layer.matrix, rank), rank)

    @classmethod
    def drawn(cls, layer: Layer, rng: np.random.Generator, *, rank: int) -> Self:  # type: ignore[override]
        check_rank(layer, rank)
        out, inner = (int(extent) for extent in layer.matrix.shape)
        u, v = (rng.standard_normal(shape, dtype=np.float32) for shape in ((out, rank), (rank, inner)))
        return cls((out, inner), u, v)

    @classmethod
    def _from_triplets(cls, layer: Layer, triplets: Triplets, rank: int) -> Self:
        u, s, vh = triplets
        root = np.sqrt(s[:rank])
        dtype = layer.weight.dtype
        shape = (int(layer.matrix.shape[0]), int(layer.matrix.shape[1]))
        return cls(shape, (u[:, :rank] * root).astype(dtype), (root[:, None] * vh[:rank]).astype(dtype))

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        """As for every structure. A 4096 x 4096 weight is answered in about a second: small ranks by a range
        finder whose residual is checked, full rank by a bound (`exceeds_rank`), only the rest by a full SVD."""
        layer, tol = to_detect(layer, tol)
        limit = largest_useful_rank(layer.matrix.shape) if cls.takes(layer) else 0
        found = smallest_within(layer.matrix, limit, tol) if limit else None
        return None if found is None else cls._from_triplets(layer, *found)

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        layer, budget = as_layer(layer), as_budget(budget)
        limit = affordable_rank(layer, budget) if cls.takes(layer) else 0
        if limit < 1:
            return None
        if budget.max_error is None:
            found: tuple[Triplets, int] | None = leading_svd(layer.matrix, limit), limit
        else:
            found = smallest_within(layer.matrix, limit, budget.max_error)
        if found is None:
            return None
        member = cls._from_triplets(layer, *found)
        return member if fits(member, layer, budget) else None

    def refit(self, layer: Layer, moments: Array) -> Self:
        u, v = nearest_low_rank(layer.matrix, checked_moments(layer, moments), self.rank)
        return type(self)(self.shape, u.astype(layer.weight.dtype), v.astype(layer.weight.dtype))

    def apply(self, x: Any) -> Any:
        if x.shape[-1] != self.shape[1]:
            raise ModelError(f"low_rank takes {self.shape[1]} features, got an input of shape {tuple(x.shape)}")
        return (x @ self.v.T) @ self.u.T

    def dense(self) -> Any:
        """(out, in); of the kind of the factors, and differentiable where they are torch tensors."""
        return self.u @ self.v

    def flops(self, rows: int) -> int:
        return 2 * rows * self.rank * sum(self.shape)

    def describe(self) -> str:
        return f"rank={self.rank}"


def check_rank(layer: Layer, rank: int) -> None:
    """Raise ModelError unless a matrix of the layer's shape can have that rank."""
    smaller = min(layer.matrix.shape)
    if not 1 <= rank <= smaller:
        raise ModelError(f"{layer.name}: rank {rank} is outside 1..{smaller} of shape {layer.matrix.shape}")


def largest_useful_rank(shape: tuple[int, ...]) -> int:
    """The largest rank with fewer numbers than the dense matrix."""
    out, inner = shape
    return int((out * inner - 1) // (out + inner))


def affordable_rank(layer: Layer, budget: Budget) -> int:
    """The largest useful rank within the budget's parameters and operations (both grow as rank * (out + in))."""
    out, inner = layer.matrix.shape
    dense = out * inner
    rank = largest_useful_rank((out, inner))
    for share in (budget.max_params, budget.max_flops):
        if share is not None:
            # compared as `fits` does, so that a fraction's rounding cannot cost or grant a rank
            nearest = round(share * dense / (out + inner))
            rank = min(rank, nearest if nearest * (out + inner) <= share * dense else nearest - 1)
    return rank


def smallest_within(matrix: Array, limit: int, tol: float) -> tuple[Triplets, int] | None:
    """The smallest rank up to `limit` within relative Frobenius error `tol`, with triplets that reach it, or None.

    Widths are tried from small to large, since most structured weights have small ranks; those that a bound excludes
    are not factorised.
    """
    work = np.float64 if tol < FLOAT32_FLOOR or matrix.dtype == np.float64 else np.float32
    matrix = matrix.astype(work, copy=False)
    is_small = min(matrix.shape) <= DIRECT
    steps = 1 if tol <= 1e-3 else POWER_STEPS  # what an exact member leaves out is too little to disturb the range
    if is_small:
        if exceeds_rank(matrix, limit, tol):  # a tenth of the time of the SVD
            return None
        triplets = svd(matrix)
        rank = rank_of_triplets(matrix, triplets, tol)
        return (triplets, rank) if rank is not None and rank <= limit else None
    width = min(16, limit)
    while width < limit:
        width = min(4 * width, limit)
        if exceeds_rank(matrix, width, tol):
            continue
        triplets = leading_svd(matrix, width, steps)
        rank = rank_of_triplets(matrix, triplets, tol)
        if rank is not None:
            return (triplets, rank) if rank <= limit else None
    return None


def rank_of_triplets(matrix: Array, triplets: Triplets, tol: float) -> int | None:
    """How many of the triplets come within relative Frobenius error `tol` of the matrix; None if all do not."""
    tails = tails_of(matrix, triplets)
    within = np.flatnonzero(tails <= tol**2 * tails[0])
    return max(1, int(within[0])) if within.size else None
