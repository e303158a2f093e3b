"""How many ranks to give to each bond of a tensor train: equal shares of the energy that is left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tvm_structured.structures.factorisation import Factorisation
from tvm_structured.structures.layer import Array
from tvm_structured.structures.rank_lattice import Point
from tvm_structured.structures.tt_svd import Modes, unfolding_tails

LARGEST_RANK = 512  # beyond it a train is no faster than a dense layer, and its SVDs take minutes

Affordable = Callable[[Factorisation, Sequence[int]], bool]


@dataclass
class RankAllocation:
    """Tails of a weight's unfoldings (what each rank would leave out), and ranks chosen from them.

    The error of TT-SVD is at most the root of the sum of the tails at its bonds (Oseledets 2011, theorem 2.2).
    """

    matrix: Array
    tails: dict[Point, Array] = field(default_factory=dict)

    def tails_at(self, out_modes: Modes, in_modes: Modes) -> list[Array]:
        """The tails at every bond; unfoldings are shared between factorisations."""
        a = itertools.accumulate(out_modes[:-1], int.__mul__)
        b = itertools.accumulate(in_modes[:-1], int.__mul__)
        points = list(zip(a, b, strict=True))
        for point in points:
            if point not in self.tails:
                self.tails[point] = unfolding_tails(self.matrix, *point, LARGEST_RANK)
        return [self.tails[point] for point in points]

    def ranked(
        self, candidates: Sequence[Factorisation], affordable: Affordable, max_error: float | None
    ) -> list[tuple[Modes, Modes, list[int]]]:
        """Modes and ranks within the budget, best first: nearest, or with `max_error` smallest."""
        found = []
        for index, modes in enumerate(candidates):
            tails = self.tails_at(*modes)
            if max_error is None:
                ranks = nearest_ranks(tails, lambda ranks, modes=modes: affordable(modes, ranks))  # type: ignore[misc]
            else:
                ranks = smallest_ranks(tails, max_error)
            if ranks is None or not affordable(modes, ranks):
                continue
            error = sum(float(tail[r]) for tail, r in zip(tails, ranks, strict=True))
            bonds = (1, *ranks, 1)
            params = sum(r * m * n * s for r, m, n, s in zip(bonds[:-1], *modes, bonds[1:], strict=True))
            found.append((error if max_error is None else float(params), index, (*modes, ranks)))
        return [entry[-1] for entry in sorted(found, key=lambda entry: entry[:2])]


def ranks_leaving(tails: Sequence[Array], threshold: float) -> list[int] | None:
    """The smallest rank at each bond that leaves out at most `threshold`; None where the known ranks leave more."""
    if any(tail[-1] > threshold for tail in tails):
        return None
    return [max(1, int(np.argmax(tail <= threshold))) for tail in tails]


def nearest_ranks(tails: Sequence[Array], affordable: Callable[[Sequence[int]], bool]) -> list[int] | None:
    """Ranks for the lowest common threshold that the budget admits."""
    levels = np.unique(np.concatenate(tails))
    low, high = 0, len(levels)  # levels[high:] are affordable
    while low < high:
        middle = (low + high) // 2
        ranks = ranks_leaving(tails, float(levels[middle]))
        if ranks is not None and affordable(ranks):
            high = middle
        else:
            low = middle + 1
    return ranks_leaving(tails, float(levels[high])) if high < len(levels) else None


def smallest_ranks(tails: Sequence[Array], max_error: float) -> list[int] | None:
    """Ranks for the highest common threshold whose summed tails stay within the error."""
    allowed = max_error**2 * float(tails[0][0])
    levels = np.unique(np.concatenate(tails))
    low, high = 0, len(levels)  # levels[:low] stay within
    while low < high:
        middle = (low + high) // 2
        ranks = ranks_leaving(tails, float(levels[middle]))
        # a threshold below what is known about a bond is no use, but a higher one may be
        left_out = 0.0 if ranks is None else sum(float(t[r]) for t, r in zip(tails, ranks, strict=True))
        if left_out <= allowed:
            low = middle + 1
        else:
            high = middle
    return ranks_leaving(tails, float(levels[low - 1])) if low else None
