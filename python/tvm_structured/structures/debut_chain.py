"""Chains of deformable-butterfly factors: what makes one valid, and which ones to try.

A factor (p, q, r, s, t) is p x q and block diagonal, with p / (r t) = q / (s t) blocks, each an r x s grid of t x t
diagonals: p s numbers. A chain lists its factors in the order in which they are applied, the rightmost one first.
With the digits (j_N ... j_1) of a column and (i_N ... i_1) of a row, j_k < s_k and i_k < r_k, the first digit slowest,

    W[i, j] = prod_k F_k[(j_N ... j_{k+1}), i_k, j_k, (i_{k-1} ... i_1)]

where the blocks of the last factor, if there are several, are one more leading digit that both share.
Source: Lin et al., "Deformable Butterfly: A Highly Structured and Sparse Linear Transform", NeurIPS 2021.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tvm_structured.errors import ModelError
from tvm_structured.structures.factorisation import balanced_modes


class Factor(NamedTuple):
    """One factor's shape: rows p, columns q, a grid of r x s diagonals of t x t."""

    p: int
    q: int
    r: int
    s: int
    t: int

    @property
    def blocks(self) -> int:
        return self.p // (self.r * self.t)

    @property
    def num_params(self) -> int:
        return self.p * self.s


Chain = tuple[Factor, ...]


def as_chain(factors: Any, shape: tuple[int, int], name: str = "debut") -> Chain:
    """A checked chain of lists or tuples (p, q, r, s, t), rightmost factor first.

    Valid: p = blocks r t and q = blocks s t; q_1 = in, q_{k+1} = p_k, p_N = out; t_1 = 1, t_{k+1} = r_k t_k.
    Raises ModelError that names the first factor to break a rule.
    """
    try:
        chain = tuple(Factor(*(int(extent) for extent in factor)) for factor in factors)
    except (TypeError, ValueError):
        raise ModelError(f"{name}: a chain is a list of factors (p, q, r, s, t), got {factors!r}") from None
    if not chain:
        raise ModelError(f"{name}: a chain has at least one factor")
    width, diagonal = shape[1], 1
    for number, factor in enumerate(chain, 1):
        where = f"{name}: factor {number} {tuple(factor)} of the chain"
        if min(factor) < 1:
            raise ModelError(f"{where} has an extent below 1")
        if factor.q != width:
            raise ModelError(f"{where} takes {factor.q} values, but {width} come to it")
        if factor.t != diagonal:
            raise ModelError(f"{where} needs t = {diagonal}, the product of all r before it")
        if factor.p % (factor.r * factor.t) or factor.q != factor.blocks * factor.s * factor.t:
            raise ModelError(f"{where} has no whole number of blocks: p / (r t) must equal q / (s t)")
        width, diagonal = factor.p, factor.r * factor.t
    if width != shape[0]:
        raise ModelError(f"{name}: the chain ends with {width} values, the layer has {shape[0]}")
    return chain


def chain_of(rows: Sequence[int], columns: Sequence[int], blocks: int = 1) -> Chain:
    """The chain with these r_k and s_k, first applied first. `blocks` is that of the last factor."""
    chain, before = [], blocks * math.prod(columns)
    diagonal = 1
    for r, s in zip(rows, columns, strict=True):
        chain.append(Factor(before // s * r, before, r, s, diagonal))
        before, diagonal = before // s * r, diagonal * r
    return tuple(chain)


def butterfly(size: int, radix: int = 2) -> Chain:
    """The chain of equal factors for a size x size matrix: radix 2 is the FFT's butterfly, sqrt(size) a Monarch matrix.

    Raises ModelError unless `size` is a power of `radix`.
    """
    count = round(math.log(size, radix)) if radix > 1 and size > 1 else 0
    if count < 1 or radix**count != size:
        raise ModelError(f"a butterfly of radix {radix} needs a size that is a power of it, got {size}")
    return chain_of((radix,) * count, (radix,) * count)


def has_dense_support(chain: Chain) -> bool:
    """Whether every entry of the product may differ from zero: the last factor is one block."""
    return chain[-1].blocks == 1


def is_bulging(chain: Chain) -> bool:
    """Whether an intermediate vector is longer than input and output; otherwise the chain is monotonic."""
    return any(factor.p > max(chain[0].q, chain[-1].p) for factor in chain[:-1])


def num_params(chain: Chain) -> int:
    return sum(factor.num_params for factor in chain)


def generate_chains(
    shape: tuple[int, int], max_params: int | None = None, bulging: bool | None = None
) -> Iterator[Chain]:
    """Valid chains with dense support for an (out, in) matrix, smallest first.

    `max_params` leaves out the larger ones (by default those not smaller than the dense matrix), `bulging` the other
    kind. The r_k and s_k are balanced; sorted alike they give monotonic chains, sorted against each other bulging ones.
    Nothing where a side is prime.
    """
    limit = shape[0] * shape[1] - 1 if max_params is None else max_params
    found = [chain for chain in balanced_chains(shape) if num_params(chain) <= limit]
    yield from (chain for chain in found if bulging is None or is_bulging(chain) == bulging)


@functools.lru_cache(maxsize=256)
def balanced_chains(shape: tuple[int, int]) -> tuple[Chain, ...]:
    found: dict[Chain, int] = {}
    for count in itertools.count(2):
        rows, columns = (balanced_modes(extent, count) for extent in shape)
        if rows is None or columns is None:
            break
        for r, s in ((rows, columns), (rows[::-1], columns[::-1]), (rows[::-1], columns)):
            chain = chain_of(r, s)
            found[chain] = num_params(chain)
    return tuple(sorted(found, key=lambda chain: (found[chain], len(chain))))
