"""Micro-op sequences: written as loops where they are regular, and kept on chip while there is room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Uops = NDArray[np.int64]  # (n, 3): dst, src, wgt


@dataclass(frozen=True)
class Loop:
    """count times, with what is added to dst, src and wgt each time."""

    count: int = 1
    dst: int = 0
    src: int = 0
    wgt: int = 0

    @property
    def reach(self) -> NDArray[np.int64]:
        """What the last iteration adds."""
        return np.array([self.dst, self.src, self.wgt], np.int64) * (self.count - 1)


def as_uops(dst: Any, src: Any = 0, wgt: Any = 0) -> Uops:
    """From numbers or arrays that broadcast; the last axis varies fastest."""
    arrays = np.broadcast_arrays(*(np.asarray(a, np.int64) for a in (dst, src, wgt)))
    return np.stack([a.reshape(-1) for a in arrays], axis=1)


def fold(uops: Uops, longest: int) -> tuple[Uops, Loop]:
    """The same sequence as a loop over its shortest period, at most `longest` times."""
    n = len(uops)
    for period in range(1, n // 2 + 1):
        if n % period or n // period > longest:
            continue
        step = uops[period] - uops[0]
        if not np.array_equal(uops[-1], uops[-1 - period] + step):
            continue  # most periods are wrong: a short look tells
        if (step >= 0).all() and np.array_equal(uops[period:], uops[:-period] + step):
            return uops[:period], Loop(n // period, *(int(v) for v in step))
    return uops, Loop()


class UopBuffer:
    """What the UOP buffer holds. A kernel is appended; when the end is reached, all are forgotten."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.free = 0
        self.has_all = True  # nothing was ever forgotten
        self.kernels: dict[bytes, int] = {}

    def place(self, words: NDArray[np.uint32]) -> tuple[int, bool]:
        """Where the kernel is, and whether it was there already."""
        key = words.tobytes()
        if key in self.kernels:
            return self.kernels[key], True
        if self.free + len(words) > self.depth:
            self.free, self.kernels, self.has_all = 0, {}, False
        first = self.kernels[key] = self.free
        self.free += len(words)
        return first, False
