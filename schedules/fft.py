"""Real Fourier transforms in vector lanes: each lane holds another block, so the arithmetic needs no shuffles.

A block of n reals is a list of n vectors. Its spectrum is a list of n // 2 + 1 pairs (re, im); `im` is None where
it is zero (frequency 0, and n / 2 for even n). X[k] = sum_c x[c] exp(-2 pi i k c / n); the inverse is not
divided by n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from tvm_structured.schedules.emit import Emitter, scratch, serial
from tvm_structured.schedules.gemm import multiply_block

Pair = tuple[Any, Any]  # (re, im or None)
LONGEST_STRAIGHT = 128  # beyond, transforms are matrix products: straight-line code takes seconds to compile
SHORT_CODE = 400  # vector operations
DIRECT_ROWS = 8  # frequencies of a matrix-product transform that are computed at once


def smallest_factor(n: int) -> int:
    """The smallest prime factor."""
    return next((f for f in range(2, math.isqrt(n) + 1) if n % f == 0), n)


class Counter:
    """Stands in for an Emitter to count the operations of a transform; vectors are plain numbers."""

    def __init__(self) -> None:
        self.operations = 0

    def splat(self, value: float) -> float:
        return value

    def bind(self, value: float) -> float:
        self.operations += 1
        return value


@cache
def is_straight(n: int) -> bool:
    """Whether transforms of that length are straight-line code: where this is short, or moderate and much less work
    than two matrix products (long lengths with large prime factors are not)."""
    if n > LONGEST_STRAIGHT:
        return False
    counter = Counter()
    real_fft(counter, [0.0] * n)
    return counter.operations < SHORT_CODE or counter.operations < (n // 2 + 1) ** 2


def real_fft(e: Any, x: Sequence[Any]) -> list[Pair]:
    """Mixed-radix decimation in time (Cooley and Tukey 1965) that keeps to the first half of every spectrum."""
    n = len(x)
    if n == 1:
        return [(x[0], None)]
    radix = smallest_factor(n)
    m = n // radix
    parts = [real_fft(e, x[r::radix]) for r in range(radix)]
    spectrum: list[Any] = [None] * (n // 2 + 1)
    for k in range(m // 2 + 1):
        turned = [times_constant(e, part[k], root(n, -r * k)) for r, part in enumerate(parts)]
        outputs = small_dft(e, turned)
        for j in range(radix):
            bin_, mirrored = (k + m * j, False) if k + m * j <= n // 2 else (n - k - m * j, True)
            if spectrum[bin_] is None:
                spectrum[bin_] = outputs(j, mirrored)
    return spectrum


def small_dft(e: Any, x: Sequence[Pair]) -> Callable[[int, bool], Pair]:
    """(j, conjugate) -> output j of the transform of a few complex (or real) numbers, or its conjugate.

    With s_r = x_r + x_(f-r) and d_r = x_r - x_(f-r) output j is A - iB and output f - j is A + iB, where
    A = x_0 + sum s_r cos(2 pi r j / f) and B = sum d_r sin(2 pi r j / f).
    """
    f = len(x)
    half = range(1, (f + 1) // 2)
    sums = [(add(e, x[r][0], x[f - r][0]), add(e, x[r][1], x[f - r][1])) for r in half]
    differences = [(sub(e, x[r][0], x[f - r][0]), sub(e, x[r][1], x[f - r][1])) for r in half]
    known: dict[int, tuple[Pair, Pair]] = {}

    def parts(j: int) -> tuple[Pair, Pair]:
        if j not in known:
            cosines = [root(f, r * j).real for r in half]
            sines = [root(f, r * j).imag for r in half]
            even = [[x[0][i], *([] if f % 2 else [x[f // 2][i]]), *(s[i] for s in sums)] for i in (0, 1)]
            middle = [] if f % 2 else [(-1.0) ** j]
            known[j] = (
                (weighted(e, even[0], [1.0, *middle, *cosines]), weighted(e, even[1], [1.0, *middle, *cosines])),
                (weighted(e, [d[0] for d in differences], sines), weighted(e, [d[1] for d in differences], sines)),
            )
        return known[j]

    def output(j: int, conjugate: bool) -> Pair:
        if f == 2 and j == 1:  # the imaginary part in either sign at no cost
            im = (x[1][1], x[0][1]) if conjugate else (x[0][1], x[1][1])
            return sub(e, x[0][0], x[1][0]), sub(e, *im)
        a, b = parts(min(j, f - j))
        if 2 * j <= f:
            re, im = add(e, a[0], b[1]), (sub(e, b[0], a[1]) if conjugate else sub(e, a[1], b[0]))
        else:
            re, im = sub(e, a[0], b[1]), add(e, a[1], b[0])
            im = sub(e, None, im) if conjugate else im
        return re, im

    return output


def real_ifft(e: Emitter, spectrum: Sequence[Pair], n: int) -> list[Any]:
    """The n real vectors of a half spectrum, by decimation in frequency."""
    if n == 1:
        return [spectrum[0][0]]
    radix = smallest_factor(n)
    m = n // radix
    narrower: list[list[Pair]] = [[] for _ in range(radix)]

    def at(k: int) -> Pair:
        if k <= n // 2:
            return spectrum[k]
        re, im = spectrum[n - k]
        return re, None if im is None else sub(e, None, im)

    for k in range(m // 2 + 1):
        outputs = inverse_column(e, [k + m * j for j in range(radix)], n, spectrum, at)
        for r, value in enumerate(outputs):
            # for radix 2 and k = m / 2 the value is imaginary and the factor i: `times_constant` leaves it real
            narrower[r].append(times_constant(e, value, root(n, r * k)))
    blocks = [real_ifft(e, half, m) for half in narrower]
    return [blocks[c % radix][c // radix] for c in range(n)]


def inverse_column(
    e: Emitter, bins: Sequence[int], n: int, spectrum: Sequence[Pair], at: Callable[[int], Pair]
) -> list[Pair]:
    """sum_j X[bins[j]] exp(2 pi i j r / f) for r = 0 .. f - 1, real where symmetry makes it so."""
    f, k = len(bins), bins[0]
    if f == 2:
        (a, ai), (b, bi) = spectrum[k], spectrum[n - bins[1]]  # the second one stands for its conjugate
        if 2 * k == bins[1] - bins[0]:  # k = n / 4: both are the same number
            return [(add(e, a, a), None), (None, add(e, ai, ai))]
        return [(add(e, a, b), sub(e, ai, bi)), (sub(e, a, b), add(e, ai, bi))]
    if k == 0:
        return [(value, None) for value in inverse_prime(e, [spectrum[bin_] for bin_ in bins[: f // 2 + 1]])]
    outputs = small_dft(e, [at(bin_) for bin_ in bins])
    return [outputs(-r % f, False) for r in range(f)]


def inverse_prime(e: Emitter, spectrum: Sequence[Pair]) -> list[Any]:
    """The inverse transform of odd length as it is defined, even and odd parts shared by c and n - c."""
    n = 2 * len(spectrum) - 1
    doubled = [(add(e, re, re), add(e, im, im)) for re, im in spectrum[1:]]
    x: list[Any] = [weighted(e, [spectrum[0][0], *(d[0] for d in doubled)], [1.0] * len(spectrum))]
    x += [None] * (n - 1)
    for c in range(1, n // 2 + 1):
        turns = [root(n, k * c) for k in range(1, len(spectrum))]
        even = weighted(e, [spectrum[0][0], *(d[0] for d in doubled)], [1.0, *(t.real for t in turns)])
        odd = weighted(e, [d[1] for d in doubled], [t.imag for t in turns])
        x[c], x[n - c] = sub(e, even, odd), add(e, even, odd)
    return x


def root(n: int, k: int) -> complex:
    """exp(2 pi i k / n), with exact zeros and ones."""
    angle = 2 * math.pi * (k % n) / n
    return complex(round(math.cos(angle), 15), round(math.sin(angle), 15))


def add(e: Any, a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    return e.bind(a + b)


def sub(e: Any, a: Any, b: Any) -> Any:
    if b is None:
        return a
    return e.bind(e.splat(0.0) - b if a is None else a - b)


def scaled(e: Any, a: Any, factor: float) -> Any:
    """factor * a, not yet bound; None for zero."""
    if a is None or factor == 0:
        return None
    return a if factor == 1 else a * e.splat(factor)


def weighted(e: Any, values: Sequence[Any], weights: Sequence[float]) -> Any:
    """sum of weight * value; None if nothing is left."""
    total = None
    for value, weight in zip(values, weights, strict=True):
        if weight == -1 and value is not None and total is not None:
            total = e.bind(total - value)
            continue
        term = scaled(e, value, weight)
        total = term if total is None else total if term is None else e.bind(total + term)
    return total


def times_constant(e: Any, a: Pair, w: complex) -> Pair:
    """The complex product of a pair and a number."""
    if w == 1:
        return a
    re, im = weighted(e, a, (w.real, -w.imag)), weighted(e, a, (w.imag, w.real))
    return None if re is None else e.bind(re), None if im is None else e.bind(im)


def deinterleave(e: Emitter, vectors: Sequence[Any]) -> list[Any]:
    """n (a power of two) consecutive vectors of blocks of length n -> n vectors, vector c with element c of each
    block. For n = lanes this transposes a square."""
    if len(vectors) == 1:
        return list(vectors)
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    elements: list[Any] = [None] * len(vectors)
    elements[::2] = deinterleave(e, [e.bind(e.shuffle(a, b, range(0, 2 * e.lanes, 2))) for a, b in pairs])
    elements[1::2] = deinterleave(e, [e.bind(e.shuffle(a, b, range(1, 2 * e.lanes, 2))) for a, b in pairs])
    return elements


def interleave(e: Emitter, elements: Sequence[Any]) -> list[Any]:
    """The inverse of `deinterleave`."""
    if len(elements) == 1:
        return list(elements)
    even, odd = interleave(e, elements[::2]), interleave(e, elements[1::2])
    zipped = [lane for i in range(e.lanes) for lane in (i, e.lanes + i)]
    halves = zipped[: e.lanes], zipped[e.lanes :]
    return [e.bind(e.shuffle(a, b, half)) for a, b in zip(even, odd, strict=True) for half in halves]


def direct_tables(n: int) -> np.ndarray:
    """cos and sin of 2 pi f c / n for f, c = 0 .. n // 2, as (2, ceil / DIRECT_ROWS, c, DIRECT_ROWS) float32."""
    half = n // 2 + 1
    groups = -(-half // DIRECT_ROWS)
    frequency, place = np.arange(groups * DIRECT_ROWS), np.arange(half)
    angle = 2 * np.pi * (np.outer(place, frequency) % n) / n
    tables = np.stack([np.cos(angle), np.sin(angle)]).reshape(2, half, groups, DIRECT_ROWS)
    return np.ascontiguousarray(tables.transpose(0, 2, 1, 3)).astype(np.float32)


class Halves:
    """A transform as two matrix products: A[f] = sum_c even[c] cos(2 pi f c / n), B[f] = sum_c odd[c] sin(...).

    Forward, `even` and `odd` are the symmetric parts of the block; backward, twice re and im. Arrays of vectors
    for 0 .. n // 2, padded to DIRECT_ROWS; on the heap, for a stack would not hold them all.
    """

    def __init__(self, e: Emitter, n: int) -> None:
        self.e, self.length = e, n // 2 + 1
        self.groups = -(-self.length // DIRECT_ROWS)
        self.inputs = tuple(scratch((self.length, e.lanes)) for _ in range(2))
        self.outputs = tuple(scratch((self.groups * DIRECT_ROWS, e.lanes)) for _ in range(2))

    def set(self, c: Any, even: Any, odd: Any) -> None:
        for array, value in zip(self.inputs, (even, odd), strict=True):
            self.e.store(array, value, c, 0)

    def transform(self, tables: Any) -> tuple[Any, Any]:
        """The arrays A and B, given the argument that holds `direct_tables`."""
        for kind in range(2):
            with serial(0, self.groups) as group:
                self._product(tables, kind, group)
        return self.outputs[0], self.outputs[1]

    def _product(self, tables: Any, kind: int, group: Any) -> None:
        acc = multiply_block(
            self.e,
            DIRECT_ROWS,
            1,
            self.length,
            lambda i, c: tables[kind, group, c, i],
            lambda c, _: self.e.load(self.inputs[kind], c, 0),
        )
        for i in range(DIRECT_ROWS):
            self.e.store(self.outputs[kind], acc[i][0][0], group * DIRECT_ROWS + i, 0)
