"""Fitting Toeplitz-like matrices: from the displacement, then by least squares.

The truncated displacement is exact for members, but what is nearest there is not nearest in the matrix itself. The
matrix is linear in the columns c beside fixed rows h, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tvm_structured.structures.displacement import shift_signs
from tvm_structured.structures.layer import Array
from tvm_structured.structures.truncated_svd import Triplets

LARGEST = 300  # rows and columns up to which the second step takes well under a second
ROUNDS = 3
STEPS = 10  # of conjugate gradients
EXACT = 1e-6


def fit(matrix: Array, displacement: Triplets) -> tuple[Array, Array]:
    """(columns, rows) in float64, of as many terms as there are triplets of the displacement."""
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    u, s, vh = displacement
    root = np.sqrt(s)
    columns, rows = solve_shifts((u * root).T, shape), root[:, None] * vh
    matrix = matrix.astype(np.float64)
    if max(shape) > LARGEST:
        return columns * nearest_scale(matrix, columns, rows), rows
    left, right = Wrapped.columns(shape), Wrapped.rows(shape)
    for _ in range(ROUNDS):
        fixed = right.matrices(rows)
        residue = matrix - product(left.matrices(columns), fixed)
        if np.linalg.norm(residue) <= EXACT * np.linalg.norm(matrix):
            break
        columns = columns + left_step(left, fixed, residue)
        fixed = left.matrices(columns)
        rows = rows + right_step(right, fixed, matrix - product(fixed, right.matrices(rows)))
    return columns, rows


def nearest_scale(matrix: Array, columns: Array, rows: Array) -> float:
    """The factor that brings a member nearest to the matrix: none is farther from it than zero is."""
    member = undisplaced(columns, rows, (int(matrix.shape[0]), int(matrix.shape[1])))
    return float(np.vdot(member, matrix)) / (float(np.vdot(member, member)) or 1.0)


def undisplaced(columns: Array, rows: Array, shape: tuple[int, int]) -> Array:
    """The member (out, in) of these factors in float64: O(out in rank) operations, without a transform.

    With D = sum_i g_i h_i^T, g_i = (Z_e^in - f) c_i, every row follows from the one above: M[a] Z_f = M[a - 1] - D[a].
    The first is sum_k (Z_f^T)^(in - 1 - k) sum_i A_i[0, k] h_i.
    """
    (out, inner), (e, f) = shape, shift_signs(shape)
    columns, rows = columns.astype(np.float64), rows.astype(np.float64)
    k = np.arange(inner)
    row = np.zeros(inner)
    for part in (columns[:, -k % out] * np.where(-(-k // out) % 2, e, 1)).T @ rows:
        row = np.append(row[1:], f * row[0]) + part
    turns, left = divmod(inner, out)
    power = np.concatenate([e * columns[:, out - left :], columns[:, : out - left]], axis=1) * e**turns
    member: Array = (power - f * columns).T @ rows  # D, overwritten row by row
    member[0] = row
    for a in range(1, out):
        before = member[a - 1] - member[a]
        member[a, 1:], member[a, 0] = before[:-1], f * before[-1]
    return member


def product(left: Array, right: Array) -> Array:
    """sum_i A_i B_i."""
    total: Array = (left @ right).sum(0)
    return total


def left_step(left: Wrapped, fixed: Array, residue: Array) -> Array:
    """What to add to the columns beside fixed B_i."""
    across = fixed.swapaxes(1, 2)
    return least_squares(lambda c: product(left.matrices(c), fixed), lambda m: left.folded(m @ across), residue)


def right_step(right: Wrapped, fixed: Array, residue: Array) -> Array:
    """What to add to the rows beside fixed A_i."""
    across = fixed.swapaxes(1, 2)
    return least_squares(lambda h: product(fixed, right.matrices(h)), lambda m: right.folded(across @ m), residue)


def least_squares(forward: Callable[[Array], Array], adjoint: Callable[[Array], Array], target: Array) -> Array:
    """About the v whose forward(v) is nearest to the target: conjugate gradients of the normal equations, from zero."""
    gradient = adjoint(target)
    solution, direction, size = np.zeros_like(gradient), gradient, float(np.square(gradient).sum())
    first = size
    for _ in range(STEPS):
        if size <= 1e-24 * first or size == 0:
            break
        image = forward(direction)
        step = size / float(np.square(image).sum())
        solution = solution + step * direction
        target = target - step * image
        gradient = adjoint(target)
        size, before = float(np.square(gradient).sum()), size
        direction = gradient + size / before * direction
    return solution


class Wrapped:
    """Toeplitz matrices whose entries are those of a vector, with signs where it wraps around."""

    def __init__(self, index: Array, signs: Array, length: int) -> None:
        self.index, self.signs, self.length = index, signs, length

    @classmethod
    def columns(cls, shape: tuple[int, int]) -> Wrapped:
        """(Z_e^k c)[a], an (out, in) matrix."""
        offsets = np.subtract.outer(np.arange(shape[0]), np.arange(shape[1]))
        return cls(offsets % shape[0], np.where(-(offsets // shape[0]) % 2, shift_signs(shape)[0], 1), shape[0])

    @classmethod
    def rows(cls, shape: tuple[int, int]) -> Wrapped:
        """((Z_f^T)^(in - 1 - k) h)[j], an (in, in) matrix."""
        size = shape[1]
        places = np.add.outer(size - 1 - np.arange(size), np.arange(size))
        return cls(places % size, np.where(places >= size, shift_signs(shape)[1], 1), size)

    def matrices(self, vectors: Array) -> Array:
        """(rank, length) -> (rank, rows, columns)."""
        return vectors[:, self.index] * self.signs

    def folded(self, matrices: Array) -> Array:
        """The adjoint of `matrices`."""
        flat = self.index.reshape(-1)
        return np.stack([np.bincount(flat, (matrix * self.signs).reshape(-1), self.length) for matrix in matrices])


def solve_shifts(vectors: Array, shape: tuple[int, int]) -> Array:
    """(Z_e^in - f)^-1 of each vector (.., out): Z_e is diagonal in the Fourier basis, twisted for e = -1."""
    out, inner = shape
    e, f = shift_signs(shape)
    turn = np.exp(1j * np.pi * np.arange(out) / out) if e == -1 else np.ones(out)
    eigenvalues = np.exp(-2j * np.pi * np.arange(out) / out) * (np.exp(1j * np.pi / out) if e == -1 else 1)
    solved = np.fft.ifft(np.fft.fft(vectors * turn) / (eigenvalues**inner - f)) / turn
    result: Array = solved.real
    return result
