"""Tucker-2: a convolution as 1 x 1 into fewer channels, kh x kw between them, and 1 x 1 out of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.arrays import contract
from tvm_structured.structures.base import Size, as_budget, factor, fits
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.conv_chain import ConvChain, Step, as_kernel
from tvm_structured.structures.layer import Array, Layer, as_layer, to_detect
from tvm_structured.structures.low_rank import smallest_within
from tvm_structured.structures.truncated_svd import exceeds_rank, left_factor, tail_energies
from tvm_structured.structures.variational_rank import variational_rank

SWEEPS = 3  # of orthogonal iteration; more gain nothing that fine-tuning would not


@dataclass(frozen=True, eq=False)
class Tucker(ConvChain):
    """W[o, i, y, x] = sum_pq outputs[o, p] core[p, y, x, q] inputs[q, i].

    The projection is the truncated higher-order SVD (at most sqrt(2) times as far as the nearest member), improved by
    orthogonal iteration. Without ranks they are estimated from the weight (`variational_rank`), as in Kim et al.,
    "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications", ICLR 2016.
    """

    name: ClassVar[str] = "tucker"

    outputs: Any = factor()
    core: Any = factor()
    inputs: Any = factor()

    def __post_init__(self) -> None:
        (out, inner), (kh, kw) = self.shape, self.kernel
        p, q = self.outputs.shape[-1], self.inputs.shape[0]
        expected = (out, p), (p, kh, kw, q), (q, inner // (kh * kw))
        shapes = tuple(tuple(array.shape) for array in (self.outputs, self.core, self.inputs))
        if shapes != expected:
            raise ModelError(
                f"tucker: a {self.shape} matrix of a kernel {self.kernel} has factors {expected}, got {shapes}"
            )

    @property
    def ranks(self) -> tuple[int, int]:
        """(p, q), of the outputs and of the inputs."""
        return int(self.outputs.shape[1]), int(self.inputs.shape[0])

    @classmethod
    def takes(cls, layer: Layer) -> bool:
        """Kernels of more than one tap: of others this is `low_rank`."""
        return super().takes(layer) and layer.taps > 1

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        """The same share of both channel counts, an eighth more each time."""
        (out, inner), taps = layer.matrix.shape, layer.taps
        seen = set()
        for eighth in range(1, 9):
            ranks = tuple(max(1, extent * eighth // 8) for extent in (out, inner // taps))
            if ranks not in seen and num_params(layer, *ranks) < layer.num_params:
                seen.add(ranks)
                yield {"ranks": ranks}

    @classmethod
    def from_dense(cls, layer: Layer, *, ranks: Sequence[int] | None = None) -> Self:  # type: ignore[override]
        """The member with at most these (output, input) ranks; None estimates them.

        Raises ModelError for ranks outside the channel counts.
        """
        layer = as_layer(layer)
        by_taps = tensor_of(layer)
        unfoldings = by_taps.reshape(by_taps.shape[0], -1), by_taps.transpose(3, 0, 1, 2).reshape(by_taps.shape[3], -1)
        if ranks is None:
            ranks = tuple(max(1, variational_rank(unfolding)) for unfolding in unfoldings)
        p, q = (int(rank) for rank in ranks)
        if not (1 <= p <= by_taps.shape[0] and 1 <= q <= by_taps.shape[3]):
            raise ModelError(
                f"{layer.name}: ranks {(p, q)} are outside 1..{by_taps.shape[0]} and 1..{by_taps.shape[3]} channels"
            )
        u, v = (left_factor(unfolding)[0] for unfolding in unfoldings)
        return cls.between(layer, u[:, :p], v[:, :q])

    @classmethod
    def between(cls, layer: Layer, u: Array, v: Array) -> Self:
        """The member whose bases start as u (out, p) and v (in, q): each in turn the best beside the other."""
        tensor = tensor_of(layer).astype(np.float64)
        p, q = u.shape[1], v.shape[1]
        for _ in range(SWEEPS):
            narrow = contract("oyxi,iq->oyxq", tensor, v)
            u = left_factor(narrow.reshape(narrow.shape[0], -1))[0][:, :p]
            narrow = contract("oyxi,op->ipyx", tensor, u)
            v = left_factor(narrow.reshape(narrow.shape[0], -1))[0][:, :q]
        core = contract("op,oyxi,iq->pyxq", u, tensor, v)
        dtype, (out, inner) = layer.weight.dtype, layer.matrix.shape
        arrays = (np.ascontiguousarray(array.astype(dtype)) for array in (u, core, v.T))
        return cls((int(out), int(inner)), as_kernel(layer), *arrays)

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        """The ranks of both unfoldings, each looked for up to where the member would not be smaller than the weight."""
        layer, tol = to_detect(layer, tol)
        if not cls.takes(layer):
            return None
        by_taps = tensor_of(layer)
        unfoldings = [np.moveaxis(by_taps, axis, 0).reshape(by_taps.shape[axis], -1) for axis in (0, 3)]
        limits = largest_ranks(layer, unfoldings, tol)
        if limits is None:
            return None
        bases = []
        for unfolding, limit in zip(unfoldings, limits, strict=True):
            found = smallest_within(unfolding, limit, tol / math.sqrt(2))
            if found is None:
                return None
            (u, *_), rank = found
            bases.append(u[:, :rank].astype(np.float64))
        if num_params(layer, bases[0].shape[1], bases[1].shape[1]) >= layer.num_params:
            return None
        member = cls.between(layer, *bases)
        return member if member.error(layer) <= tol else None

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        """The ranks for which the truncated higher-order SVD guarantees most: the smallest member within `max_error`,
        else the least bound on the error within the other limits."""
        layer, budget = as_layer(layer), as_budget(budget)
        if not cls.takes(layer):
            return None
        by_taps = tensor_of(layer)
        factors = [left_factor(np.moveaxis(by_taps, axis, 0).reshape(by_taps.shape[axis], -1)) for axis in (0, 3)]
        tails = [tail_energies(np.square(s))[1:] for _, s in factors]  # of rank 1, 2, ...
        bound = tails[0][:, None] + tails[1]
        p, q = np.arange(1, len(tails[0]) + 1)[:, None], np.arange(1, len(tails[1]) + 1)
        params = num_params(layer, p, q)
        allowed = params < layer.num_params
        for share in (budget.max_params, budget.max_flops):  # operations are in proportion to parameters
            if share is not None:
                allowed &= params <= share * layer.num_params
        total = float(np.square(by_taps, dtype=np.float64).sum())
        if budget.max_error is not None:
            allowed &= bound <= budget.max_error**2 * total
        if not allowed.any():
            return None
        # rounding leaves a little energy behind the rank of an exact member
        cost = params if budget.max_error is not None else np.maximum(bound, 1e-13 * total) * (1 + 1e-9 * params)
        best = np.unravel_index(np.where(allowed, cost, np.inf).argmin(), cost.shape)
        member = cls.between(layer, *(u[:, : int(index) + 1] for (u, _), index in zip(factors, best, strict=True)))
        near = budget.max_error is None or member.error(layer) <= budget.max_error
        return member if near and fits(member, layer, budget) else None

    def steps(self) -> tuple[Step, ...]:
        p = self.ranks[0]
        return (
            Step(self.inputs),
            Step(self.core.reshape(p, -1), self.kernel, (True, True)),
            Step(self.outputs),
        )

    def dense(self) -> Any:
        return contract("op,pyxq,qi->oyxi", self.outputs, self.core, self.inputs).reshape(self.shape)

    def describe(self) -> str:
        return f"ranks={self.ranks[0]},{self.ranks[1]}"


def tensor_of(layer: Layer) -> Array:
    """(out, kh, kw, in)."""
    return layer.matrix.reshape(layer.matrix.shape[0], *as_kernel(layer), -1)


def num_params(layer: Layer, p: Any, q: Any) -> Any:
    """Parameters for output rank p and input rank q; arrays broadcast."""
    out, inner = layer.matrix.shape
    return out * p + p * layer.taps * q + q * (inner // layer.taps)


def largest_ranks(layer: Layer, unfoldings: Sequence[Array], tol: float) -> tuple[int, int] | None:
    """The highest ranks at which a member is smaller than the weight, None where there are none.

    Beside rank 1 of the other, or the full rank where a bound tells that nothing less will do: of a weight without
    structure one side is full, the other side's limit then lies well below its own, and no SVD is needed.
    """
    least = [len(u) if len(u) > 1 and exceeds_rank(u, len(u) - 1, tol) else 1 for u in unfoldings]
    ranks = [np.arange(1, len(u) + 1) for u in unfoldings]
    p = int((num_params(layer, ranks[0], least[1]) < layer.num_params).sum())
    q = int((num_params(layer, least[0], ranks[1]) < layer.num_params).sum())
    if p < least[0] or q < least[1]:
        return None
    return p, q
