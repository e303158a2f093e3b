"""Tensor train: the matrix index is cut into digits, one small core for each pair of digits (Novikov et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.base import Size, Structure, as_budget, factor, fits
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.factorisation import Factorisation, factorisations
from tvm_structured.structures.layer import Conv2d, Dense, Layer, as_layer, to_detect
from tvm_structured.structures.rank_allocation import RankAllocation
from tvm_structured.structures.rank_lattice import RankLattice, modes_of
from tvm_structured.structures.tt_order import Order, cheapest_order, core_matrix
from tvm_structured.structures.tt_svd import Modes, tt_svd

NEARLY_SMALLEST = 1.1  # a verified train is good enough if no other can have fewer parameters by more than this
CHAIN_COST = 8  # torch takes that much longer for a multiplication in thin stages than in one large product
MOST_VERIFICATIONS = 6  # chains tried on the whole weight before detection is content with what it has


@dataclass(frozen=True, eq=False)
class TensorTrain(Structure):
    """W[(i_1 ... i_d), (j_1 ... j_d)] = G_1[i_1, j_1] ... G_d[i_d, j_d], a product of small matrices.

    cores: G_k of shape (r_{k-1}, m_k, n_k, r_k), r_0 = r_d = 1; out = prod m_k and in = prod n_k exactly, the first
    digit slowest. Parameters: sum of r_{k-1} m_k n_k r_k. The projection is TT-SVD, at most sqrt(d - 1) times
    as far as the nearest member of those modes and ranks (Oseledets 2011); nearest where d = 2.
    """

    name: ClassVar[str] = "tensor_train"
    accepts: ClassVar[tuple[type[Layer], ...]] = (Dense, Conv2d)

    out_modes: Modes
    in_modes: Modes
    cores: tuple[Any, ...] = factor()

    def __post_init__(self) -> None:
        check_modes("tensor_train", self.shape, self.out_modes, self.in_modes)
        shapes = [tuple(int(extent) for extent in core.shape) for core in self.cores]
        ranks = (1, *(shape[-1] for shape in shapes[:-1]), 1)
        expected = list(zip(ranks[:-1], self.out_modes, self.in_modes, ranks[1:], strict=False))
        if shapes != expected:
            raise ModelError(f"tensor_train: cores of modes {self.describe()} have shapes {expected}, got {shapes}")

    # -- factors: one for each core ---------------------------------------------------------------------

    @property
    def factors(self) -> dict[str, Any]:
        return {f"core{k}": core for k, core in enumerate(self.cores)}

    @property
    def trainable_factors(self) -> tuple[str, ...]:
        return tuple(self.factors)

    @classmethod
    def from_factors(cls, sizes: Mapping[str, Any], factors: Sequence[Any]) -> Self:
        static = {name: tuple(int(extent) for extent in value) for name, value in sizes.items()}
        return cls(cores=tuple(factors), **static)  # type: ignore[arg-type]

    @property
    def ranks(self) -> tuple[int, ...]:
        """(1, r_1, ..., r_{d-1}, 1)."""
        return (1, *(int(core.shape[-1]) for core in self.cores))

    # -- members ----------------------------------------------------------------------------------------

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        shape = matrix_shape(layer)
        found = []
        for out_modes, in_modes in factorisations(shape, layer.taps):
            full = max(full_ranks(out_modes, in_modes))
            rank = 1
            while rank < 2 * full:
                params = num_params(out_modes, in_modes, clipped(out_modes, in_modes, rank))
                if params >= layer.num_params:
                    break
                found.append((params, len(out_modes), {"out_modes": out_modes, "in_modes": in_modes, "rank": rank}))
                rank *= 2
        for _, _, size in sorted(found, key=lambda entry: entry[:2]):
            yield size

    @classmethod
    def from_dense(  # type: ignore[override]
        cls,
        layer: Layer,
        *,
        out_modes: Sequence[int],
        in_modes: Sequence[int],
        rank: int | Sequence[int] | None = None,
        eps: float = 0.0,
    ) -> Self:
        """TT-SVD: ranks at most `rank` (one number, or one for each of the d - 1 bonds), and as small as a total
        relative error of `eps` allows where they suffice."""
        layer = as_layer(layer)
        out, inner = tuple(int(m) for m in out_modes), tuple(int(n) for n in in_modes)
        shape = matrix_shape(layer)
        check_modes(layer.name, shape, out, inner)
        limits = clipped(out, inner, max(full_ranks(out, inner), default=1) if rank is None else rank, layer.name)
        return cls(shape, out, inner, tt_svd(layer.matrix, out, inner, limits, eps))

    @classmethod
    def drawn(  # type: ignore[override]
        cls,
        layer: Layer,
        rng: np.random.Generator,
        *,
        out_modes: Sequence[int],
        in_modes: Sequence[int],
        rank: int | Sequence[int] | None = None,
        eps: float = 0.0,
    ) -> Self:
        out, inner = tuple(int(m) for m in out_modes), tuple(int(n) for n in in_modes)
        shape = matrix_shape(layer)
        check_modes(layer.name, shape, out, inner)
        limits = clipped(out, inner, max(full_ranks(out, inner), default=1) if rank is None else rank, layer.name)
        bonds = (1, *limits, 1)
        extents = zip(bonds[:-1], out, inner, bonds[1:], strict=True)
        return cls(shape, out, inner, tuple(rng.standard_normal(extent, dtype=np.float32) for extent in extents))

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        """A train equal to the weight within `tol`, whatever its modes and their order: the smallest, or nearly so.

        The ranks of all possible unfoldings are sampled, and the smallest chain of them is verified on the whole
        weight (`rank_lattice`). Ranks above 240 (120 for sizes with very many divisors) are seen only where they
        are full.
        """
        layer, tol = to_detect(layer, tol)
        if not cls.takes(layer) or any(extent < 2 for extent in layer.matrix.shape):
            return None
        lattice = RankLattice(layer.matrix, tol)
        best: Self | None = None
        for _ in range(MOST_VERIFICATIONS):
            smallest = lattice.smallest_chain()
            if smallest is not None and not lattice.known[smallest[1]].all():
                lattice.sample_unknown()
                smallest = lattice.smallest_chain()
            if smallest is None or (best is not None and best.num_params <= NEARLY_SMALLEST * smallest[0]):
                break
            chain = smallest[1]
            modes = modes_of([lattice.points[index] for index in chain], matrix_shape(layer))
            # room for ranks that the samples did not show
            limits = [2 * int(lattice.ranks[index]) + 8 for index in chain]
            member = cls.from_dense(layer, out_modes=modes[0], in_modes=modes[1], rank=limits, eps=0.9 * tol)
            if member.num_params < (best or layer).num_params and member.error(layer) <= tol:
                best = member
            lattice.learn(chain, member.ranks[1:-1])
        return best

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        """As for every structure, over the balanced and the published factorisations and, should the weight be a
        train already, its own. The ranks are those that leave out equal energies at all bonds."""
        layer, budget = as_layer(layer), as_budget(budget)
        if not cls.takes(layer):
            return None
        candidates = list(factorisations(matrix_shape(layer), layer.taps))
        exact = cls.detect(layer)
        if exact is not None:
            candidates.insert(0, (exact.out_modes, exact.in_modes))
        allocation = RankAllocation(layer.matrix)

        def affordable(modes: Factorisation, ranks: Sequence[int]) -> bool:
            params = num_params(*modes, ranks)
            flops = 2 * cheapest_order(*modes, (1, *ranks, 1)).multiplies * layer.rows(1)
            return (
                params < layer.num_params
                and (budget.max_params is None or params <= budget.max_params * layer.num_params)
                and (budget.max_flops is None or flops <= budget.max_flops * layer.flops(1))
            )

        for out_modes, in_modes, ranks in allocation.ranked(candidates, affordable, budget.max_error):
            member = cls.from_dense(layer, out_modes=out_modes, in_modes=in_modes, rank=ranks)
            near = budget.max_error is None or member.error(layer) <= budget.max_error
            if near and fits(member, layer, budget):
                return member
        return None

    # -- meaning ----------------------------------------------------------------------------------------

    @cached_property
    def order(self) -> Order:
        """In which order `apply` contracts: the one with fewer multiplications."""
        return cheapest_order(self.out_modes, self.in_modes, self.ranks)

    def apply(self, x: Any) -> Any:
        if x.shape[-1] != self.shape[1]:
            raise ModelError(f"tensor_train takes {self.shape[1]} features, got an input of shape {tuple(x.shape)}")
        rows = math.prod(x.shape[:-1])
        if hasattr(self.cores[0], "detach") and self._halves_cost(rows) < CHAIN_COST * rows * self.order.multiplies:
            return self._apply_halves(x)
        state = x
        for stage in self.order.stages:
            matrix = core_matrix(self.cores[stage.core], self.order.is_last_core_first)
            if stage.trail == 1:
                state = state.reshape(-1, stage.depth) @ matrix.T
            else:
                state = matrix @ state.reshape(-1, stage.depth, stage.trail)
        return state.reshape(*x.shape[:-1], self.shape[0])

    def _halves_cost(self, rows: int) -> int:
        """Multiplications of `_apply_halves`."""
        (out, inner), half = self.shape, len(self.cores) // 2
        rank = self.ranks[half]
        expanded = (rows + rank) * out * inner
        if not half:
            return expanded
        first_out, first_in = (math.prod(modes[:half]) for modes in (self.out_modes, self.in_modes))
        return min(expanded, rows * rank * (inner * out // first_out + first_in * out))

    def _apply_halves(self, x: Any) -> Any:
        """Two large products, with the merged halves of the cores, or one with the dense matrix where that is less."""
        out, inner = self.shape
        rows, half = math.prod(x.shape[:-1]), len(self.cores) // 2
        if self._halves_cost(rows) == (rows + self.ranks[half]) * out * inner:
            return x @ self.dense().T
        left, right = self._halves()
        rank, first_out, first_in = right.shape[0], left.shape[1], left.shape[2]
        # (rows n_left, n_right) times (n_right, r m_right), then (m_left, n_left r) times (rows, n_left r, m_right)
        state = x.reshape(rows * first_in, -1) @ right[..., 0].reshape(-1, right.shape[2]).T
        y = left[0].reshape(first_out, -1) @ state.reshape(rows, first_in * rank, right.shape[1])
        return y.reshape(*x.shape[:-1], out)

    def _halves(self) -> tuple[Any, Any]:
        """The merged first and second half of the cores."""
        half = len(self.cores) // 2
        return merge_cores(self.cores[:half]), merge_cores(self.cores[half:])

    def dense(self) -> Any:
        """(out, in); of the kind of the cores, and differentiable where they are torch tensors."""
        if len(self.cores) == 1:
            return self.cores[0].reshape(self.shape)
        left, right = self._halves()
        # (m_left, 1, n_left, r) times (m_right, r, n_right): the digits end up in order without a transposition
        product = left[0][:, None] @ right[..., 0].swapaxes(0, 1)
        return product.reshape(self.shape)

    def flops(self, rows: int) -> int:
        return 2 * rows * self.order.multiplies

    def describe(self) -> str:
        """`4x8x8*4x4x7 rank=3,3`."""
        out, inner = ("x".join(map(str, modes)) for modes in (self.out_modes, self.in_modes))
        ranks = self.ranks[1:-1]
        return f"{out}*{inner} rank={','.join(map(str, ranks if len(set(ranks)) > 1 else ranks[:1]))}"


def merge_cores(cores: Sequence[Any]) -> Any:
    """Neighbouring cores as one: (r_first, prod m, prod n, r_last); numpy or torch."""
    merged = cores[0]
    for core in cores[1:]:
        before, out, inner, bond = merged.shape
        _, next_out, next_inner, after = core.shape
        product = merged.reshape(before * out, 1, inner, bond) @ core.swapaxes(0, 1).reshape(
            1, next_out, bond, next_inner * after
        )
        merged = product.reshape(before, out * next_out, inner * next_inner, after)
    return merged


def matrix_shape(layer: Layer) -> tuple[int, int]:
    out, inner = layer.matrix.shape
    return int(out), int(inner)


def check_modes(name: str, shape: tuple[int, int], out_modes: Modes, in_modes: Modes) -> None:
    """Raise ModelError unless the modes multiply to the shape."""
    if len(out_modes) != len(in_modes) or not out_modes or min(*out_modes, *in_modes) < 1:
        raise ModelError(f"{name}: out modes {out_modes} and in modes {in_modes} must be positive and equally many")
    if (math.prod(out_modes), math.prod(in_modes)) != tuple(shape):
        raise ModelError(
            f"{name}: modes {out_modes} x {in_modes} make a {math.prod(out_modes)} x {math.prod(in_modes)} matrix, "
            f"not {shape[0]} x {shape[1]}; choose factors of the shape"
        )


def full_ranks(out_modes: Modes, in_modes: Modes) -> list[int]:
    """The highest rank each bond can have."""
    sizes = [m * n for m, n in zip(out_modes, in_modes, strict=True)]
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]


def clipped(out_modes: Modes, in_modes: Modes, rank: int | Sequence[int], name: str = "tensor_train") -> list[int]:
    """One rank for each bond, none higher than its neighbours allow. Raises ModelError for a wrong number of ranks."""
    bonds = len(out_modes) - 1
    wanted = [rank] * bonds if isinstance(rank, int) else [int(r) for r in rank]
    if len(wanted) != bonds or any(r < 1 for r in wanted):
        raise ModelError(
            f"{name}: {bonds} bonds between {len(out_modes)} cores need as many positive ranks, got {rank}"
        )
    sizes = [m * n for m, n in zip(out_modes, in_modes, strict=True)]
    for k in range(bonds):
        wanted[k] = min(wanted[k], (wanted[k - 1] if k else 1) * sizes[k])
    for k in reversed(range(bonds)):
        wanted[k] = min(wanted[k], (wanted[k + 1] if k + 1 < bonds else 1) * sizes[k + 1])
    return wanted


def num_params(out_modes: Modes, in_modes: Modes, ranks: Sequence[int]) -> int:
    """Parameters of a train with these d - 1 inner ranks."""
    bonds = (1, *ranks, 1)
    return sum(r * m * n * s for r, m, n, s in zip(bonds[:-1], out_modes, in_modes, bonds[1:], strict=True))
