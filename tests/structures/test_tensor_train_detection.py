"""Tensor trains found in weights and projected within a budget."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_samples import random_train

from tvm_structured.structures import STRUCTURES, Budget, Conv2d, Dense
from tvm_structured.structures.tensor_train import TensorTrain

few = settings(max_examples=25)
cut_lists = st.integers(2, 4).flatmap(
    lambda d: st.tuples(*[st.lists(st.integers(2, 5), min_size=d, max_size=d).map(tuple)] * 2)
)


@pytest.mark.parametrize(
    ("modes", "rank"),
    [
        (((4,) * 6, (4,) * 6), 4),
        (((4, 4, 4, 4), (8, 20, 20, 18)), 4),
        (((8, 8, 8), (16, 8, 8)), 8),
        (((3, 20, 7), (6, 2, 25)), 5),
        (((5, 8), (49, 16)), 3),
        (((10, 12), (20, 20)), 7),
        (((2, 2, 2, 2, 2), (3, 2, 3, 2, 3)), 2),
        (((1, 8, 8), (9, 8, 8)), 3),
        (((1, 7), (8, 8)), 2),
    ],
    ids=str,
)
def test_a_planted_train_is_found_whatever_its_modes(modes: Any, rank: int) -> None:
    planted = random_train(*modes, rank, dtype=np.float32)
    weight = planted.dense()
    found = STRUCTURES["tensor_train"].detect(weight)
    assert found is not None and found.num_params <= planted.num_params
    assert np.linalg.norm(found.dense() - weight) <= 1e-5 * np.linalg.norm(weight)


@few
@given(cut_lists, st.integers(1, 3), st.integers(0, 99))
def test_whatever_is_found_is_smaller_than_dense_and_equal(modes: Any, rank: int, seed: int) -> None:
    planted = random_train(*modes, rank, seed)
    found = TensorTrain.detect(planted.dense())
    if planted.num_params < math.prod(planted.shape):
        assert found is not None and found.num_params <= planted.num_params
    if found is not None:
        assert found.num_params < math.prod(planted.shape)
        assert found.error(planted.dense()) <= 1e-5


@pytest.mark.parametrize("shape", [(64, 64), (120, 400), (1, 12), (12, 1), (1, 1), (7, 13), (256, 256), (64, 576)])
def test_a_random_weight_is_no_train(shape: tuple[int, int]) -> None:
    assert TensorTrain.detect(np.random.default_rng(0).standard_normal(shape).astype(np.float32)) is None


def test_low_rank_says_better_what_is_only_of_low_rank() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 3)) @ rng.standard_normal((3, 60))
    train, low_rank = TensorTrain.detect(weight), STRUCTURES["low_rank"].detect(weight)
    assert train is None or train.num_params > low_rank.num_params


def test_mostly_zero_weights_do_not_mislead_the_samples() -> None:
    rng = np.random.default_rng(0)
    identity = TensorTrain.detect(np.eye(512, dtype=np.float32))
    assert identity is not None and identity.num_params == 9 * 4
    repeated = np.kron(np.eye(16), rng.standard_normal((16, 16))).astype(np.float32)
    found = TensorTrain.detect(repeated)
    assert found is not None and found.num_params == 4 * 4 + 256 and found.error(repeated) < 1e-5
    sparse = np.where(rng.random((256, 256)) < 0.05, rng.standard_normal((256, 256)), 0)
    assert TensorTrain.detect(sparse) is None


def test_the_tolerance_decides_what_is_noise() -> None:
    planted = random_train((4, 8, 4), (4, 4, 8), 3)
    noise = np.random.default_rng(1).standard_normal(planted.shape)
    weight = planted.dense() + noise * (1e-3 * np.linalg.norm(planted.dense()) / np.linalg.norm(noise))
    found = TensorTrain.detect(weight, tol=2e-3)
    assert found is not None and found.num_params == planted.num_params
    assert TensorTrain.detect(weight, tol=1e-5) is None


def test_float64_weights_are_detected_to_float64_tolerances() -> None:
    planted = random_train((4, 4, 4), (4, 6, 4), 3)
    found = TensorTrain.detect(planted.dense(), tol=1e-12)
    assert found is not None and found.num_params == planted.num_params


def test_a_convolution_is_detected_in_its_channel_fastest_form() -> None:
    planted = random_train((1, 8, 8), (9, 4, 8), 3, dtype=np.float32)
    weight = np.ascontiguousarray(planted.dense().reshape(64, 3, 3, 32).transpose(0, 3, 1, 2))
    found = TensorTrain.detect(weight)
    assert found is not None and found.num_params <= planted.num_params
    np.testing.assert_allclose(found.dense(), Conv2d("w", weight).matrix, atol=1e-4)
    assert TensorTrain.detect(Conv2d("w", weight, groups=2)) is None


# -- projection -----------------------------------------------------------------------------------------

BUDGETS = [
    Budget(max_params=0.25),
    Budget(max_flops=0.3),
    Budget(max_params=0.5, max_flops=0.4),
    Budget(max_error=0.3),
    Budget(max_params=0.9, max_error=0.5),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (60, 100), (36, 45)])
def test_projection_stays_within_the_budget(budget: Budget, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    # a smooth kernel: its unfoldings have falling spectra, as those of trained weights do
    grid = [np.linspace(0, 3, n)[:, None] for n in shape]
    weight = np.sin(grid[0] * grid[1].T) + 0.1 * rng.standard_normal(shape)
    layer = Dense("w", weight)
    member = TensorTrain.project(layer, budget)
    assert member is not None
    assert member.num_params < layer.num_params
    assert member.num_params <= (budget.max_params or 1) * layer.num_params
    assert member.flops(1) <= (budget.max_flops or 9) * layer.flops(1)
    assert np.linalg.norm(member.dense() - weight) <= (budget.max_error or 1) * np.linalg.norm(weight)


def test_projection_is_idempotent() -> None:
    weight = np.random.default_rng(0).standard_normal((48, 60))
    once = TensorTrain.project(weight, 0.3)
    assert once is not None
    again = TensorTrain.project(once.dense(), 0.3)
    assert again is not None and again.error(once.dense()) < 1e-7


def test_a_larger_budget_never_gives_a_larger_error() -> None:
    weight = np.random.default_rng(0).standard_normal((36, 80))
    members = [TensorTrain.project(weight, fraction) for fraction in (0.05, 0.1, 0.2, 0.4, 0.8)]
    errors = [member.error(weight) for member in members if member is not None]
    assert len(errors) == 5 and errors == sorted(errors, reverse=True)


def test_a_weight_that_is_a_train_is_projected_to_itself() -> None:
    planted = random_train((3, 5, 8), (7, 4, 6), 4)
    member = TensorTrain.project(planted.dense(), 0.5)
    assert member is not None and member.error(planted.dense()) < 1e-9


def test_a_budget_nobody_reaches_gives_none() -> None:
    weight = np.random.default_rng(0).standard_normal((48, 60))
    assert TensorTrain.project(weight, 0.001) is None
    assert TensorTrain.project(weight, Budget(max_error=0.0)) is None
    assert TensorTrain.project(weight, Budget(max_params=0.1, max_error=0.01)) is None
    assert TensorTrain.project(np.ones((7, 13)), 0.9) is None


def test_a_convolution_is_projected_on_its_matrix() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 12, 3, 3)).astype(np.float32)
    member = TensorTrain.project(weight, 0.5)
    assert member is not None and member.shape == (16, 108)
    assert member.num_params <= 0.5 * weight.size and member.error(weight) < 0.8
