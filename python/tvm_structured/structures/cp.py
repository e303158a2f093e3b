"""CP: a convolution as a sum of outer products of four vectors, which may be integers of a few bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.arrays import contract
from tvm_structured.structures.base import Size, as_budget, factor, fits
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.conv_chain import ConvChain, Step, as_kernel
from tvm_structured.structures.cp_fit import fit, integer_columns
from tvm_structured.structures.layer import Layer, as_layer, to_detect
from tvm_structured.structures.spatial_low_rank import unfolded
from tvm_structured.structures.truncated_svd import exceeds_rank

BITS = 8
BYTE_BITS = 8  # up to which an integer factor is kept as bytes
MOST_BITS = 16
MOST_PROJECTIONS = 3
LARGEST_FULL = 64  # channels up to which a rank as high as their number is looked for


@dataclass(frozen=True, eq=False)
class CP(ConvChain):
    """W[o, i, y, x] = sum_r scale[r] outputs[o, r] inputs[i, r] vertical[y, r] horizontal[x, r].

    With bits > 0 the four factors stand for their nearest integers of so many bits; gradients pass the rounding as if
    it were not there. The projection is alternating least squares with the rounding within the sweeps (`cp_fit`), begun
    from generalised eigenvectors: exact for generic members of a rank up to the smaller channel count.
    Sources: Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition", ICLR 2015;
    quantised factors as in FPGA accelerators of tensor-decomposed networks.
    """

    name: ClassVar[str] = "cp"

    bits: int
    scale: Any = factor()
    outputs: Any = factor()
    inputs: Any = factor()
    vertical: Any = factor()
    horizontal: Any = factor()

    def __post_init__(self) -> None:
        (out, inner), (kh, kw), rank = self.shape, self.kernel, self.scale.shape[0]
        expected = [(rank,), *((extent, rank) for extent in (out, inner // (kh * kw), kh, kw))]
        shapes = [tuple(array.shape) for array in self.factors.values()]
        if shapes != expected:
            raise ModelError(
                f"cp: a {self.shape} matrix of a kernel {self.kernel} has factors {expected}, got {shapes}"
            )
        if not 0 <= self.bits <= MOST_BITS or self.bits == 1:
            raise ModelError(f"cp: bits={self.bits} is not 0 (no rounding) or 2..{MOST_BITS}")

    @property
    def rank(self) -> int:
        return int(self.scale.shape[0])

    @property
    def num_bytes(self) -> int:
        """With integer factors those of bytes, or of two bytes each beyond 8 bits, and of the scales. That is how the
        form is kept and how the rebuilding kernel reads it; the chain of thin convolutions widens it to float32."""
        if not self.bits:
            return super().num_bytes
        width = 1 if self.bits <= BYTE_BITS else 2
        return width * (self.num_params - self.rank) + int(self.scale.dtype.itemsize) * self.rank

    @classmethod
    def takes(cls, layer: Layer) -> bool:
        """Kernels of more than one tap: of others this is `low_rank`."""
        return super().takes(layer) and layer.taps > 1

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        """Powers of two up to the smaller channel count: there an exact member can be found."""
        smaller, rank = min(channels_of(layer)), 1
        while rank <= smaller and num_params(layer, rank) < layer.num_params:
            yield {"rank": rank}
            rank *= 2

    @classmethod
    def from_dense(cls, layer: Layer, *, rank: int, bits: int = 0) -> Self:  # type: ignore[override]
        """A near member. Raises ModelError for a rank below 1 or bits that do not exist."""
        layer = as_layer(layer)
        if rank < 1:
            raise ModelError(f"{layer.name}: rank {rank} of cp must be at least 1")
        if not 0 <= bits <= MOST_BITS or bits == 1:
            raise ModelError(f"{layer.name}: bits={bits} is not 0 (no rounding) or 2..{MOST_BITS}")
        tensor = layer.matrix.reshape(layer.matrix.shape[0], *as_kernel(layer), -1).transpose(0, 3, 1, 2)
        return cls.of_columns(layer, fit(tensor, rank, bits), bits)

    @classmethod
    def of_columns(cls, layer: Layer, factors: list[Any], bits: int) -> Self:
        """The member of four factors whose columns have any scale."""
        parts = [integer_columns(f, bits) if bits else normalised(f) for f in factors]
        scale = np.prod([scales for _, scales in parts], axis=0)
        dtype, (out, inner) = layer.weight.dtype, layer.matrix.shape
        if bits:  # float16 has neither the integers of 16 bits nor the scales of products of four
            dtype = np.result_type(dtype, np.float32)
        arrays = (np.ascontiguousarray(array.astype(dtype)) for array in (scale, *(values for values, _ in parts)))
        return cls((int(out), int(inner)), as_kernel(layer), bits, *arrays)

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        """The smallest rank up to the smaller channel count; with integer factors if these are equal, too.

        A weight of CP rank R has unfoldings of rank at most R, (out kw) x (kh in) too, which excludes most at once.
        """
        layer, tol = to_detect(layer, tol)
        if not cls.takes(layer):
            return None
        out, inner = channels_of(layer)
        limit = min(out, inner, (layer.num_params - 1) // num_params(layer, 1))
        if limit < 1 or exceeds_rank(unfolded(layer).matrix, limit, tol):
            return None
        by_taps = layer.matrix.reshape(out, layer.taps, inner)
        rank = max(numerical_rank(part, tol) for part in (by_taps.reshape(out, -1), by_taps.reshape(-1, inner)))
        if not 0 < rank <= limit or (rank == min(out, inner) and rank > LARGEST_FULL):
            return None
        members = (cls.from_dense(layer, rank=r) for r in range(rank, min(rank + 2, limit) + 1))
        member = next((m for m in members if m.error(layer) <= tol), None)
        if member is None:
            return None
        whole = cls.of_columns(layer, [member.outputs * member.scale, *list(member.factors.values())[2:]], BITS)
        return whole if whole.error(layer) <= tol else member

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        """The weight's own form if it has one, else one with integer factors of 8 bits: the smallest within
        `max_error`, else the largest that the other limits allow."""
        layer, budget = as_layer(layer), as_budget(budget)
        if not cls.takes(layer):
            return None
        exact = cls.detect(layer)
        if exact is not None and fits(exact, layer, budget):
            return exact
        ranks = [int(size["rank"]) for size in cls.sizes(layer)]
        ranks = [rank for rank in ranks if is_affordable(layer, rank, budget)]
        if budget.max_error is None:
            return cls.from_dense(layer, rank=ranks[-1], bits=BITS) if ranks else None
        for rank in ranks[-MOST_PROJECTIONS:]:
            member = cls.from_dense(layer, rank=rank, bits=BITS)
            if member.error(layer) <= budget.max_error:
                return member
        return None

    # -- meaning ----------------------------------------------------------------------------------------

    def values(self) -> tuple[Any, Any, Any, Any]:
        """The factors, rounded to `bits`."""
        factors = self.outputs, self.inputs, self.vertical, self.horizontal
        if not self.bits:
            return factors
        return tuple(rounded(array, 2 ** (self.bits - 1) - 1) for array in factors)

    def steps(self) -> tuple[Step, ...]:
        """1 x 1 into `rank` channels, kh x kw on each of them, 1 x 1 out. The thin vertical and horizontal convolutions
        between are joined: kh kw instead of kh + kw multiplications of few, for one pass less over the image."""
        outputs, inputs, vertical, horizontal = self.values()
        taps = contract("yr,xr->ryx", vertical, horizontal).reshape(self.rank, -1)
        return (
            Step(inputs.T),
            Step(taps, self.kernel, (True, True), self.rank),
            Step(outputs * self.scale),
        )

    def dense(self) -> Any:
        outputs, inputs, vertical, horizontal = self.values()
        return contract("or,yr,xr,ir->oyxi", outputs * self.scale, vertical, horizontal, inputs).reshape(self.shape)

    def describe(self) -> str:
        return f"rank={self.rank}" + (f" bits={self.bits}" if self.bits else "")


def channels_of(layer: Layer) -> tuple[int, int]:
    return int(layer.matrix.shape[0]), int(layer.matrix.shape[1]) // layer.taps


def num_params(layer: Layer, rank: int) -> int:
    return rank * (1 + sum(channels_of(layer)) + sum(as_kernel(layer)))


def is_affordable(layer: Layer, rank: int, budget: Budget) -> bool:
    flops = rank * (sum(channels_of(layer)) + math.prod(as_kernel(layer)))  # of the chain, for each position
    return (budget.max_params is None or num_params(layer, rank) <= budget.max_params * layer.num_params) and (
        budget.max_flops is None or flops <= budget.max_flops * layer.num_params
    )


def normalised(factor: Any) -> tuple[Any, Any]:
    """Columns of norm 1, and their norms."""
    norms = np.linalg.norm(factor, axis=0)
    return factor / np.where(norms > 0, norms, 1.0), np.where(norms > 0, norms, 1.0)


def numerical_rank(matrix: Any, tol: float) -> int:
    """The smallest rank within relative error `tol`."""
    squares = np.square(np.linalg.svd(matrix.astype(np.float64), compute_uv=False))
    tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
    return int((tails > tol**2 * tails[0]).sum())


def rounded(array: Any, limit: int) -> Any:
    """The nearest integers within +-limit; gradients pass as they are."""
    if isinstance(array, np.ndarray):
        return np.clip(np.rint(array), -limit, limit)
    return array + (array.round().clamp(-limit, limit) - array).detach()
