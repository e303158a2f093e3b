"""TT-SVD: the cores of a matrix, unfolding by unfolding (Oseledets 2011, algorithm 1).

The k-th unfolding of a matrix has the rows (i_1 j_1 ... i_k j_k) and the columns of the rest; its rank is the
k-th rank of the train. It depends only on a = m_1 ... m_k and b = n_1 ... n_k: row (i, j) is the block (i, j)
of the matrix cut into a x b blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tvm_structured.structures.layer import Array
from tvm_structured.structures.truncated_svd import (
    LARGEST_GRAM,
    energy,
    leading_svd,
    left_factor,
    tail_energies,
    tails_of,
)

Modes = tuple[int, ...]


def unfolding(matrix: Array, a: int, b: int) -> Array:
    """(a * b, the rest): one row for every block of the matrix cut into a x b blocks."""
    out, inner = matrix.shape
    return matrix.reshape(a, out // a, b, inner // b).swapaxes(1, 2).reshape(a * b, -1)


def unfolded(matrix: Array, out_modes: Modes, in_modes: Modes) -> Array:
    """The matrix as a flat array over (i_1, j_1, i_2, j_2, ...)."""
    order = [axis for k in range(len(out_modes)) for axis in (k, len(out_modes) + k)]
    return np.ascontiguousarray(matrix.reshape(*out_modes, *in_modes).transpose(order)).reshape(-1)


def tt_svd(
    matrix: Array, out_modes: Modes, in_modes: Modes, max_ranks: Sequence[int], eps: float = 0.0
) -> tuple[Array, ...]:
    """Cores of at most the given ranks (d - 1 of them), whose total relative error stays within `eps` where those
    ranks allow it: every unfolding is truncated at eps * ||W|| / sqrt(d - 1). The norm is shared evenly.
    """
    work = np.result_type(matrix.dtype, np.float32)
    rest = unfolded(matrix, out_modes, in_modes).astype(work, copy=False)
    norm = math.sqrt(energy(rest))
    depth = len(out_modes)
    allowance = eps * norm / math.sqrt(max(1, depth - 1))
    cores, rank = [], 1
    for k in range(depth - 1):
        rest = rest.reshape(rank * out_modes[k] * in_modes[k], -1)
        left, rest = truncate(rest, max_ranks[k], allowance)
        cores.append(left.reshape(rank, out_modes[k], in_modes[k], -1))
        rank = int(left.shape[1])
    cores.append(rest.reshape(rank, out_modes[-1], in_modes[-1], 1))
    share = norm ** (1 / depth) or 1.0
    scaled = [core * share for core in cores[:-1]] + [cores[-1] / share ** (depth - 1)]
    return tuple(np.ascontiguousarray(core.astype(matrix.dtype)) for core in scaled)


def truncate(matrix: Array, max_rank: int, allowance: float) -> tuple[Array, Array]:
    """U (rows, r), orthonormal, and U^T matrix, r the smallest rank that leaves out at most `allowance` (Frobenius)."""
    limit = min(max_rank, *matrix.shape)
    rows, columns = matrix.shape

    def chosen(tails: Array) -> int:
        within = np.flatnonzero(tails <= allowance**2)
        return int(max(1, min(limit, within[0] if within.size else limit)))

    if rows <= min(columns, LARGEST_GRAM):
        u, s = left_factor(matrix)
        u = u[:, : chosen(tail_energies(s**2))].astype(matrix.dtype)
    elif columns <= LARGEST_GRAM:
        v, s = left_factor(matrix.T)
        rank = chosen(tail_energies(s**2))
        scale = np.maximum(s[:rank], np.finfo(np.float64).tiny)
        return matrix @ (v[:, :rank] / scale).astype(matrix.dtype), (v[:, :rank] * scale).T.astype(matrix.dtype)
    else:
        triplets = leading_svd(matrix, limit)
        u = triplets[0][:, : chosen(tails_of(matrix, triplets) if allowance else np.full(1, np.inf))]
    return u, u.T @ matrix


def unfolding_tails(matrix: Array, a: int, b: int, max_rank: int) -> Array:
    """tails[r], r = 0 ... : the squared norm that rank r leaves out of an unfolding. Ranks go up to
    `max_rank`, and for unfoldings with more than 1024 rows and columns to a quarter of those."""
    rows = unfolding(matrix, a, b)
    if rows.shape[0] > rows.shape[1]:
        rows = rows.T
    smaller = rows.shape[0]
    if smaller <= LARGEST_GRAM:
        return tail_energies(left_factor(rows)[1] ** 2)[: max_rank + 1]
    return tails_of(rows, leading_svd(rows, min(max_rank, smaller // 4)))
