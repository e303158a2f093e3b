"""Truncated SVDs of matrices too large for a full one: subspace iteration, Gram matrices and a rank test."""

from __future__ import annotations

import numpy as np

from tvm_structured.structures.layer import Array

DIRECT = 768  # up to this many rows or columns a full SVD takes well under a second
LARGEST_GRAM = 1024  # up to this many rows `left_factor` does
POWER_STEPS = 3
FLOAT32_FLOOR = 1e-6  # tolerances below need float64 arithmetic

Triplets = tuple[Array, Array, Array]  # U (rows, k), singular values (k,), V^T (k, columns)


def svd(matrix: Array) -> Triplets:
    """Thin SVD in the precision of the weight, but at least float32."""
    return np.linalg.svd(matrix.astype(np.result_type(matrix.dtype, np.float32)), full_matrices=False)


def leading_svd(matrix: Array, rank: int, power_steps: int = POWER_STEPS) -> Triplets:
    """The first `rank` singular triplets: exact, or by subspace iteration where a full SVD would take minutes.

    The iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) serves matrices with more than `DIRECT` rows
    and columns and ranks up to a quarter of them. It gives exact triplets where the weight has that rank, and
    otherwise an error within about 1 % of the optimum: worst for flat spectra, which nobody should truncate.
    """
    smaller = min(matrix.shape)
    if smaller <= DIRECT or rank > smaller // 4:
        u, s, vh = svd(matrix)
        return u[:, :rank], s[:rank], vh[:rank]
    basis = find_range(matrix, rank + max(16, rank // 8), power_steps)
    return svd_within(basis, matrix, rank)


def svd_within(basis: Array, matrix: Array, rank: int) -> Triplets:
    """The first triplets of Q Q^T matrix, for a basis Q of orthonormal columns."""
    small = basis.T @ matrix
    # the SVD of a wide matrix through its triangular factor: L = R^T is square
    q, r = np.linalg.qr(small.T)
    u, s, vh = np.linalg.svd(r.T)
    return basis @ u[:, :rank], s[:rank], vh[:rank] @ q.T


def find_range(matrix: Array, width: int, power_steps: int = 1) -> Array:
    """Orthonormal columns (rows, width) that nearly span the leading left singular vectors."""
    width = min(width, *matrix.shape)
    work = np.result_type(matrix.dtype, np.float32)
    matrix = matrix.astype(work, copy=False)
    start = np.random.default_rng(width).standard_normal((matrix.shape[1], width)).astype(work)
    basis = np.linalg.qr(matrix @ start)[0]
    for _ in range(power_steps):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    return basis


def exceeds_rank(matrix: Array, rank: int, tol: float) -> bool:
    """True only if no matrix of that rank is within relative Frobenius error `tol`; False decides nothing.

    Of k > rank columns, k - rank singular values remain outside: the error is at least sqrt(k - rank) times
    the smallest singular value of those columns, which a Cholesky factorisation of their shifted Gram matrix
    bounds from below. Far cheaper than any singular value.
    """
    rows, columns = matrix.shape
    if rows < columns:
        return exceeds_rank(matrix.T, rank, tol)
    count = rank + max(8, rank // 8)
    if count > columns:
        count = columns
    if count <= rank:
        return False
    rng = np.random.default_rng(rank)
    chosen = np.sort(rng.permutation(columns)[:count])
    # a quarter more rows than columns keep the smallest singular value well above any tolerance; leaving out the
    # others only lowers the bound
    kept = np.sort(rng.permutation(rows)[: count + count // 4])
    part = matrix[np.ix_(kept, chosen)].astype(np.float64)
    gram = part.T @ part
    # the second term stays clear of the rounding of the Gram matrix and of its factorisation
    bound = 1.1 * tol**2 * energy(matrix) / (count - rank) + 4e-15 * count * float(np.trace(gram))
    gram[np.diag_indices(count)] -= bound
    try:
        np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return False
    return True


def left_factor(matrix: Array) -> tuple[Array, Array]:
    """(U, s) of a wide matrix in float64, a slice that fits the cache at a time.

    Weights of at most float32 go through the Gram matrix: singular values below 1e-8 of the largest are lost,
    which such a weight does not hold either. For float64 the slices are reduced by QR.
    """
    rows, columns = matrix.shape
    width = max(4 * rows, 1 << 15)
    slices = (matrix[:, first : first + width].astype(np.float64) for first in range(0, columns, width))
    if matrix.dtype != np.float64:
        gram = np.zeros((rows, rows))
        for piece in slices:
            gram += piece @ piece.T
        squares, u = np.linalg.eigh(gram)
        return u[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0.0))
    triangle = np.zeros((0, rows))
    for piece in slices:
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, piece.T]), mode="r"))
    u, s, _ = np.linalg.svd(triangle.T, full_matrices=False)
    return u, s


def energy(array: Array) -> float:
    """The squared Frobenius norm, summed in float64 without a float64 copy."""
    flat = (array.T if array.flags.f_contiguous else array).reshape(-1)
    return sum(float(np.square(flat[i : i + (1 << 20)], dtype=np.float64).sum()) for i in range(0, flat.size, 1 << 20))


def tail_energies(squares: Array) -> Array:
    """tails[r]: the sum of squared singular values that rank r leaves out."""
    return np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])


def tails_of(matrix: Array, triplets: Triplets) -> Array:
    """tails[r]: the squared norm that the first r triplets leave out, r = 0 ... their number."""
    u, s, vh = triplets
    # by subtraction: the difference of two energies is blind to relative errors below 1e-4 in float32
    left_out = 0.0 if s.size == min(matrix.shape) else energy(matrix - (u * s) @ vh)
    return tail_energies(s.astype(np.float64) ** 2) + left_out
