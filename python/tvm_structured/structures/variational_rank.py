"""How many singular values of a matrix stand out from noise: the analytic solution of variational Bayes."""

from __future__ import annotations

import math

import numpy as np

from tvm_structured.structures.layer import Array

POINTS = 200


def variational_rank(matrix: Array) -> int:
    """The rank that empirical variational Bayes gives a matrix L x M, L <= M, with noise of unknown variance v.

    With a = L / M a singular value g is kept where x = g^2 / (M v) exceeds (1 + t) (1 + a / t), t = 2.5129 sqrt(a);
    v minimises the sum over all x of x - log x, and for the kept ones + log(1 + T) + a log(1 + T / a) - T, where
    T(x) = (x - 1 - a + sqrt((x - 1 - a)^2 - 4 a)) / 2. Source: Nakajima, Sugiyama, Babacan and Tomioka, "Global
    Analytic Solution of Fully-observed Variational Bayesian Matrix Factorization", JMLR 2013, theorems 2 and 4.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rows, columns = wide.shape
    squares = np.square(np.linalg.svd(wide.astype(np.float64), compute_uv=False))
    if squares[0] == 0:
        return 0
    squares = np.maximum(squares, 1e-12 * squares[0])  # an exact rank has no noise; its logarithm would be infinite
    ratio = rows / columns
    edge = 2.5129 * math.sqrt(ratio)
    threshold = (1 + edge) * (1 + ratio / edge)

    def objective(log_variance: float) -> float:
        x = squares / (columns * math.exp(log_variance))
        over = x[x > threshold]
        shifted = over - 1 - ratio
        kept = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * ratio, 0))) / 2
        gain = np.log1p(kept) + ratio * np.log1p(kept / ratio) - kept
        return float((x - np.log(x)).sum() + gain.sum())

    # at most L / (1 + a) values may stand out: the noise is no less than what the others leave
    most = max(1, min(rows - 1, math.ceil(rows / (1 + ratio)) - 1))
    lower = max(squares[most:].mean() / columns, 1e-15 * squares[0] / columns) if rows > 1 else squares[0] * 1e-15
    upper = squares.sum() / (rows * columns)
    left, right = math.log(lower), math.log(max(upper, lower * (1 + 1e-9)))
    for _ in range(2):  # it has several valleys: a grid over all of them, then a finer one in the deepest
        grid = np.linspace(left, right, POINTS)
        best = int(np.argmin([objective(point) for point in grid]))
        left, right = grid[max(0, best - 1)], grid[min(POINTS - 1, best + 1)]
    return int((squares > columns * math.exp(grid[best]) * threshold).sum())
