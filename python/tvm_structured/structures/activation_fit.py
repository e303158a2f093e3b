"""Members whose outputs are nearest on given inputs: min E ||(W - W') x||^2 = tr((W - W') C (W - W')^T), C = E[x x^T].

Closed forms: low rank is a truncated SVD of W C^(1/2); for block-circulant matrices the normal equations are circulant
in blocks, so a transform leaves one small system for every frequency.
"""

from __future__ import annotations

import numpy as np

from tvm_structured.errors import ModelError
from tvm_structured.structures.circulant_pattern import Blocks
from tvm_structured.structures.layer import Array, Layer

DAMPING = 1e-4  # of the mean square of an input: inputs that never occur leave their weights where they are
LARGEST_SYSTEM = 4096  # unknowns of one dense system: 128 MiB


def checked_moments(layer: Layer, moments: Array) -> Array:
    """C in float64, symmetric, damped. Raises ModelError for another shape and for what cannot be second moments."""
    inner = layer.matrix.shape[1]
    c = np.asarray(moments, np.float64)
    if c.shape != (inner, inner) or not np.isfinite(c).all() or np.diag(c).min() < 0:
        raise ModelError(
            f"{layer.name}: second moments of {inner} inputs are a finite ({inner}, {inner}) array, got {c.shape}"
        )
    damped: Array = (c + c.T) / 2
    damped[np.diag_indices(inner)] += DAMPING * (float(np.diag(c).mean()) or 1.0)
    return damped


def output_error(difference: Array, matrix: Array, c: Array) -> float:
    """sqrt(E ||D x||^2 / E ||W x||^2)."""

    def energy(w: Array) -> float:
        return float(np.einsum("ij,ij->", w @ c, w))

    return float(np.sqrt(max(energy(difference), 0.0) / (energy(matrix) or 1.0)))


def nearest_low_rank(matrix: Array, c: Array, rank: int) -> tuple[Array, Array]:
    """U (out, r) and V (r, in) of the best product: with C = L L^T, U S Z^T = svd_r(W L) and V = Z^T L^-1."""
    root = np.linalg.cholesky(c)
    u, s, z = np.linalg.svd(matrix.astype(np.float64) @ root, full_matrices=False)
    half = np.sqrt(s[:rank])
    return u[:, :rank] * half, np.linalg.solve(root.T, (half[:, None] * z[:rank]).T).T


def nearest_circulant(matrix: Array, c: Array, blocks: Blocks, start: Array) -> Array:
    """The defining vectors (p, Q, n) of the best block-circulant matrix, Q = taps * columns.

    With P_a the map from a block row's vectors to its row a, row a is P_a^T c_i and sum_a P_a C P_a^T c_i =
    sum_a P_a C w_a. Over all n rows the left side depends on differences of positions only: a circular convolution.
    The last block row, where it is cut, has its own system; beyond `LARGEST_SYSTEM` it stays at `start`.
    """
    _, q, n = blocks.factor_shape
    full, height = matrix.shape[0] // n, matrix.shape[0] % n
    wide = in_blocks(c, blocks, axis=1)  # (in, Q, n)
    c = in_blocks(np.moveaxis(wide, 0, -1), blocks, axis=2)  # (Q, n, Q, n), the columns' blocks first
    right = np.einsum("ijkl,akl->aij", c, in_blocks(matrix.astype(np.float64), blocks, axis=1), optimize=True)
    found = np.array(start, np.float64)
    step = np.arange(n)
    if full:
        # g[j, l, s] = sum_e C[(j, e), (l, e + s)]
        g = sum(np.roll(c[:, e], -e, axis=-1) for e in range(n))
        sides = gathered(right[: full * n].reshape(full, n, q, n), step)
        spectra = np.fft.rfft(g).transpose(2, 0, 1)
        solved = np.linalg.solve(regular(spectra), np.fft.rfft(sides).transpose(2, 1, 0))
        found[:full] = np.fft.irfft(solved.transpose(2, 1, 0), n=n)
    if height and q * n <= LARGEST_SYSTEM:
        left = np.zeros((q, n, q, n))
        for a in range(height):
            turn = (a - step) % n
            left += c[:, turn][:, :, :, turn]
        side = gathered(right[full * n :][None], step[:height]).reshape(-1)
        found[-1] = np.linalg.solve(regular(left.reshape(q * n, q * n)), side).reshape(q, n)
    return found


def in_blocks(array: Array, blocks: Blocks, axis: int) -> Array:
    """One axis of `in` entries as (taps * columns, n), every tap zero-padded to whole blocks."""
    shape = array.shape
    taps = array.reshape(*shape[:axis], blocks.taps, blocks.width, *shape[axis + 1 :])
    padding = [(0, 0)] * taps.ndim
    padding[axis + 1] = (0, blocks.columns * blocks.length - blocks.width)
    return np.pad(taps, padding).reshape(*shape[:axis], -1, blocks.length, *shape[axis + 1 :])


def gathered(rows: Array, steps: Array) -> Array:
    """(i, a, j, n) -> (i, j, d): the sum over a of entry (a - d) mod n."""
    n = rows.shape[-1]
    index = np.arange(n)
    total: Array = np.zeros((rows.shape[0], *rows.shape[2:]))
    for a in steps:
        total += rows[:, a][..., (a - index) % n]
    return total


def regular(systems: Array) -> Array:
    """Hermitian systems with a little on the diagonal: padding leaves some of them without any weight."""
    n = systems.shape[-1]
    scale = np.abs(np.einsum("...ii->...i", systems)).max()
    return systems + (1e-12 * scale or 1.0) * np.eye(n)
