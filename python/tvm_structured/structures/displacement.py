"""Displacement operators and ranks: the general test for Toeplitz, Hankel, Vandermonde and Cauchy matrices.

Z_f shifts down and brings the last entry, times f, to the top. D(M) = Z_e M - M Z_f has rank 1 for a circulant M, 2 for
a Toeplitz one, and little more for inverses, products and low-rank changes of them; a Hankel matrix is a Toeplitz one
whose columns are reversed. Diagonal matrices of nodes take the place of the shifts for the other two families.
Sources: Kailath, Kung and Morf 1979; Pan, "Structured Matrices and Polynomials", 2001.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tvm_structured.structures.layer import Array
from tvm_structured.structures.low_rank import smallest_within
from tvm_structured.structures.truncated_svd import energy

LARGEST_RANK = 4
SAMPLED = 24  # rows and columns that are looked at first
SLACK = 25.0  # how much more than its share a sample may leave out: only what cannot be is dropped


@dataclass(frozen=True)
class Displacement:
    """The family that a matrix belongs to, and the rank of its displacement there."""

    family: str
    rank: int

    def __str__(self) -> str:
        return f"{self.family} (displacement rank {self.rank})"


def shift_signs(shape: tuple[int, int]) -> tuple[int, int]:
    """(e, f) = (1, -1), or (-1, 1) where Z_1 of the rows and Z_-1 of the columns would share an eigenvalue: that is
    where the number of rows has more factors 2."""
    rows, columns = shape
    return (1, -1) if rows & -rows <= columns & -columns else (-1, 1)


def displaced(matrix: Array) -> Array:
    """Z_e M - M Z_f in float64."""
    e, f = shift_signs((matrix.shape[0], matrix.shape[1]))
    result = np.roll(matrix, 1, 0).astype(np.float64)
    result[0] *= e
    result[:, :-1] -= matrix[:, 1:]
    result[:, -1] -= f * matrix[:, 0].astype(np.float64)
    return result


def may_be_displaced(matrix: Array, tol: float, rank: int = LARGEST_RANK) -> bool:
    """False only where random rows and columns of D(M) exclude that rank within relative error `tol` of M."""
    rng = np.random.default_rng(0)
    rows, columns = (np.sort(rng.permutation(extent - 1)[:SAMPLED]) for extent in matrix.shape)
    if min(len(rows), len(columns)) <= rank:
        return True
    # the corners, where the shifts wrap around, are left out
    sample = matrix[np.ix_(rows, columns)].astype(np.float64) - matrix[np.ix_(rows + 1, columns + 1)]
    left_out = float(np.square(np.linalg.svd(sample, compute_uv=False)[rank:]).sum())
    allowed = SLACK * (2 * tol) ** 2 * energy(matrix) * sample.size / int(matrix.size)
    return bool(left_out <= allowed + 1e-30)


def displacement_rank(matrix: Array, tol: float, limit: int = LARGEST_RANK) -> int | None:
    """The rank of D(M), None above `limit`. An error of `tol` in M is one of at most 2 `tol` |M| in D(M)."""
    if not may_be_displaced(matrix, tol, limit):
        return None
    image = displaced(matrix)
    size = float(np.linalg.norm(image))
    relative = 2 * tol * float(np.linalg.norm(matrix)) / (size or 1.0)
    found = smallest_within(image, min(limit, *matrix.shape), max(min(relative, 0.5), 1e-12))
    return None if found is None else found[1]


def displacement_scan(matrix: Array, tol: float = 1e-5) -> Displacement | None:
    """The family with the smallest displacement rank, up to 4; None where there is none, or the matrix is too small
    or zero."""
    if min(matrix.shape) <= 2 * LARGEST_RANK or not matrix.any():
        return None
    found = []
    for kind, view in (("Toeplitz", matrix), ("Hankel", matrix[:, ::-1])):
        rank = displacement_rank(view, tol)
        if rank is not None:
            found.append(Displacement(shift_family(kind, view, rank, tol), rank))
    for test in (is_vandermonde, is_cauchy):
        for view, prefix in ((matrix, ""), (matrix.T, "transposed ")):
            # a few rows and columns first: they are of the same family, and exclude most matrices
            if not found and test(view[:SAMPLED, :SAMPLED], SLACK * tol) and test(view, tol):
                found.append(Displacement(prefix + test.__name__.removeprefix("is_").capitalize(), 1))
    return min(found, key=lambda displacement: displacement.rank, default=None)


def shift_family(kind: str, matrix: Array, rank: int, tol: float) -> str:
    """The narrowest name: constant along diagonals, and along those that wrap around."""
    matrix = matrix.astype(np.float64)
    limit = 2 * tol * float(np.linalg.norm(matrix))
    if np.linalg.norm(matrix[1:, 1:] - matrix[:-1, :-1]) > limit:
        return f"{kind}-like"
    is_square = matrix.shape[0] == matrix.shape[1]
    if kind == "Toeplitz" and is_square and np.linalg.norm(np.roll(matrix, (1, 1), (0, 1)) - matrix) <= limit:
        return "circulant"
    return kind


def is_vandermonde(matrix: Array, tol: float) -> bool:
    """M[i, j + 1] = x_i M[i, j] with nodes x that are not all alike (that would be rank 1)."""
    before, after = matrix[:, :-1].astype(np.float64), matrix[:, 1:].astype(np.float64)
    norms = np.square(before).sum(1)
    nodes = np.divide((before * after).sum(1), norms, out=np.zeros(len(norms)), where=norms > 0)
    if np.ptp(nodes) <= 1e-3 * np.abs(nodes).max():
        return False
    return bool(np.linalg.norm(after - nodes[:, None] * before) <= 2 * tol * np.linalg.norm(matrix))


def is_cauchy(matrix: Array, tol: float) -> bool:
    """1 / M[i, j] = x_i - y_j."""
    if not matrix.all():
        return False
    rebuilt = cauchy_inverse(matrix)
    if not rebuilt.all():
        return False
    return bool(np.linalg.norm(1 / rebuilt - matrix) <= tol * np.linalg.norm(matrix))


def cauchy_inverse(matrix: Array) -> Array:
    """The differences x_i - y_j that fit 1 / M best, every entry weighed as it counts in M."""
    inverse = 1 / matrix.astype(np.float64)
    weights = np.square(np.square(1 / inverse))  # an error in 1 / M is M^2 times as large in M
    x, y = np.zeros(len(matrix)), inverse.mean(0)
    for _ in range(50):  # alternating means
        x = (weights * (inverse - y)).sum(1) / weights.sum(1)
        y = (weights * (inverse - x[:, None])).sum(0) / weights.sum(0)
    return functools.reduce(np.add.outer, (x, y))
