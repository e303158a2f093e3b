"""DeBut: a product of deformable-butterfly factors. Butterfly and Monarch matrices are special cases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from tvm_structured.errors import ModelError
from tvm_structured.structures.arrays import permuted
from tvm_structured.structures.base import Size, Structure, as_budget, factor, fits
from tvm_structured.structures.budget import Budget
from tvm_structured.structures.debut_chain import Chain, as_chain, generate_chains, num_params
from tvm_structured.structures.debut_fit import merge_all, peel, sweep
from tvm_structured.structures.debut_lattice import (
    is_trivial,
    possible_splits,
    residue,
    sampled_residues,
    smallest_path,
    splits_on,
)
from tvm_structured.structures.layer import Array, Conv2d, Dense, Layer, as_layer, to_detect

MOST_VERIFICATIONS = 4  # chains tried on the whole weight before detection gives up
MOST_PROJECTIONS = 4  # chains projected to for a budget, fewer for large weights
SAFETY = 3.0  # samples are the strongest parts of blocks: they hold more energy than others
PASS = 24  # multiplications that one more pass over a vector costs `apply`
STARTS = ("svd", "random")


@dataclass(frozen=True, eq=False)
class DeBut(Structure):
    """y = F_N ... F_1 x with sparse F_k, each block diagonal of grids of diagonals (`debut_chain`).

    chain: (p, q, r, s, t) of every factor, first applied first; grids: their numbers, (blocks, r, s, t) each:
    F[b r t + i t + d, b s t + j t + d] = grid[b, i, j, d]. Parameters: the sum of p s.
    The projection is hierarchical (`debut_fit.peel`): exact for members, nearest for two factors.
    Convolutions are flattened as (out, kh, kw, in), channel fastest.
    """

    name: ClassVar[str] = "debut"
    accepts: ClassVar[tuple[type[Layer], ...]] = (Dense, Conv2d)

    chain: Chain
    grids: tuple[Any, ...] = factor()

    def __post_init__(self) -> None:
        chain = as_chain(self.chain, self.shape)
        object.__setattr__(self, "chain", chain)
        expected = [(f.blocks, f.r, f.s, f.t) for f in chain]
        shapes = [tuple(int(extent) for extent in grid.shape) for grid in self.grids]
        if shapes != expected:
            raise ModelError(f"debut: the factors of this chain have shapes {expected}, got {shapes}")

    # -- factors: one for each of the chain -------------------------------------------------------------

    @property
    def factors(self) -> dict[str, Any]:
        return {f"factor{k}": grid for k, grid in enumerate(self.grids)}

    @property
    def trainable_factors(self) -> tuple[str, ...]:
        return tuple(self.factors)

    @property
    def sizes_of(self) -> dict[str, Any]:
        return {"shape": self.shape, "chain": tuple(tuple(f) for f in self.chain)}

    @classmethod
    def from_factors(cls, sizes: Mapping[str, Any], factors: Sequence[Any]) -> Self:
        out, inner = sizes["shape"]
        return cls((int(out), int(inner)), sizes["chain"], tuple(factors))

    # -- members ----------------------------------------------------------------------------------------

    @classmethod
    def sizes(cls, layer: Layer) -> Iterator[Size]:
        """Balanced chains, monotonic and bulging, from radix 2 to two factors."""
        for chain in generate_chains(matrix_shape(layer)):
            yield {"chain": chain}

    @classmethod
    def from_dense(  # type: ignore[override]
        cls, layer: Layer, *, chain: Any, sweeps: int = 0, start: str = "svd", seed: int = 0
    ) -> Self:
        """A nearby member: peeled off factor by factor, then improved by `sweeps` of alternating least squares.

        With `start="random"` the sweeps start from random factors, as in the paper; a long chain then needs many.
        Raises ModelError for a chain that is not valid for the layer.
        """
        layer = as_layer(layer)
        shape = matrix_shape(layer)
        factors = as_chain(chain, shape, layer.name)
        if start not in STARTS:
            raise ModelError(f"{layer.name}: start={start!r} is unknown; one of {STARTS}")
        if start == "svd":
            grids = peel(layer.matrix, factors)
        else:
            rng = np.random.default_rng(seed)
            grids = [rng.standard_normal((f.blocks, f.r, f.s, f.t)) / math.sqrt(f.s) for f in factors]
        for _ in range(sweeps):
            grids = sweep(layer.matrix, factors, grids)
        return cls(shape, factors, tuple(grid.astype(layer.weight.dtype) for grid in grids))

    @classmethod
    def detect(cls, layer: Any, tol: float | None = None) -> Self | None:
        """The smallest chain of dense support, balanced or not, whose product equals the weight within `tol`.

        Samples exclude most splits of most weights; the chain of those that are left is verified on the whole.
        """
        layer, tol = to_detect(layer, tol)
        if not cls.takes(layer) or layer.num_params == 1:
            return None
        matrix, shape = layer.matrix, matrix_shape(layer)
        possible = possible_splits(matrix, tol)
        for _ in range(MOST_VERIFICATIONS):
            chain = smallest_path(shape, possible)
            if num_params(chain) >= layer.num_params:
                return None
            member = cls.from_dense(layer, chain=chain)
            if member.error(layer) <= tol:
                return member
            asked = [split for split in splits_on(chain) if not is_trivial(split, shape)]
            wrong = {split: residue(matrix, split) for split in asked}
            worst = max(wrong, key=lambda split: wrong[split])
            possible -= {split for split in asked if wrong[split] > tol} | {worst}
        return None

    @classmethod
    def project(cls, layer: Any, budget: Budget | float) -> Self | None:
        """The weight's own chain if it has one, else a balanced one: with `max_error` the first that is near enough,
        without it the nearest of the largest that the budget allows. Chains that samples speak against are not tried.
        """
        layer, budget = as_layer(layer), as_budget(budget)
        if not cls.takes(layer):
            return None
        exact = cls.detect(layer)
        if exact is not None and fits(exact, layer, budget):
            return exact
        chains = [chain for chain in generate_chains(matrix_shape(layer)) if is_affordable(chain, layer, budget)]
        limit = budget.max_error
        if limit is not None:
            chains = [chain for chain in chains if least_error(layer.matrix, chain) <= limit]
        tried = max(1, min(MOST_PROJECTIONS, (1 << 22) // layer.num_params))
        chains = chains[:tried] if limit is not None else chains[-tried:]
        if limit is None and len(chains) == 1:  # with nothing to compare the error need not be known
            return cls.from_dense(layer, chain=chains[0])
        best, nearest = None, math.inf
        for chain in chains:
            member = cls.from_dense(layer, chain=chain)
            error = member.error(layer)
            if limit is not None and error <= limit:
                return member
            if limit is None and error < nearest:
                best, nearest = member, error
        return best

    # -- meaning ----------------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Which neighbouring factors `apply` multiplies first: fewer passes over x for somewhat more products."""
        return cheapest_groups(self.chain, PASS)

    def apply(self, x: Any) -> Any:
        if x.shape[-1] != self.shape[1]:
            raise ModelError(f"debut takes {self.shape[1]} features, got an input of shape {tuple(x.shape)}")
        lead = x.shape[:-1]
        rows = math.prod(lead)
        for first, end in self.groups:
            grid = merge_all(self.grids[first:end])
            blocks, r, s, t = grid.shape
            state = permuted(x.reshape(rows, blocks, s, t), 1, 3, 0, 2)
            x = permuted(state @ permuted(grid, 0, 3, 2, 1), 2, 0, 3, 1).reshape(rows, blocks * r * t)
        return x.reshape(*lead, self.shape[0])

    def dense(self) -> Any:
        """(out, in); of the kind of the factors, and differentiable where they are torch tensors."""
        whole = merge_all(self.grids)[..., 0]  # (blocks, rows, columns)
        if whole.shape[0] == 1:
            return whole.reshape(self.shape)
        blocks, rows, columns = whole.shape
        if hasattr(whole, "detach"):
            import torch

            return torch.block_diag(*whole)  # type: ignore[no-untyped-call]
        full: Array = np.zeros((blocks, rows, blocks, columns), whole.dtype)
        full[np.arange(blocks), :, np.arange(blocks)] = whole
        return full.reshape(self.shape)

    def flops(self, rows: int) -> int:
        return 2 * rows * self.num_params

    def describe(self) -> str:
        """`8x4*8x16`: the r of all factors, then the s, first applied first."""
        sides = (f.r for f in self.chain), (f.s for f in self.chain)
        return "*".join("x".join(map(str, side)) for side in sides)


def matrix_shape(layer: Layer) -> tuple[int, int]:
    out, inner = layer.matrix.shape
    return int(out), int(inner)


def is_affordable(chain: Chain, layer: Layer, budget: Budget) -> bool:
    """Whether parameters and operations (which are in proportion) stay within the budget."""
    limits = [limit for limit in (budget.max_params, budget.max_flops) if limit is not None]
    return all(num_params(chain) <= limit * layer.num_params for limit in limits)


def least_error(matrix: Array, chain: Chain) -> float:
    """About the least relative error of a member of the chain: that of its worst split on small samples."""
    splits = [split for split in splits_on(chain) if not is_trivial(split, matrix.shape)]
    if not splits:
        return 0.0
    residues = sampled_residues(matrix, splits)
    mean = float(np.square(matrix, dtype=np.float64).mean())
    return math.sqrt(float((residues[:, 0] / residues[:, 1]).max()) / (mean or 1.0)) / SAFETY


def cheapest_groups(chain: Chain, overhead: int) -> list[tuple[int, int]]:
    """(first, end) of the groups of factors whose products cost least: multiplications plus `overhead` for each number
    that goes in or out of a group."""
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for end in range(1, len(chain) + 1):
        choices = []
        for first in range(end):
            columns = math.prod(f.s for f in chain[first:end])
            cost = chain[end - 1].p * columns + overhead * (chain[first].q + chain[end - 1].p)
            choices.append((best[first][0] + cost, [*best[first][1], (first, end)]))
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[-1][1]
