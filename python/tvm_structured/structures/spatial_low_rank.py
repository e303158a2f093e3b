"""Spatial low rank: a kh x kw convolution as a kh x 1 one into a few channels and a 1 x kw one out of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.arrays import contract
from tvm_structured.structures.base import Size, as_budget, factor
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.conv_chain import ConvChain, Step, as_kernel
from tvm_structured.structures.layer import Array, Dense, Layer, as_layer, to_detect
from tvm_structured.structures.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class SpatialLowRank(ConvChain):
    """W[o, i, y, x] = sum_r horizontal[o, x, r] vertical[r, y, i].

    vertical: (rank, kh, in), horizontal: (out, kw, rank). This is the low rank of the weight unfolded to
    (out kw) x (kh in), so the projection is its truncated SVD, Frobenius-optimal as in `LowRank`.
    Source: Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC 2014, scheme 2.
    """

    name: ClassVar[str] = "spatial_low_rank"
    is_frobenius_optimal: ClassVar[bool] = True

    vertical: Any = factor()
    horizontal: Any = factor()

    def __post_init__(self) -> None:
        (out, inner), (kh, kw), rank = self.shape, self.kernel, self.vertical.shape[0]
        expected = (rank, kh, inner // (kh * kw)), (out, kw, rank)
        if (tuple(self.vertical.shape), tuple(self.horizontal.shape)) != expected:
            raise ModelError(
                f"{self.name}: a {self.shape} matrix of a kernel {self.kernel} has factors {expected}, got "
                f"{tuple(self.vertical.shape)} and {tuple(self.horizontal.shape)}"
            )

    @property
    def rank(self) -> int:
        return int(self.vertical.shape[0])

    @classmethod
    def takes(cls, layer: Layer) -> bool:
        """Kernels of more than one tap: of others this is `low_rank`."""
        return super().takes(layer) and layer.taps > 1

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        yield from LowRank.sizes(unfolded(layer))

    @classmethod
    def from_dense(cls, layer: Layer, *, rank: int) -> Self:  # type: ignore[override]
        layer = as_layer(layer)
        return cls.folded(layer, LowRank.from_dense(unfolded(layer), rank=rank))

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        layer, tol = to_detect(layer, tol)
        found = LowRank.detect(unfolded(layer), tol) if cls.takes(layer) else None
        return None if found is None else cls.folded(layer, found)

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        """As for the low rank of the unfolded weight, which has as many parameters and operations."""
        layer, budget = as_layer(layer), as_budget(budget)
        found = LowRank.project(unfolded(layer), budget) if cls.takes(layer) else None
        return None if found is None else cls.folded(layer, found)

    @classmethod
    def folded(cls, layer: Layer, member: LowRank) -> Self:
        """The layer's form of a low-rank member of its unfolded weight."""
        (kh, kw), (out, inner) = as_kernel(layer), layer.matrix.shape
        vertical = np.ascontiguousarray(member.v).reshape(member.rank, kh, -1)
        return cls((int(out), int(inner)), (kh, kw), vertical, np.ascontiguousarray(member.u).reshape(out, kw, -1))

    def steps(self) -> tuple[Step, ...]:
        (kh, kw), rank = self.kernel, self.rank
        return (
            Step(self.vertical.reshape(rank, -1), (kh, 1), (True, False)),
            Step(self.horizontal.reshape(self.shape[0], -1), (1, kw), (False, True)),
        )

    def dense(self) -> Any:
        return contract("oxr,ryi->oyxi", self.horizontal, self.vertical).reshape(self.shape)

    def describe(self) -> str:
        return f"rank={self.rank}"


def unfolded(layer: Layer) -> Dense:
    """The weight as a matrix (out kw) x (kh in)."""
    kh, kw = as_kernel(layer)
    out, inner = layer.matrix.shape
    by_taps: Array = layer.matrix.reshape(out, kh, kw, inner // math.prod((kh, kw)))
    return Dense(layer.name, np.ascontiguousarray(by_taps.transpose(0, 2, 1, 3)).reshape(out * kw, -1))
