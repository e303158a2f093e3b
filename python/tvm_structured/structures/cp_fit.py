"""Fitting a canonical polyadic (CP) decomposition of a kernel: eigenvectors first, then alternating least squares.

A tensor (out, in, kh, kw) is sum_r a_r o b_r o c_r o d_r; factors are matrices with a column for each r.
"""

from __future__ import annotations

import numpy as np

from tvm_structured.structures.arrays import contract
from tvm_structured.structures.debut_fit import outer_products
from tvm_structured.structures.layer import Array
from tvm_structured.structures.truncated_svd import exceeds_rank, left_factor

SWEEPS = 100
LEAST_SWEEPS, MOST_OPERATIONS = 10, 100_000_000_000  # of kernels that are not of the rank: a few seconds
EXACT = 1e-12  # relative error at which nothing is left to gain
NEAR = 1e-3  # relative error that only kernels of about the rank reach: more work is worth it
STARTS = 5
SETTLED = 1e-4  # relative gain of a sweep below which it is the last
SEARCHED_BITS = 8  # up to which the largest integer of a column is looked for
RIDGE = 1e-10  # of the mean diagonal: keeps terms that cancel each other from growing without bound
Factors = list[Array]


def fit(tensor: Array, rank: int, bits: int = 0, sweeps: int = SWEEPS) -> Factors:
    """Four factors of the given rank, float64. With `bits` the columns of a factor are rounded to integers times a
    scale as soon as they are found, within the sweeps: the factors after them make up for it. Exact for generic tensors
    of that rank if it is at most the smaller channel count.
    """
    tensor = tensor.astype(np.float64)
    if not tensor.any():
        return [np.zeros((extent, rank)) for extent in tensor.shape]
    size = float(np.linalg.norm(tensor))
    factors = start(tensor, rank, 0)
    # other mixtures of the taps are other roundings, of ill-conditioned kernels very; higher ranks gain nothing by them
    out, inner, kh, kw = tensor.shape
    unfolded = tensor.transpose(0, 3, 2, 1).reshape(out * kw, kh * inner)
    attempts = 1 if exceeds_rank(unfolded, rank, NEAR) else STARTS
    for attempt in range(1, attempts):
        if distance(tensor, factors) <= NEAR * size:
            break
        factors = min(factors, start(tensor, rank, attempt), key=lambda found: distance(tensor, found))
    best = [np.multiply(*integer_columns(factor, bits)) for factor in factors] if bits else factors
    before = least = distance(tensor, best)
    if least > NEAR * size:
        sweeps = min(sweeps, max(LEAST_SWEEPS, MOST_OPERATIONS // (4 * tensor.size * rank)))
    for _ in range(sweeps):
        if least <= EXACT * size:
            break
        factors = sweep(tensor, factors, bits)
        now = distance(tensor, factors)
        if now < least:
            best, least = factors, now
        if before - now <= SETTLED * before and now > NEAR * size:
            break
        before = now
    return best


def start(tensor: Array, rank: int, attempt: int) -> Factors:
    """Jennrich's algorithm where the rank allows it: two mixtures of the taps, compressed to rank x rank, share their
    eigenvectors. Missing components are random."""
    out, inner, kh, kw = tensor.shape
    rng = np.random.default_rng([out, inner, rank, attempt])
    taps = tensor.reshape(out, inner, kh * kw)
    found = min(rank, out, inner)
    u = left_factor(taps.reshape(out, -1))[0][:, :found]
    v = left_factor(taps.transpose(1, 0, 2).reshape(inner, -1))[0][:, :found]
    core = contract("or,oit,is->rst", u, taps, v)
    mixed = [core @ rng.standard_normal(kh * kw) for _ in range(2)]
    eigenvectors = np.linalg.eig(mixed[0] @ np.linalg.pinv(mixed[1]))[1]
    # complex pairs are no components; their real and imaginary parts span the same plane
    a = u @ np.where(eigenvectors.imag.any(0), eigenvectors.real + eigenvectors.imag, eigenvectors.real)
    a = np.concatenate([a, rng.standard_normal((out, rank - found))], axis=1)
    # with a known every component is a matrix (in, taps), whose best outer product is taken, then that of its taps
    b, shared = outer_products(np.tensordot(np.linalg.pinv(a), taps, 1))
    c, d = outer_products(shared.reshape(rank, kh, kw))
    return [a, b.T, c.T, d.T]


def sweep(tensor: Array, factors: Factors, bits: int) -> Factors:
    """Every factor in turn the best one beside the others, then rounded."""
    a, b, c, d = factors
    a = solved(tensor.reshape(len(a), -1) @ khatri_rao(b, c, d), a, (b, c, d), bits)
    within = (a.T @ tensor.reshape(len(a), -1)).reshape(a.shape[1], *tensor.shape[1:])  # (rank, in, kh, kw)
    columns = np.einsum("yr,xr->ryx", c, d).reshape(len(within), -1, 1)
    b = solved((within.reshape(*within.shape[:2], -1) @ columns)[..., 0].T, b, (a, c, d), bits)
    taps = (b.T[:, None] @ within.reshape(*within.shape[:2], -1)).reshape(-1, *within.shape[2:])
    c = solved(np.einsum("ryx,xr->yr", taps, d), c, (a, b, d), bits)
    d = solved(np.einsum("ryx,yr->xr", taps, c), d, (a, b, c), bits)
    return [a, b, c, d]


def solved(projected: Array, now: Array, others: tuple[Array, ...], bits: int) -> Array:
    """The factor of the normal equations, kept near `now` where they do not determine it."""
    gram = np.prod([other.T @ other for other in others], axis=0)
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    return rounded_factor(np.linalg.solve(gram + ridge, (projected + now @ ridge).T).T, bits)


def khatri_rao(*factors: Array) -> Array:
    """All products of rows, column by column: (prod of rows, rank)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).reshape(-1, factor.shape[1])
    return product


def rounded_factor(factor: Array, bits: int) -> Array:
    """Columns rounded to integers of that many bits times a scale; as they are for 0 bits."""
    if not bits:
        return factor
    limit = 2 ** (bits - 1) - 1
    scales = np.maximum(np.abs(factor).max(0), 1e-300) / limit
    whole: Array = np.rint(factor / scales) * scales
    return whole


def integer_columns(factor: Array, bits: int) -> tuple[Array, Array]:
    """(integers, scales): each column's largest entry becomes 2^(bits - 1) - 1, or what makes all entries whole."""
    limit = 2 ** (bits - 1) - 1
    peaks = np.abs(factor).max(0)
    scales = np.where(peaks > 0, peaks, 1.0) / limit
    for r in range(factor.shape[1] if bits <= SEARCHED_BITS else 0):
        # a column that is integer already has a smaller peak
        tries = factor[:, r, None] / peaks[r] * np.arange(1, limit + 1) if peaks[r] > 0 else np.zeros((1, limit))
        whole = np.abs(tries - np.rint(tries)).max(0) <= 1e-5 * np.arange(1, limit + 1)
        if whole.any():
            scales[r] = (peaks[r] or 1.0) / (1 + int(whole.argmax()))
    return np.clip(np.rint(factor / scales), -limit, limit), scales


def distance(tensor: Array, factors: Factors) -> float:
    a, *others = factors
    return float(np.linalg.norm(tensor.reshape(len(a), -1) - a @ khatri_rao(*others).T))
