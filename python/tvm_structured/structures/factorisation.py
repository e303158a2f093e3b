"""Which modes a matrix may be cut into: the published lists, balanced ones, and the search for those a weight has.

The ranks of a tensor train are those of its unfoldings, and an unfolding depends only on a point (a, b), the
products of the first out and in modes (`tt_svd.unfolding`). A list of modes is therefore a chain of points
(1, 1) = p_0 | p_1 | ... | p_d = (out, in), each dividing the next, and its parameters are a sum over the
steps of the chain: once every point's rank is known, the smallest train is a shortest path.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tvm_structured.structures.layer import Array
from tvm_structured.structures.truncated_svd import energy, tail_energies
from tvm_structured.structures.tt_svd import Modes

Point = tuple[int, int]
Factorisation = tuple[Modes, Modes]  # out modes, in modes

# (out, in) -> modes used in the literature for VGG's first dense layers and for video LSTMs (one gate, four gates)
PUBLISHED: dict[tuple[int, int], tuple[Factorisation, ...]] = {
    (4096, 25088): (((4, 4, 4, 4, 4, 4), (2, 7, 8, 8, 7, 4)),),
    (256, 57600): (((4, 4, 4, 4), (8, 20, 20, 18)), ((4, 4, 4, 4), (4, 20, 20, 36))),
    (1024, 57600): (((16, 4, 4, 4), (8, 20, 20, 18)), ((4, 4, 4, 16), (8, 20, 20, 18))),
}
MOST_CORES = 6


def factorisations(shape: tuple[int, int], taps: int = 1) -> Iterator[Factorisation]:
    """Lists of 2 to 6 balanced modes above 1, the published ones first. Nothing where a side is prime.

    With taps > 1 (a convolution's kh * kw, the slowest input index) also lists whose first core holds the taps alone.
    """
    seen = set()
    for candidate in (*PUBLISHED.get(shape, ()), *balanced_factorisations(shape), *tap_factorisations(shape, taps)):
        if candidate not in seen:
            seen.add(candidate)
            yield candidate


def balanced_factorisations(shape: tuple[int, int]) -> Iterator[Factorisation]:
    """Out modes falling and in modes rising, so that the products m_k * n_k, hence the cores, are alike."""
    for cores in range(2, MOST_CORES + 1):
        out, inner = (balanced_modes(extent, cores) for extent in shape)
        if out is not None and inner is not None:
            yield out[::-1], inner


def tap_factorisations(shape: tuple[int, int], taps: int) -> Iterator[Factorisation]:
    """(1, m_1, ...) by (taps, n_1, ...)."""
    if taps > 1:
        for out, inner in balanced_factorisations((shape[0], shape[1] // taps)):
            yield (1, *out), (taps, *inner)


@functools.cache
def balanced_modes(extent: int, count: int) -> Modes | None:
    """`count` factors above 1 with the smallest sum, rising; None where there are fewer prime factors."""
    if count == 1:
        return (extent,) if extent > 1 else None
    best: Modes | None = None
    for first in divisors(extent):
        # the smallest factor is at most the count-th root
        if first == 1 or first**count > extent:
            continue
        rest = balanced_modes(extent // first, count - 1)
        if rest is not None and first <= rest[0] and (best is None or first + sum(rest) < sum(best)):
            best = (first, *rest)
    return best


def divisors(extent: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(extent) + 1) if extent % d == 0]
    return small + [extent // d for d in reversed(small) if d * d != extent]


# -- the search -----------------------------------------------------------------------------------------

FIRST_SAMPLE, LARGE_SAMPLE = 48, 264  # side of the samples that ranks are read from
MANY_POINTS = 600  # more of them (a 5040 x 5040 weight has 3600) make do with smaller samples
SPARE = 8  # a sample proves a rank only if it is that much larger


def sampled_rank(matrix: Array, point: Point, side: int, tail: float, seed: int) -> tuple[int, bool]:
    """(rank, is_known) of the unfolding at a point, from a random submatrix of at most side x side entries.

    `tail` is the root mean square of the error that may be left out. A submatrix never has a higher rank; where
    it seems to have full rank and is not the whole unfolding, the rank is only a lower bound.
    """
    (a, b), (out, inner) = point, matrix.shape
    low_out, low_in = out // a, inner // b
    rng = np.random.default_rng(seed)

    def chosen(extent: int) -> Array:
        return np.arange(extent) if extent <= side else np.sort(rng.choice(extent, side, replace=False))

    rows, columns = chosen(a * b), chosen(low_out * low_in)
    sample = matrix[
        (rows // b * low_out)[:, None] + columns // low_in, (rows % b * low_in)[:, None] + columns % low_in
    ].astype(np.float64)
    rank = rank_leaving(sample, tail**2 * sample.size)
    is_known = min(a * b, low_out * low_in) <= side or rank <= side - SPARE
    return max(1, rank), is_known


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
        np.linalg.cholesky(gram - bound * np.eye(len(gram)))
    except np.linalg.LinAlgError:
        return False
    return True


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

    def __post_init__(self) -> None:
        out, inner = (int(extent) for extent in self.matrix.shape)
        self.points = [(a, b) for a in divisors(out) for b in divisors(inner)]
        self.points.sort(key=lambda p: (p[0] * p[1], p))
        # half of the tolerance; the verification of the whole train decides
        norm = math.sqrt(energy(self.matrix))
        self.tail = 0.5 * self.tol * norm / math.sqrt(self.matrix.size)
        self.ranks = np.ones(len(self.points), np.int64)
        self.known = np.ones(len(self.points), bool)
        for index in range(1, len(self.points) - 1):
            self._sample(index, FIRST_SAMPLE)

    def _sample(self, index: int, side: int) -> None:
        self.ranks[index], self.known[index] = sampled_rank(self.matrix, self.points[index], side, self.tail, index)

    def full_rank(self, index: int) -> int:
        size = math.prod(self.points[index])
        return int(min(size, self.matrix.size // size))

    def sample_unknown(self) -> None:
        """A larger sample wherever the first was too small; ranks beyond that one as well count as full."""
        unknown = np.flatnonzero(~self.known)
        for index in unknown:
            self._sample(int(index), LARGE_SAMPLE if len(unknown) <= MANY_POINTS else LARGE_SAMPLE // 2)
            if not self.known[index]:
                self.ranks[index], self.known[index] = self.full_rank(int(index)), True

    def raise_rank(self, point: Point) -> None:
        """The sample was misleading (most of it zero, say): at least double its rank."""
        index = self.points.index(point)
        self.ranks[index] = min(2 * self.ranks[index], self.full_rank(index))

    def smallest_chain(self) -> list[int] | None:
        """Indices of the inner points of the train with the fewest parameters, if these are fewer than dense.

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
        return chain[-2::-1]


def modes_of(chain: list[Point], shape: tuple[int, int]) -> Factorisation:
    """The modes of the steps through the inner points of a chain."""
    points = [(1, 1), *chain, shape]
    steps = list(itertools.pairwise(points))
    return tuple(q[0] // p[0] for p, q in steps), tuple(q[1] // p[1] for p, q in steps)
