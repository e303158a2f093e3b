"""Fitting a chain of butterfly factors: peeling them off one by one, and alternating least squares.

Grids are factors as arrays (blocks, r, s, t). A product of neighbouring factors is again a grid, so the whole weight
is one, (blocks of the last factor, out / blocks, in / blocks, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_structured.structures.arrays import permuted
from tvm_structured.structures.debut_chain import Chain
from tvm_structured.structures.layer import Array

EIGEN = 24  # Gram matrices up to this size go to LAPACK, larger ones are squared again and again
SQUARINGS = 8  # the leading direction is then 2^8 power steps ahead
SLICE = 1 << 22  # numbers that are split at a time


def merge_grids(after: Any, before: Any) -> Any:
    """The product of two neighbouring factors as one grid; numpy or torch, gradients flow.

    M[b, (i', i), (j', j), d] = after[b, i', j', (i, d)] * before[(b, j'), i, j, d].
    """
    blocks, r_after, s_after, _ = after.shape
    _, r, s, t = before.shape
    left = permuted(after.reshape(blocks, r_after, s_after, r, t), 0, 1, 3, 2, 4)
    right = permuted(before.reshape(blocks, s_after, r, s, t), 0, 2, 1, 3, 4)
    product = left[:, :, :, :, None] * right[:, None]
    return product.reshape(blocks, r_after * r, s_after * s, t)


def merge_all(grids: Sequence[Any]) -> Any:
    """The product of neighbouring factors, first applied first, as one grid."""
    merged = grids[0]
    for grid in grids[1:]:
        merged = merge_grids(grid, merged)
    return merged


def peel(matrix: Array, chain: Chain) -> list[Array]:
    """Factors of a nearby member of the chain (float64): exact for a member.

    For fixed (j_N ... j_{k+1}) and (i_k ... i_1) the rest of a member is an outer product, of a vector over the other
    i and one over j_k: its nearest such is the k-th factor's share, with unit vectors over j_k. Since those are
    isometries, errors add as in TT-SVD: at most sqrt(N - 1) times as far as the nearest member, nearest for N = 2.
    (Hierarchical factorisation: Zheng, Riccietti and Gribonval 2023; the bound as in Le et al. 2024.)
    """
    rest, grids = as_grid(matrix, chain), []
    for factor in chain[:-1]:
        rest, grid = peel_one(rest, factor.r, factor.s)
        grids.append(grid)
    return balanced([*grids, np.asarray(rest, np.float64)])


def as_grid(matrix: Array, chain: Chain) -> Array:
    """The weight as a grid; what lies outside the diagonal blocks of the last factor is left out."""
    blocks = chain[-1].blocks
    out, inner = matrix.shape
    if blocks == 1:
        return matrix.reshape(1, out, inner, 1)
    by_blocks = matrix.reshape(blocks, out // blocks, blocks, inner // blocks)
    return by_blocks[np.arange(blocks), :, np.arange(blocks)][..., None]


def peel_one(rest: Array, r: int, s: int) -> tuple[Array, Array]:
    """(rest', grid) of one factor r x s, in float64."""
    blocks, rows, columns, t = rest.shape
    split = rest.reshape(blocks, rows // r, r, columns // s, s, t)
    left = np.empty((blocks, rows // r, columns // s, r, t))
    grid = np.empty((blocks, columns // s, r, s, t))
    step = max(1, SLICE // (blocks * rows * s * t))
    for first in range(0, columns // s, step):
        some = slice(first, first + step)
        piece = np.ascontiguousarray(split[:, :, :, some].transpose(0, 3, 2, 5, 1, 4), np.float64)
        u, v = outer_products(piece)  # over (block, j', i, d)
        left[:, :, some] = u.transpose(0, 4, 1, 2, 3)
        grid[:, some] = v.transpose(0, 1, 2, 4, 3)
    return left.reshape(blocks, rows // r, columns // s, r * t), grid.reshape(-1, r, s, t)


def outer_products(stack: Array) -> tuple[Array, Array]:
    """u (..., rows), v (..., columns) with u v^T nearest to each matrix (..., rows, columns); v has norm 1."""
    rows, columns = stack.shape[-2:]
    if columns == 1:
        return stack[..., 0], np.ones((*stack.shape[:-2], 1))
    if rows == 1:
        v = stack[..., 0, :]
    else:
        shorter = min(rows, columns)
        rough = stack if shorter <= EIGEN else reduced(stack)
        across = np.swapaxes(rough, -1, -2)
        u = leading_vectors(across @ rough if columns <= rows else rough @ across)
        if columns <= rows:
            u = (rough @ u[..., None])[..., 0]
        v = (u[..., None, :] @ stack)[..., 0, :]  # one more power step: exact where the matrix is an outer product
    norm = np.linalg.norm(v, axis=-1, keepdims=True)
    v = np.where(norm > 0, v / np.where(norm > 0, norm, 1.0), columns**-0.5)
    return (stack @ v[..., None])[..., 0], v


def reduced(stack: Array) -> Array:
    """In float32, each matrix's largest entry about 1: enough to tell the leading direction, in half the time."""
    peak = np.maximum(stack.max((-1, -2), keepdims=True), -stack.min((-1, -2), keepdims=True))
    return (stack / np.where(peak > 0, peak, 1.0)).astype(np.float32)


def leading_vectors(grams: Array) -> Array:
    """The leading eigenvectors of symmetric positive semi-definite matrices (..., n, n)."""
    if grams.shape[-1] <= EIGEN:
        leading: Array = np.linalg.eigh(grams)[1][..., -1]
        return leading
    power = grams
    for _ in range(SQUARINGS):
        scale = np.trace(power, axis1=-2, axis2=-1)[..., None, None]
        power = power / np.where(scale > 0, scale, 1.0)
        power = power @ power
    longest = np.square(power).sum(-2).argmax(-1)
    column: Array = np.take_along_axis(power, longest[..., None, None], -1)[..., 0]
    return column


def balanced(grids: list[Array]) -> list[Array]:
    """The same product, with factors of equal norm."""
    norms = np.array([np.linalg.norm(grid) for grid in grids])
    if not norms.all():
        return grids
    common = np.exp(np.log(norms).mean())
    return [grid * (common / norm) for grid, norm in zip(grids, norms, strict=True)]


def sweep(matrix: Array, chain: Chain, grids: list[Array]) -> list[Array]:
    """One sweep of alternating least squares: every factor in turn the best one beside the others.

    The entries of a factor meet different entries of the weight, so each is a quotient of inner products:
    F[b, i, j, d] = <W, L R> / (|L|^2 |R|^2) over the rows and columns that the product L R of the others covers.
    """
    whole, grids = as_grid(matrix, chain).astype(np.float64)[..., 0], list(grids)
    blocks = whole.shape[0]
    for k, factor in enumerate(chain):
        left = merge_all(grids[k + 1 :]) if k + 1 < len(chain) else np.ones((blocks, 1, 1, factor.r * factor.t))
        right = merge_all(grids[:k]) if k else np.ones((factor.q, 1, 1, 1))
        above, before = left.shape[1:3]
        lower = right.shape[2]
        w = whole.reshape(blocks, above, factor.r, factor.t, before, factor.s, lower)
        left = left.reshape(blocks, above, before, factor.r, factor.t)
        right = right.reshape(blocks, before, factor.s, factor.t, lower)
        projected = np.einsum("bhidgkl,bgkdl->bhidgk", w, right)
        found = np.einsum("bhidgk,bhgid->bgikd", projected, left)
        norms = np.einsum("bgid,bgkd->bgikd", np.square(left).sum(1), np.square(right).sum(-1))
        found = np.divide(found, norms, out=np.zeros_like(found), where=norms > 0)
        grids[k] = found.reshape(-1, factor.r, factor.s, factor.t)
    return balanced(grids)
