"""Which modes to cut a matrix into where the weight does not say: published lists and balanced ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from tvm_structured.structures.tt_svd import Modes

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
