"""Which chain a weight is a product of: the pairs (r_1 ... r_k, s_1 ... s_k) at which it may be split.

A split after k factors with rows = r_1 ... r_k and columns = s_1 ... s_k asks that for every row number modulo
`rows` and every run of `columns` columns the block of the weight has rank 1. Splits that hold one by one hold
together, so a chain is a path from (1, 1) to (out, in) over pairs that divide each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from tvm_structured.structures.debut_chain import Chain, chain_of
from tvm_structured.structures.debut_fit import outer_products
from tvm_structured.structures.factorisation import divisors
from tvm_structured.structures.layer import Array
from tvm_structured.structures.truncated_svd import energy

Split = tuple[int, int]
SAMPLES = 4  # blocks looked at for each split
LOOKED_AT = 128  # rows and columns of a block that samples are taken from
SIDE = 8  # rows and columns of a sample: the strongest of those
SLACK = 100.0  # how much more energy than the average a sample may leave out: only what cannot be is dropped


def splits_of(shape: tuple[int, int]) -> list[Split]:
    """All pairs of divisors, smallest first."""
    return sorted((rows, columns) for rows in divisors(shape[0]) for columns in divisors(shape[1]))


def is_trivial(split: Split, shape: tuple[int, int]) -> bool:
    """Blocks of one row or one column: any weight can be split there."""
    return split[1] == 1 or split[0] == shape[0]


def sampled_residues(matrix: Array, splits: Iterable[Split], seed: int = 0) -> Array:
    """(splits, 2): the energy that outer products leave out of samples of each split's blocks, and their size."""
    rng = np.random.default_rng(seed)
    splits = list(splits)
    samples = np.zeros((len(splits), SAMPLES, SIDE, SIDE))
    sizes = np.zeros(len(splits))
    for number, (rows, columns) in enumerate(splits):
        for k in range(SAMPLES):
            sample = strongest(matrix, rows, columns, rng)
            samples[number, k, : sample.shape[0], : sample.shape[1]] = sample
            sizes[number] += sample.size
    values = np.linalg.svd(samples, compute_uv=False)
    return np.stack([np.square(values[..., 1:]).sum((1, 2)), sizes], axis=1)


def strongest(matrix: Array, rows: int, columns: int, rng: np.random.Generator) -> Array:
    """The strongest rows and columns of (part of) a random block of a split."""
    out, inner = matrix.shape
    first_row, first_column = int(rng.integers(rows)), int(rng.integers(inner // columns)) * columns
    some_rows = rng.choice(out // rows, min(LOOKED_AT, out // rows), replace=False) * rows + first_row
    some_columns = rng.choice(columns, min(LOOKED_AT, columns), replace=False) + first_column
    block = matrix[np.ix_(some_rows, some_columns)].astype(np.float64)
    squares = np.square(block)
    top_rows = np.argsort(squares.sum(1))[-SIDE:]
    sample: Array = block[np.ix_(top_rows, np.argsort(squares[top_rows].sum(0))[-SIDE:])]
    return sample


def possible_splits(matrix: Array, tol: float) -> set[Split]:
    """Splits that samples do not exclude for a weight within relative error `tol`."""
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    splits = splits_of(shape)
    asked = [split for split in splits if not is_trivial(split, shape)]
    possible = {split for split in splits if is_trivial(split, shape)}
    if asked:
        residues = sampled_residues(matrix, asked)
        allowed = SLACK * tol**2 * energy(matrix) / matrix.size * residues[:, 1]
        possible |= {split for split, fits in zip(asked, residues[:, 0] <= allowed, strict=True) if fits}
    return possible


def residue(matrix: Array, split: Split) -> float:
    """The relative error of the nearest matrix that can be split there."""
    rows, columns = split
    out, inner = matrix.shape
    total, kept = 0.0, 0.0
    by_blocks = matrix.reshape(out // rows, rows, inner // columns, columns)
    for first in range(inner // columns):
        block = by_blocks[:, :, first].transpose(1, 0, 2).astype(np.float64)
        total += float(np.square(block).sum())
        kept += float(np.square(outer_products(block)[0]).sum())
    return float(np.sqrt(max(0.0, 1 - kept / (total or 1.0))))


def smallest_path(shape: tuple[int, int], possible: set[Split]) -> Chain:
    """The chain with the fewest numbers: a step from (rows, columns) to (rows', columns') has rows' * in / columns."""
    order = sorted(possible)
    best: dict[Split, tuple[int, tuple[Split, ...]]] = {(1, 1): (0, ((1, 1),))}
    for split in order:
        if split == (1, 1):
            continue
        steps = [
            (best[before][0] + split[0] * (shape[1] // before[1]), (*best[before][1], split))
            for before in order
            if before in best and before != split and split[0] % before[0] == 0 and split[1] % before[1] == 0
        ]
        best[split] = min(steps)
    path = best[shape][1]
    pairs = list(itertools.pairwise(path))
    return chain_of([b[0] // a[0] for a, b in pairs], [b[1] // a[1] for a, b in pairs])


def splits_on(chain: Chain) -> list[Split]:
    """The inner splits of a chain."""
    rows = list(itertools.accumulate((factor.r for factor in chain[:-1]), lambda a, b: a * b))
    columns = list(itertools.accumulate((factor.s for factor in chain[:-1]), lambda a, b: a * b))
    return list(zip(rows, columns, strict=True))
