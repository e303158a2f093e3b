"""Toeplitz-like matrices against the classic displacement formula, and the scan that names families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

import tvm_structured as ts
from tvm_structured.errors import ModelError
from tvm_structured.structures import as_layer
from tvm_structured.structures.displacement import displaced, displacement_rank, displacement_scan, shift_signs
from tvm_structured.structures.toeplitz_like import ToeplitzLike

few = settings(max_examples=25)
RNG = np.random.default_rng(0)


def circulant(v: np.ndarray, f: float) -> np.ndarray:
    """Z_f(v): the first column is v, entries above the diagonal are times f."""
    full = linalg.circulant(v)
    return np.where(np.tri(len(v), dtype=bool), full, f * full)


def planted(size: int, rank: int, seed: int = 0) -> np.ndarray:
    """1/2 sum Z_1(g) Z_-1(J h), whose displacement is sum g h^T."""
    rng = np.random.default_rng(seed)
    pairs = [(rng.standard_normal(size), rng.standard_normal(size)) for _ in range(rank)]
    return sum(0.5 * circulant(g, 1) @ circulant(h[::-1], -1) for g, h in pairs)


def shift(size: int, f: float) -> np.ndarray:
    matrix = np.eye(size, k=-1)
    matrix[0, -1] += f
    return matrix


# -- mathematics ----------------------------------------------------------------------------------------


@few
@given(st.integers(1, 20), st.integers(1, 20))
def test_displacement_is_the_product_with_shifts_and_can_be_undone(rows: int, columns: int) -> None:
    matrix = np.random.default_rng([rows, columns]).standard_normal((rows, columns))
    e, f = shift_signs((rows, columns))
    left, right = shift(rows, e), shift(columns, f)
    np.testing.assert_allclose(displaced(matrix), left @ matrix - matrix @ right, atol=1e-12)
    gaps = np.abs(np.subtract.outer(np.linalg.eigvals(left), np.linalg.eigvals(right)))
    assert gaps.min() > 1e-3, "an eigenvalue in common: the displacement would not determine the matrix"


@few
@given(st.integers(3, 24), st.integers(1, 4), st.integers(0, 99))
def test_the_classic_formula_gives_members(size: int, rank: int, seed: int) -> None:
    matrix = planted(size, min(rank, size), seed)
    member = ToeplitzLike.from_dense(as_layer(matrix), rank=min(rank, size))
    assert member.error(matrix) <= 1e-10
    x = np.random.default_rng(seed).standard_normal((3, size))
    np.testing.assert_allclose(member.apply(x), x @ matrix.T, atol=1e-9 * np.abs(matrix).max() * size)


@few
@given(st.integers(3, 30), st.integers(3, 30), st.integers(0, 99))
def test_rectangular_toeplitz_matrices_have_rank_two(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = linalg.toeplitz(rng.standard_normal(rows), rng.standard_normal(columns))
    assert ToeplitzLike.from_dense(as_layer(matrix), rank=2).error(matrix) <= 1e-9


@few
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
def test_dense_by_the_displacement_is_dense_by_transforms(rows: int, columns: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    member = ToeplitzLike((rows, columns), rng.standard_normal((rank, rows)), rng.standard_normal((rank, columns)))
    expected = member.apply(np.eye(columns)).T
    np.testing.assert_allclose(member.dense(), expected, atol=1e-11 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("shape", [(40, 56), (320, 301)])
def test_no_projection_is_farther_than_zero_and_all_ranks_share_a_decomposition(shape: Any) -> None:
    layer = as_layer(np.random.default_rng(3).standard_normal(shape).astype(np.float32))
    members = list(ToeplitzLike.members(layer))
    assert [member.rank for member in members] == [1, 2, 3, 4]
    for member in members:
        assert member.error(layer) <= 1
        again = ToeplitzLike.from_dense(layer, rank=member.rank)
        assert again.error(layer) == pytest.approx(member.error(layer), rel=1e-4)
    nearest = ToeplitzLike.project(layer, 0.9)
    assert nearest is not None and nearest.error(layer) == min(member.error(layer) for member in members)


def test_ranks_outside_one_to_four_are_refused() -> None:
    for rank in (0, 5):
        with pytest.raises(ModelError, match=r"1\.\.4"):
            ToeplitzLike.from_dense(as_layer(np.eye(8)), rank=rank)
    member = ToeplitzLike.from_dense(as_layer(np.eye(8)), rank=1)
    with pytest.raises(ModelError, match="8 features"):
        member.apply(np.ones((2, 7)))
    with pytest.raises(ModelError, match="shapes"):
        ToeplitzLike((8, 9), member.columns, member.rows)


# -- detection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [32, 100, 257])
def test_planted_ranks_are_found(size: int, rank: int, dtype: Any) -> None:
    matrix = planted(size, rank).astype(dtype)
    found = ToeplitzLike.detect(matrix)
    assert found is not None and found.rank == rank and found.error(matrix) <= 1e-5


def test_inverses_and_products_of_toeplitz_matrices_are_found() -> None:
    toeplitz = linalg.toeplitz(RNG.standard_normal(60), RNG.standard_normal(60)) + 10 * np.eye(60)
    other = linalg.toeplitz(RNG.standard_normal(60), RNG.standard_normal(60))
    for matrix in (np.linalg.inv(toeplitz), toeplitz @ other):
        found = ToeplitzLike.detect(matrix)
        assert found is not None and found.rank <= 4 and found.error(matrix) <= 1e-5


def test_five_is_too_many_and_noise_hides_a_member() -> None:
    assert ToeplitzLike.detect(planted(64, 5)) is None
    matrix = planted(64, 2)
    noisy = matrix + 1e-3 * matrix.std() * RNG.standard_normal(matrix.shape)
    assert ToeplitzLike.detect(noisy) is None
    assert ToeplitzLike.detect(noisy, tol=1e-2) is not None


def test_layers_too_long_for_the_transforms_are_not_taken() -> None:
    assert not ToeplitzLike.takes(as_layer(np.ones((4, 1 << 14), np.float32)))


# -- the scan -------------------------------------------------------------------------------------------

NODES = np.linspace(-1, 1, 20)
FAMILIES = {
    "circulant": linalg.circulant(RNG.standard_normal(24)),
    "Toeplitz": linalg.toeplitz(RNG.standard_normal(24), RNG.standard_normal(30)),
    "Hankel": linalg.hankel(RNG.standard_normal(24), RNG.standard_normal(30)),
    "Toeplitz-like": planted(24, 3),
    "Hankel-like": planted(24, 3)[:, ::-1],
    "Vandermonde": np.vander(NODES, 12, increasing=True),
    "transposed Vandermonde": np.vander(NODES, 12, increasing=True).T,
    "Cauchy": 1 / np.add.outer(RNG.uniform(1, 2, 20), RNG.uniform(0, 3, 17)),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_scan_names_the_family(name: str, dtype: Any) -> None:
    found = displacement_scan(FAMILIES[name].astype(dtype))
    assert found is not None and found.family == name
    assert found.rank == {"circulant": 1, "Toeplitz": 2, "Hankel": 2, "Toeplitz-like": 3, "Hankel-like": 3}.get(name, 1)


def test_random_low_rank_and_tiny_matrices_have_no_family() -> None:
    for matrix in (RNG.standard_normal((40, 30)), RNG.standard_normal((300, 200)), np.zeros((20, 20)), np.eye(4)):
        assert displacement_scan(matrix) is None
    outer = np.outer(RNG.standard_normal(40), RNG.standard_normal(30))  # two shifts of one vector each: rank 2
    assert displacement_rank(outer, 1e-5) == 2


def test_inspect_names_families_that_no_structure_holds() -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(30, 24, bias=False), torch.nn.ReLU(), torch.nn.Linear(24, 16))
    model[0].weight.data = torch.tensor(FAMILIES["Hankel"].astype(np.float32))
    inspection = ts.inspect(model, inputs=(torch.ones(1, 30),))
    first, second = inspection["0.weight"], inspection["2.weight"]
    assert str(first.displacement) == "Hankel (displacement rank 2)" and second.displacement is None
    assert "Hankel" in str(inspection) and second.has == "-"
