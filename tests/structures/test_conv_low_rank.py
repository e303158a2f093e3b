"""Spatial low rank and Tucker-2 of convolutions: definitions, optimality, ranks, budgets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.errors import ModelError
from tvm_structured.structures import Budget, Conv2d, Dense, as_layer
from tvm_structured.structures.spatial_low_rank import SpatialLowRank
from tvm_structured.structures.tucker import Tucker
from tvm_structured.structures.variational_rank import variational_rank

few = settings(max_examples=20)
kernels = st.sampled_from([(3, 3), (1, 3), (5, 1), (2, 4)])


def random_weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def planted_tucker(out: int, inner: int, kernel: tuple[int, int], ranks: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal((out, ranks[0])), rng.standard_normal((ranks[1], inner))
    return np.einsum("op,pqyx,qi->oiyx", u, rng.standard_normal((*ranks, *kernel)), v)


def planted_spatial(out: int, inner: int, kernel: tuple[int, int], rank: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    horizontal, vertical = rng.standard_normal((out, kernel[1], rank)), rng.standard_normal((rank, kernel[0], inner))
    return np.einsum("oxr,ryi->oiyx", horizontal, vertical)


# -- meaning --------------------------------------------------------------------------------------------


@few
@given(st.integers(2, 9), st.integers(2, 9), kernels, st.integers(0, 99))
def test_the_steps_are_the_convolution_with_the_dense_weight(out: int, inner: int, kernel: Any, seed: int) -> None:
    layer = as_layer(random_weight(out, inner, *kernel, seed=seed))
    for member in (SpatialLowRank.from_dense(layer, rank=2), Tucker.from_dense(layer, ranks=(2, 1))):
        weight = np.ascontiguousarray(layer.with_matrix(member.dense()).weight)
        x = random_weight(2, inner, 7, 8, seed=seed + 1)
        expected = torch.conv2d(torch.from_numpy(x), torch.from_numpy(weight)).numpy()
        np.testing.assert_allclose(member.apply(x), expected, atol=1e-10)


def test_parameters_are_those_of_the_thin_convolutions() -> None:
    layer = as_layer(random_weight(16, 12, 3, 5))
    assert SpatialLowRank.from_dense(layer, rank=4).num_params == 4 * (3 * 12 + 5 * 16)
    assert Tucker.from_dense(layer, ranks=(5, 3)).num_params == 16 * 5 + 5 * 15 * 3 + 3 * 12


def test_wrong_inputs_and_factors_are_refused() -> None:
    layer = as_layer(random_weight(8, 6, 3, 3))
    spatial, tucker = SpatialLowRank.from_dense(layer, rank=2), Tucker.from_dense(layer, ranks=(2, 2))
    for member in (spatial, tucker):
        with pytest.raises(ModelError, match="6 channels"):
            member.apply(np.ones((1, 5, 8, 8)))
        with pytest.raises(ModelError, match="factors"):
            type(member).from_factors(member.sizes_of, [array[:-1] for array in member.factors.values()])
    with pytest.raises(ModelError, match="outside"):
        Tucker.from_dense(layer, ranks=(9, 2))
    with pytest.raises(ModelError, match="outside"):
        SpatialLowRank.from_dense(layer, rank=100)


@pytest.mark.parametrize("family", [SpatialLowRank, Tucker])
def test_pointwise_and_dense_layers_are_left_to_low_rank(family: Any) -> None:
    assert not family.takes(as_layer(random_weight(4, 4, 1, 1)))
    assert not family.takes(Dense("fc", random_weight(4, 4)))


# -- projection -----------------------------------------------------------------------------------------


def test_spatial_projection_leaves_out_the_tail_of_the_unfolded_spectrum() -> None:
    weight = random_weight(7, 5, 3, 3)
    spectrum = np.linalg.svd(weight.transpose(0, 3, 2, 1).reshape(21, 15), compute_uv=False)
    for rank in (1, 4, 9):
        error = SpatialLowRank.from_dense(as_layer(weight), rank=rank).error(weight)
        assert error == pytest.approx(np.linalg.norm(spectrum[rank:]) / np.linalg.norm(spectrum), rel=1e-9)


@few
@given(st.integers(3, 10), st.integers(3, 10), kernels, st.integers(0, 99))
def test_tucker_is_within_the_bound_of_its_unfoldings(out: int, inner: int, kernel: Any, seed: int) -> None:
    """No member is nearer than either tail, and the projection at most as far as both together."""
    weight = random_weight(out, inner, *kernel, seed=seed)
    ranks = (max(1, out // 2), max(1, inner // 2))
    tails = []
    for axis, rank in enumerate(ranks):
        spectrum = np.linalg.svd(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1), compute_uv=False)
        tails.append(float(np.square(spectrum[rank:]).sum()))
    error = Tucker.from_dense(as_layer(weight), ranks=ranks).error(weight) * np.linalg.norm(weight)
    assert math.sqrt(max(tails)) - 1e-9 <= error <= math.sqrt(sum(tails)) + 1e-9


def test_tucker_estimates_ranks_from_a_noisy_weight() -> None:
    planted = planted_tucker(48, 32, (3, 3), (6, 5))
    noise = 0.1 * planted.std() * random_weight(*planted.shape, seed=3)
    member = Tucker.from_dense(as_layer(planted + noise))
    assert member.ranks == (6, 5)
    assert member.error(planted) < 0.05 < member.error(planted + noise)


@pytest.mark.parametrize(("shape", "rank", "noise"), [((64, 576), 8, 1.0), ((64, 64), 5, 0.3), ((128, 512), 20, 0.5)])
def test_variational_rank_is_that_of_the_signal(shape: Any, rank: int, noise: float) -> None:
    signal = random_weight(shape[0], rank) @ random_weight(rank, shape[1], seed=1)
    noisy = signal + noise * random_weight(*shape, seed=2)
    assert variational_rank(noisy) == variational_rank(noisy.T) == rank
    assert variational_rank(noise * random_weight(*shape, seed=2)) == 0
    assert variational_rank(np.zeros(shape)) == 0


# -- detection and budgets ------------------------------------------------------------------------------


@few
@given(st.integers(4, 12), st.integers(4, 12), st.integers(1, 3), st.integers(0, 99))
def test_planted_members_are_found(out: int, inner: int, rank: int, seed: int) -> None:
    spatial = planted_spatial(out, inner, (3, 3), rank, seed).astype(np.float32)
    found = SpatialLowRank.detect(spatial)
    assert found is not None and found.rank <= rank and found.error(spatial) <= 1e-6
    tucker = planted_tucker(out, inner, (3, 3), (rank, rank), seed).astype(np.float32)
    member = Tucker.detect(tucker)
    assert member is not None and member.error(tucker) <= 1e-6
    assert member.ranks[0] <= rank and member.ranks[1] <= rank


@pytest.mark.parametrize(
    ("out", "inner", "ranks"), [(40, 36, (40, 5)), (40, 36, (6, 36)), (40, 36, (34, 30)), (7, 1, (3, 1))]
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_side_of_full_rank_does_not_hide_the_other(out: int, inner: int, ranks: Any, scale: float) -> None:
    weight = planted_tucker(out, inner, (3, 3), ranks).astype(np.float32) * np.float32(scale)
    found = Tucker.detect(weight)
    assert found is not None and found.ranks == ranks and found.error(weight) <= 1e-5


def test_tucker_is_denied_without_an_svd_where_one_side_is_full(monkeypatch: Any) -> None:
    def forbidden(*_: Any) -> Any:
        raise AssertionError("a bound was enough")

    monkeypatch.setattr("tvm_structured.structures.low_rank.svd", forbidden)
    assert Tucker.detect(random_weight(64, 48, 3, 3).astype(np.float32)) is None


def test_tucker_takes_the_smallest_ranks_within_an_error() -> None:
    weight = planted_tucker(24, 20, (3, 3), (5, 4)) + 1e-3 * random_weight(24, 20, 3, 3, seed=5)
    member = Tucker.project(weight, Budget(max_error=0.05))
    assert member is not None and member.ranks[0] <= 5 and member.ranks[1] <= 4
    assert member.error(weight) <= 0.05


def test_a_budget_of_parameters_is_spent_on_the_ranks_that_help_most() -> None:
    weight = planted_tucker(24, 20, (3, 3), (3, 12))
    member = Tucker.project(weight, 0.25)
    assert member is not None and member.ranks == (3, 12)
    assert member.error(weight) <= 1e-9


def test_gradients_reach_every_factor_of_a_strided_layer() -> None:
    layer = Conv2d("conv", random_weight(6, 4, 3, 3), stride=(2, 2))
    for member in (SpatialLowRank.from_dense(layer, rank=2), Tucker.from_dense(layer, ranks=(3, 2))):
        factors = [torch.tensor(array, requires_grad=True) for array in member.factors.values()]
        type(member).from_factors(member.sizes_of, factors).dense().square().sum().backward()
        assert all(float(factor.grad.abs().sum()) > 0 for factor in factors)
