"""Low-rank mathematics against numpy's full SVD (Eckart-Young) and finite differences, fast paths included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.errors import ModelError
from tvm_structured.structures import STRUCTURES, Budget, Conv2d, Dense, as_layer
from tvm_structured.structures.low_rank import LowRank, affordable_rank, largest_useful_rank
from tvm_structured.structures.truncated_svd import DIRECT, energy, exceeds_rank, leading_svd, left_factor, tails_of

few = settings(max_examples=25)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def product(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> np.ndarray:
    return rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))


def with_spectrum(rng: np.random.Generator, shape: tuple[int, int], s: np.ndarray) -> np.ndarray:
    """A matrix with these singular values."""
    left, right = (np.linalg.qr(rng.standard_normal((extent, len(s))))[0] for extent in shape)
    return (left * s) @ right.T


# -- meaning and projection -----------------------------------------------------------------------------


@few
@given(shapes, st.integers(0, 9), st.data())
def test_from_dense_is_the_nearest_of_its_rank(shape: tuple[int, int], seed: int, data: Any) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape)
    rank = data.draw(st.integers(1, min(shape)))
    member = LowRank.from_dense(as_layer(weight), rank=rank)
    optimum = np.sqrt((np.linalg.svd(weight, compute_uv=False)[rank:] ** 2).sum())
    assert np.linalg.norm(member.u @ member.v - weight) <= optimum + 1e-9
    assert member.error(weight) == pytest.approx(optimum / np.linalg.norm(weight), abs=1e-9)


@few
@given(shapes, st.integers(1, 5), st.integers(0, 9))
def test_apply_is_the_product_with_dense(shape: tuple[int, int], rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    member = LowRank(shape, rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1])))
    x = rng.standard_normal((2, 3, shape[1]))
    expected = x @ (member.u @ member.v).T
    np.testing.assert_allclose(member.apply(x), expected, atol=1e-11)
    in_torch = LowRank(shape, torch.tensor(member.u), torch.tensor(member.v))
    np.testing.assert_allclose(in_torch.apply(torch.tensor(x)).numpy(), expected, atol=1e-11)
    np.testing.assert_allclose(member.dense(), member.u @ member.v)


def test_gradients_reach_both_factors() -> None:
    u, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 2), (2, 5)))
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda u, v: LowRank((4, 5), u, v).apply(x), (u, v))


def test_the_singular_values_are_shared_evenly() -> None:
    weight = with_spectrum(np.random.default_rng(0), (20, 30), np.array([100.0, 4.0]))
    member = LowRank.from_dense(as_layer(weight), rank=2)
    np.testing.assert_allclose(np.linalg.norm(member.u, axis=0), [10, 2])
    np.testing.assert_allclose(np.linalg.norm(member.v, axis=1), [10, 2])


@few
@given(shapes, st.floats(0.01, 1.0), st.integers(0, 9))
def test_projection_takes_the_largest_rank_within_the_budget(shape: tuple[int, int], share: float, seed: int) -> None:
    layer = as_layer(np.random.default_rng(seed).standard_normal(shape))
    member = LowRank.project(layer, share)
    ranks = [
        r
        for r in range(1, min(shape) + 1)
        if r * sum(shape) <= share * layer.num_params and r * sum(shape) < layer.num_params
    ]
    assert (member.rank if member else None) == (ranks[-1] if ranks else None)


@few
@given(shapes, st.floats(0.0, 0.9), st.integers(0, 9))
def test_projection_takes_the_smallest_rank_within_the_error(shape: tuple[int, int], error: float, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape)
    s = np.linalg.svd(weight, compute_uv=False)
    smallest = next(r for r in range(len(s) + 1) if np.sqrt((s[r:] ** 2).sum()) <= error * np.linalg.norm(s))
    member = LowRank.project(weight, Budget(max_error=error))
    useful = max(1, smallest) <= largest_useful_rank(shape)
    assert (member.rank if member else None) == (max(1, smallest) if useful else None)


def test_a_fraction_that_is_exactly_a_rank_is_granted() -> None:
    layer = as_layer(np.random.default_rng(0).standard_normal((30, 70)))
    for rank in range(1, largest_useful_rank((30, 70)) + 1):
        assert affordable_rank(layer, Budget(max_params=rank * 100 / 2100)) in (rank, rank - 1)
        assert affordable_rank(layer, Budget(max_flops=rank * 100 / 2100 * (1 + 1e-12))) == rank


def test_contradicting_limits_give_none() -> None:
    weight = np.random.default_rng(0).standard_normal((40, 40))
    assert LowRank.project(weight, Budget(max_params=0.1, max_error=0.1)) is None
    assert LowRank.project(weight, 0.01) is None
    assert LowRank.project(np.ones((1, 9)), 0.99) is None  # rank 1 has more numbers than the row itself


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ModelError, match=r"w: rank 9 is outside 1..8"):
        LowRank.from_dense(Dense("w", np.ones((8, 9))), rank=9)
    with pytest.raises(ModelError, match="do not multiply to a 4 x 5 matrix"):
        LowRank((4, 5), np.ones((4, 2)), np.ones((3, 5)))
    with pytest.raises(ModelError, match=r"takes 5 features, got an input of shape \(2, 4\)"):
        LowRank((4, 5), np.ones((4, 2)), np.ones((2, 5))).apply(np.ones((2, 4)))


# -- detection ------------------------------------------------------------------------------------------


@few
@given(shapes, st.integers(1, 8), st.integers(0, 9))
def test_a_planted_rank_is_found_and_nothing_else(shape: tuple[int, int], rank: int, seed: int) -> None:
    weight = product(np.random.default_rng(seed), shape, rank)
    member = LowRank.detect(weight)
    true_rank = np.linalg.matrix_rank(weight, rtol=1e-6)
    if true_rank > largest_useful_rank(shape):
        assert member is None
    else:
        assert member is not None and member.rank <= true_rank and member.error(weight) <= 1e-5


def test_a_zero_weight_has_rank_one_and_no_error() -> None:
    member = LowRank.detect(np.zeros((6, 5), np.float32))
    assert member is not None and member.rank == 1 and member.error(np.zeros((6, 5))) == 0


def test_a_convolution_is_decomposed_in_its_matrix_form() -> None:
    rng = np.random.default_rng(0)
    weight = product(rng, (16, 72), 3).reshape(16, 3, 3, 8).transpose(0, 3, 1, 2).astype(np.float32)
    member = STRUCTURES["low_rank"].detect(weight)
    assert member is not None and member.rank == 3
    assert LowRank.detect(Conv2d("w", weight, groups=2)) is None


# -- weights beyond DIRECT, which no full SVD sees -------------------------------------------------------

LARGE = (DIRECT + 120, DIRECT + 300)


@pytest.mark.parametrize("rank", [1, 40, 200])
def test_a_large_weight_of_low_rank_is_found_exactly(rank: int) -> None:
    weight = product(np.random.default_rng(rank), LARGE, rank).astype(np.float32)
    member = LowRank.detect(weight)
    assert member is not None and member.rank == rank and member.error(weight) <= 1e-5


def test_a_large_weight_of_full_rank_is_not() -> None:
    rng = np.random.default_rng(0)
    assert LowRank.detect(rng.standard_normal(LARGE).astype(np.float32)) is None
    # full rank by far too much for the tolerance, but hidden under a large part of low rank
    hidden = product(rng, LARGE, 5) + 0.01 * rng.standard_normal(LARGE)
    assert LowRank.detect(hidden) is None
    member = LowRank.detect(hidden, tol=0.02)
    assert member is not None and member.rank == 5


def test_the_projection_of_a_large_weight_is_nearly_optimal() -> None:
    rng = np.random.default_rng(0)
    for s in (np.arange(1, LARGE[0] + 1) ** -0.5, np.exp(-np.arange(LARGE[0]) / 50), np.ones(LARGE[0])):
        weight = with_spectrum(rng, LARGE, s)
        member = LowRank.project(weight, 0.2)
        assert member is not None
        optimum = np.sqrt((s[member.rank :] ** 2).sum() / (s**2).sum())
        assert optimum - 1e-9 <= member.error(weight) <= 1.02 * optimum


def test_the_projection_of_a_large_weight_keeps_to_the_error() -> None:
    weight = with_spectrum(np.random.default_rng(0), LARGE, np.exp(-np.arange(LARGE[0]) / 30))
    for error in (0.3, 1e-2, 1e-4):
        member = LowRank.project(weight, Budget(max_error=error))
        assert member is not None and member.error(weight) <= error
        fewer = LowRank.from_dense(as_layer(weight), rank=member.rank - 1)
        assert fewer.error(weight) > 0.98 * error


# -- the tools ------------------------------------------------------------------------------------------


@few
@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 12), st.floats(0, 1e-3), st.integers(0, 9))
def test_exceeds_rank_is_never_wrong_when_it_says_yes(out: int, inner: int, rank: int, noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = product(rng, (out, inner), rank) + noise * rng.standard_normal((out, inner))
    s = np.linalg.svd(weight, compute_uv=False)
    for r in range(1, min(out, inner)):
        for tol in (1e-5, 1e-4, 1e-2):
            is_within = np.sqrt((s[r:] ** 2).sum()) <= tol * np.linalg.norm(s)
            assert not (is_within and exceeds_rank(weight, r, tol))


def test_exceeds_rank_recognises_random_matrices() -> None:
    rng = np.random.default_rng(0)
    for shape in ((60, 60), (300, 40), (40, 300)):
        weight = rng.standard_normal(shape).astype(np.float32)
        assert exceeds_rank(weight, largest_useful_rank(shape), 1e-5)
        assert not exceeds_rank(weight, min(shape), 1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_left_factor_is_the_left_half_of_the_svd(dtype: Any) -> None:
    matrix = with_spectrum(np.random.default_rng(0), (9, 70_000), np.linspace(9, 1, 9)).astype(dtype)
    u, s = left_factor(matrix)
    np.testing.assert_allclose(u.T @ u, np.eye(9), atol=1e-12)
    np.testing.assert_allclose(s, np.linalg.svd(matrix.astype(np.float64), compute_uv=False), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(u.T @ matrix.astype(np.float64), axis=1), s, rtol=1e-6)


def test_tails_and_energy_count_what_is_left_out() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((30, 50)).astype(np.float32)
    assert energy(matrix) == pytest.approx(float((matrix.astype(np.float64) ** 2).sum()), rel=1e-12)
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    expected = [(s[r:] ** 2).sum() for r in range(13)]
    np.testing.assert_allclose(tails_of(matrix, leading_svd(matrix, 12)), expected, rtol=1e-5)
