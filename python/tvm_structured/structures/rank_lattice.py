"""The modes a weight has: a search over all lists of modes at once.

The ranks of a tensor train are those of its unfoldings, and an unfolding depends only on a point (a, b), the
products of the first out and in modes (`tt_svd.unfolding`). A list of modes is therefore a chain of points
(1, 1) = p_0 | p_1 | ... | p_d = (out, in), each dividing the next, and its parameters are a sum over the
steps of the chain: once every point's rank is known, the smallest train is a shortest path. Ranks are read from
samples, which never overestimate them, so a chain that is verified and as small as the path is the smallest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from threadpoolctl import threadpool_limits

from tvm_structured.structures.factorisation import Factorisation, divisors
from tvm_structured.structures.layer import Array
from tvm_structured.structures.truncated_svd import tail_energies

Point = tuple[int, int]

# side of the samples that ranks are read from; BLAS multiplies 64 x 64 on one thread, without waking others
FIRST_SAMPLE, LARGE_SAMPLE = 64, 320
MANY_POINTS = 600  # more of them (a 5040 x 5040 weight has 3600) make do with smaller samples
CREDIBLE = 0.75  # a higher share of a sample's side is no rank: repeated rows may hide a much higher one
SHARE = 0.65  # of the tolerance is for each unfolding: rounding to nearest takes 1/sqrt(3) of the largest error


@dataclass
class RankLattice:
    """What is known of the ranks at all points, and the smallest chain under that knowledge.

    Unknown ranks enter with their lower bound: a chain is final once it holds known points only.
    """

    matrix: Array
    tol: float
    points: list[Point] = field(init=False)
    ranks: Array = field(init=False)
    known: Array = field(init=False)
    entries: tuple[Array, Array] = field(init=False)  # out and in indices of entries that samples must contain
    mean_square: float = field(init=False)
    flat: Array = field(init=False)

    def __post_init__(self) -> None:
        out, inner = (int(extent) for extent in self.matrix.shape)
        self.points = [(a, b) for a in divisors(out) for b in divisors(inner)]
        self.points.sort(key=lambda p: (p[0] * p[1], p))
        self.entries, total = likely_entries(self.matrix, 2 * LARGE_SAMPLE)
        self.flat = np.ascontiguousarray(self.matrix).reshape(-1)
        self.mean_square = total / self.matrix.size
        self.ranks = np.ones(len(self.points), np.int64)
        self.known = np.ones(len(self.points), bool)
        # thousands of small factorisations: on a busy machine waking BLAS's threads takes 50 times as long as one
        with threadpool_limits(1, user_api="blas"):
            for index in range(1, len(self.points) - 1):
                if self._exceeds_samples(index):
                    self.ranks[index] = self.full_rank(index)
                else:
                    self._sample(index, FIRST_SAMPLE)

    @property
    def largest_sample(self) -> int:
        return LARGE_SAMPLE if len(self.points) <= MANY_POINTS else LARGE_SAMPLE // 2

    def _exceeds_samples(self, index: int) -> bool:
        """Whether a point's rank is certainly full, or higher than any that samples are trusted to show: the fate of
        every point of a weight without structure, told by one Cholesky factorisation in float32.

        A block with a quarter more rows than columns: the smallest singular value of what is random stays far above
        float32's rounding, which that of a square block would not.
        """
        side, full = self.largest_sample, self.full_rank(index)
        columns = full if full <= side else int(CREDIBLE * side) + 1
        rows = columns + max(8, columns // 4)
        size = math.prod(self.points[index])
        shape = (columns, rows) if size <= self.matrix.size // size else (rows, columns)
        block = self._block(index, shape).astype(np.float32, copy=False)
        if shape[0] > shape[1]:
            block = block.T
        norm = float(np.square(block, dtype=np.float64).sum())
        allowed = (SHARE * self.tol) ** 2 * max(self.mean_square * block.size, norm)
        # what rounding can do to the sums of products and to the factorisation, which is relative to the trace
        rounding = (rows + columns + 2) * 0.5 * float(np.finfo(np.float32).eps) * norm
        return is_above(block @ block.T, allowed + rounding)

    def _block(self, index: int, shape: tuple[int, int]) -> Array:
        """At most so many rows and columns of the unfolding at a point."""
        (a, b), (out, inner) = self.points[index], self.matrix.shape
        high, low = (a, b), (out // a, inner // b)
        rng = np.random.default_rng(index)
        i, j = self.entries
        rows = some_of(i // low[0] * high[1] + j // low[1], high[0] * high[1], shape[0], rng)
        columns = some_of(i % low[0] * low[1] + j % low[1], low[0] * low[1], shape[1], rng)
        first = (rows // high[1] * low[0]) * inner + rows % high[1] * low[1]
        block: Array = np.take(self.flat, first[:, None] + (columns // low[1] * inner + columns % low[1]))
        return block

    def _sample(self, index: int, side: int) -> None:
        """Rank of the unfolding at a point, from at most side x side of its entries. Where these have nearly
        full rank and are not the whole unfolding, it is only a lower bound."""
        sample = self._block(index, (side, side)).astype(np.float64)
        # relative to the weight or the sample
        scale = max(self.mean_square * sample.size, float(np.square(sample).sum()))
        rank = rank_leaving(sample, (SHARE * self.tol) ** 2 * scale)
        self.ranks[index] = max(rank, self.ranks[index])
        self.known[index] = self.full_rank(index) <= side or rank <= CREDIBLE * side

    def full_rank(self, index: int) -> int:
        size = math.prod(self.points[index])
        return int(min(size, self.matrix.size // size))

    def sample_unknown(self) -> None:
        """A larger sample wherever the first was too small; ranks beyond that one as well count as full."""
        unknown = np.flatnonzero(~self.known)
        with threadpool_limits(1, user_api="blas"):
            for index in unknown:
                self._sample(int(index), self.largest_sample)
                if not self.known[index]:
                    self.ranks[index], self.known[index] = self.full_rank(int(index)), True

    def learn(self, chain: Sequence[int], ranks: Sequence[int]) -> None:
        """Ranks found on the whole weight; where none was higher than thought, all are doubled."""
        found = np.maximum(self.ranks[chain], ranks)
        if (found == self.ranks[chain]).all():
            found = np.minimum(2 * found, [self.full_rank(index) for index in chain])
        self.ranks[chain] = found

    def smallest_chain(self) -> tuple[int, list[int]] | None:
        """The fewest parameters and the indices of the inner points of that train, if it is smaller than dense.

        A train may have cores with an out mode of 1 or cores with an in mode of 1, not both: that would be a low
        rank in disguise. `state` says which kind there is: 0 none, 1 out, 2 in.
        """
        points = np.array(self.points)
        cost = np.full((3, len(points)), np.inf)
        before = np.zeros((3, len(points), 2), np.int64)
        cost[0, 0] = 0
        for to in range(1, len(points)):
            divides = np.flatnonzero((points[to, 0] % points[:to, 0] == 0) & (points[to, 1] % points[:to, 1] == 0))
            steps = points[to] // points[divides]
            size = self.ranks[divides] * steps[:, 0] * steps[:, 1] * self.ranks[to]
            for kind in (0, 1, 2):
                is_kind = (steps[:, 0] == 1) * 1 + (steps[:, 1] == 1) * 2 == kind
                for state in (0, kind) if kind else (0, 1, 2):
                    total = np.where(is_kind, cost[state, divides] + size, np.inf)
                    best = int(np.argmin(total))
                    after = max(state, kind)
                    if total[best] < cost[after, to]:
                        cost[after, to], before[after, to] = total[best], (state, divides[best])
        state = int(np.argmin(cost[:, -1]))
        if cost[state, -1] >= self.matrix.size:
            return None
        chain, at = [], len(points) - 1
        while at:
            state, at = (int(v) for v in before[state, at])
            chain.append(at)
        return int(cost[:, -1].min()), chain[-2::-1]


def likely_entries(matrix: Array, count: int) -> tuple[tuple[Array, Array], float]:
    """Random entries, drawn in proportion to their magnitudes, and the squared Frobenius norm.

    Uniform samples of sparse or block-diagonal weights would hold nothing but zeros.
    """
    rng = np.random.default_rng(0)
    magnitudes = np.array([np.abs(row).sum(dtype=np.float64) for row in matrix])
    total = sum(float(np.square(row, dtype=np.float64).sum()) for row in matrix)
    if total == 0.0:
        return (rng.integers(matrix.shape[0], size=count), rng.integers(matrix.shape[1], size=count)), 0.0
    rows = rng.choice(len(magnitudes), count, p=magnitudes / magnitudes.sum())
    columns = np.empty(count, np.int64)
    for n, row in enumerate(rows):
        cumulated = np.cumsum(np.abs(matrix[row]), dtype=np.float64)
        columns[n] = np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right")
    return (rows, np.minimum(columns, matrix.shape[1] - 1)), total


def some_of(wanted: Array, extent: int, side: int, rng: np.random.Generator) -> Array:
    """At most `side` different indices below `extent`: those wanted, in their order, then any."""
    if extent <= side:
        return np.arange(extent)
    _, first = np.unique(wanted, return_index=True)
    chosen = wanted[np.sort(first)][:side]
    if len(chosen) < side:
        others = np.setdiff1d(rng.choice(extent, min(extent, 2 * side), replace=False), chosen)
        chosen = np.concatenate([chosen, rng.permutation(others)[: side - len(chosen)]])
    return chosen


def rank_leaving(sample: Array, allowed: float) -> int:
    """The smallest rank that leaves out at most the squared norm `allowed`."""
    short = sample if sample.shape[0] <= sample.shape[1] else sample.T
    gram = short @ short.T
    if allowed <= 1e-12 * float(np.trace(gram)):  # nothing for the Gram matrix, whose rounding is as large
        squares = np.linalg.svd(short, compute_uv=False) ** 2
    elif is_above(gram, allowed):
        return len(gram)
    else:
        squares = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    return int(np.argmax(tail_energies(squares) <= allowed))


def is_above(gram: Array, bound: float) -> bool:
    """Whether all eigenvalues are greater: a Cholesky factorisation, ten times faster than the eigenvalues."""
    try:
        np.linalg.cholesky(gram - gram.dtype.type(bound) * np.eye(len(gram), dtype=gram.dtype))
    except np.linalg.LinAlgError:
        return False
    return True


def modes_of(chain: list[Point], shape: tuple[int, int]) -> Factorisation:
    """The modes of the steps through the inner points of a chain."""
    points = [(1, 1), *chain, shape]
    steps = list(itertools.pairwise(points))
    return tuple(q[0] // p[0] for p, q in steps), tuple(q[1] // p[1] for p, q in steps)
