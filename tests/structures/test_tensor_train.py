"""Tensor-train mathematics against the definition, Eckart-Young bounds, published figures and finite differences."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_samples import random_train

from tvm_structured.errors import ModelError
from tvm_structured.structures import as_layer
from tvm_structured.structures.factorisation import balanced_modes, divisors, factorisations
from tvm_structured.structures.tensor_train import TensorTrain
from tvm_structured.structures.tt_order import cheapest_order, first_core_first, last_core_first

few = settings(max_examples=25)
mode_lists = st.integers(1, 4).flatmap(
    lambda d: st.tuples(*[st.lists(st.integers(1, 4), min_size=d, max_size=d).map(tuple)] * 2)
)
cut_lists = st.integers(2, 4).flatmap(
    lambda d: st.tuples(*[st.lists(st.integers(2, 5), min_size=d, max_size=d).map(tuple)] * 2)
)
# (out modes, in modes, compression) at rank 4, as printed for these layers
PUBLISHED = {
    "VGG-FC6": ((4, 4, 4, 4, 4, 4), (2, 7, 8, 8, 7, 4), 50972),
    "VGG-FC7": ((4, 4, 4, 4, 4, 4), (4, 4, 4, 4, 4, 4), 14564),
    "LSTM-UCF11": ((4, 4, 4, 4), (8, 20, 20, 18), 4955),
    "LSTM-Youtube": ((4, 4, 4, 4), (4, 20, 20, 36), 4608),
}


def matrix_by_definition(train: TensorTrain) -> np.ndarray:
    """Every entry as the product of the small matrices that its digits select."""
    matrix = np.empty(train.shape)
    rows = itertools.product(*map(range, train.out_modes))
    for i, out_digits in enumerate(rows):
        for j, in_digits in enumerate(itertools.product(*map(range, train.in_modes))):
            product = np.eye(1)
            for core, m, n in zip(train.cores, out_digits, in_digits, strict=True):
                product = product @ core[:, m, n, :]
            matrix[i, j] = product[0, 0]
    return matrix


def unfolding_by_definition(matrix: np.ndarray, out_modes: Any, in_modes: Any, k: int) -> np.ndarray:
    """Rows (i_1 ... i_k, j_1 ... j_k), columns the other digits."""
    d = len(out_modes)
    axes = [*range(k), *range(d, d + k), *range(k, d), *range(d + k, 2 * d)]
    tensor = matrix.reshape(*out_modes, *in_modes).transpose(axes)
    return tensor.reshape(math.prod(out_modes[:k]) * math.prod(in_modes[:k]), -1)


# -- meaning --------------------------------------------------------------------------------------------


@few
@given(mode_lists, st.integers(1, 4), st.integers(0, 9))
def test_dense_is_the_product_of_the_selected_matrices(modes: Any, rank: int, seed: int) -> None:
    train = random_train(*modes, rank, seed)
    np.testing.assert_allclose(train.dense(), matrix_by_definition(train), atol=1e-12)


@few
@given(mode_lists, st.integers(1, 4), st.integers(0, 9))
def test_apply_is_the_product_with_dense(modes: Any, rank: int, seed: int) -> None:
    train = random_train(*modes, rank, seed)
    x = np.random.default_rng(seed).standard_normal((3, 2, train.shape[1]))
    expected = x @ matrix_by_definition(train).T
    np.testing.assert_allclose(train.apply(x), expected, atol=1e-10)
    np.testing.assert_allclose(train.apply(x[0, 0]), expected[0, 0], atol=1e-10)
    in_torch = TensorTrain(*train.sizes_of.values(), tuple(torch.tensor(core) for core in train.cores))
    np.testing.assert_allclose(in_torch.apply(torch.tensor(x)).numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(in_torch.dense().numpy(), train.dense(), atol=1e-12)


@pytest.mark.parametrize("modes", [((2, 3, 2), (4, 3, 2)), ((5, 4, 1), (2, 1, 3))])  # each contracts in another order
def test_both_orders_give_the_same_result_and_gradients(modes: Any) -> None:
    train = random_train(*modes, 3)
    x = torch.randn(2, train.shape[1], dtype=torch.float64)
    cores = [torch.tensor(core, requires_grad=True) for core in train.cores]

    def product(*factors: Any) -> Any:
        return TensorTrain.from_factors(train.sizes_of, factors).apply(x)

    assert torch.autograd.gradcheck(product, cores)
    np.testing.assert_allclose(product(*cores).detach().numpy(), x.numpy() @ train.dense().T, atol=1e-10)


def test_the_two_shapes_above_do_use_both_orders() -> None:
    orders = {random_train(*m, 3).order.is_last_core_first for m in (((2, 3, 2), (4, 3, 2)), ((5, 4, 1), (2, 1, 3)))}
    assert orders == {True, False}


def test_apply_takes_a_non_contiguous_input() -> None:
    train = random_train((3, 4), (5, 2), 3)
    x = np.random.default_rng(0).standard_normal((10, 7)).T
    np.testing.assert_allclose(train.apply(x), x @ train.dense().T, atol=1e-12)


def test_apply_names_a_wrong_number_of_features() -> None:
    with pytest.raises(ModelError, match=r"takes 10 features, got an input of shape \(2, 9\)"):
        random_train((3, 4), (5, 2), 3).apply(np.zeros((2, 9)))


# -- published figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", PUBLISHED)
def test_published_compressions_follow_from_the_shapes(layer: str) -> None:
    out_modes, in_modes, compression = PUBLISHED[layer]
    train = random_train(out_modes, in_modes, 4, dtype=np.float32)
    assert round(math.prod(train.shape) / train.num_params) == compression
    assert (out_modes, in_modes) in set(factorisations(train.shape))


def test_the_order_of_contraction_decides_over_a_factor_of_six() -> None:
    """The four stacked gates of the UCF11 LSTM: 1.94 M multiplications from the last core, 12.6 M from the first."""
    modes = (16, 4, 4, 4), (8, 20, 20, 18)
    ranks = (1, 4, 4, 4, 1)
    assert last_core_first(*modes, ranks).multiplies == 1_937_408
    assert first_core_first(*modes, ranks).multiplies == 12_607_488
    assert cheapest_order(*modes, ranks).is_last_core_first
    assert random_train(*modes, 4, dtype=np.float32).flops(3) == 2 * 3 * 1_937_408


@few
@given(mode_lists, st.integers(1, 4))
def test_the_planner_never_takes_the_dearer_order(modes: Any, rank: int) -> None:
    ranks = (1, *[rank] * (len(modes[0]) - 1), 1)
    both = [order(*modes, ranks).multiplies for order in (last_core_first, first_core_first)]
    assert cheapest_order(*modes, ranks).multiplies == min(both)
    # the transposed matrix exchanges the two
    assert last_core_first(*modes[::-1], ranks).multiplies == first_core_first(*modes, ranks).multiplies


# -- TT-SVD ---------------------------------------------------------------------------------------------


@few
@given(cut_lists, st.floats(0.01, 0.9), st.integers(0, 9))
def test_the_total_error_stays_below_eps(modes: Any, eps: float, seed: int) -> None:
    shape = math.prod(modes[0]), math.prod(modes[1])
    weight = np.random.default_rng(seed).standard_normal(shape)
    train = TensorTrain.from_dense(as_layer(weight), out_modes=modes[0], in_modes=modes[1], eps=eps)
    error = np.linalg.norm(train.dense() - weight) / np.linalg.norm(weight)
    assert error <= eps * (1 + 1e-9)
    assert train.error(weight) == pytest.approx(error, abs=1e-12)


@few
@given(cut_lists, st.integers(1, 6), st.integers(0, 9))
def test_tt_svd_is_within_its_bound_of_the_nearest(modes: Any, rank: int, seed: int) -> None:
    """max tail <= error^2 <= sum of tails (Oseledets 2011, theorem 2.2); a single bond is Eckart-Young exactly."""
    weight = np.random.default_rng(seed).standard_normal((math.prod(modes[0]), math.prod(modes[1])))
    train = TensorTrain.from_dense(as_layer(weight), out_modes=modes[0], in_modes=modes[1], rank=rank)
    error = np.linalg.norm(train.dense() - weight) ** 2
    tails = []
    for k in range(1, len(modes[0])):
        s = np.linalg.svd(unfolding_by_definition(weight, *modes, k), compute_uv=False)
        tails.append(float((s[train.ranks[k] :] ** 2).sum()))
    assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9


def test_full_ranks_reproduce_the_weight() -> None:
    weight = np.random.default_rng(0).standard_normal((24, 30))
    train = TensorTrain.from_dense(as_layer(weight), out_modes=(2, 3, 4), in_modes=(5, 3, 2))
    np.testing.assert_allclose(train.dense(), weight, atol=1e-12)
    assert train.ranks == (1, 10, 8, 1)


@pytest.mark.parametrize("shape", [((4, 5), (40, 30)), ((40, 30), (4, 5)), ((40, 40), (30, 40))])
def test_wide_tall_and_large_unfoldings_are_all_recovered(shape: Any) -> None:
    """The three ways to truncate: Gram matrix of the rows, of the columns, and subspace iteration (1200 x 1200)."""
    train = random_train(*shape, 5, dtype=np.float32)
    found = TensorTrain.from_dense(as_layer(train.dense()), out_modes=shape[0], in_modes=shape[1], eps=1e-5, rank=50)
    assert found.ranks == train.ranks
    assert found.error(train.dense()) < 1e-6


def test_ranks_may_differ_between_bonds_and_are_clipped_to_what_is_possible() -> None:
    weight = np.random.default_rng(0).standard_normal((24, 30))
    train = TensorTrain.from_dense(as_layer(weight), out_modes=(2, 3, 4), in_modes=(5, 3, 2), rank=(50, 7))
    assert train.ranks == (1, 10, 7, 1)
    with pytest.raises(ModelError, match="2 bonds between 3 cores need as many positive ranks, got"):
        TensorTrain.from_dense(as_layer(weight), out_modes=(2, 3, 4), in_modes=(5, 3, 2), rank=(1, 2, 3))


def test_the_norm_is_shared_by_the_cores() -> None:
    weight = 1e6 * np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    train = TensorTrain.from_dense(as_layer(weight), out_modes=(4, 4), in_modes=(4, 4), rank=3)
    norms = [float(np.abs(core).max()) for core in train.cores]
    assert max(norms) / min(norms) < 10


def test_a_zero_weight_is_a_train_of_zeros() -> None:
    train = TensorTrain.from_dense(as_layer(np.zeros((6, 4))), out_modes=(2, 3), in_modes=(2, 2), rank=2)
    np.testing.assert_array_equal(train.dense(), np.zeros((6, 4)))


# -- construction ---------------------------------------------------------------------------------------


def test_modes_that_do_not_make_the_shape_are_refused() -> None:
    with pytest.raises(ModelError, match="make a 24 x 30 matrix, not 24 x 32; choose factors of the shape"):
        TensorTrain.from_dense(as_layer(np.ones((24, 32))), out_modes=(2, 3, 4), in_modes=(5, 3, 2), rank=2)
    with pytest.raises(ModelError, match="equally many"):
        TensorTrain.from_dense(as_layer(np.ones((24, 30))), out_modes=(24,), in_modes=(5, 6), rank=2)


def test_cores_that_do_not_fit_the_modes_are_refused() -> None:
    cores = random_train((2, 3), (4, 5), 2).cores
    with pytest.raises(ModelError, match="cores of modes"):
        TensorTrain((6, 20), (3, 2), (4, 5), cores)
    with pytest.raises(ModelError, match="cores of modes"):
        TensorTrain((6, 20), (2, 3), (4, 5), cores[:1])


def test_a_member_survives_its_sizes_as_json() -> None:
    train = random_train((2, 3), (4, 5), 2)
    again = TensorTrain.from_factors(json.loads(json.dumps(train.sizes_of)), list(train.factors.values()))
    assert again.sizes_of == train.sizes_of
    assert list(train.factors) == list(train.trainable_factors) == ["core0", "core1"]
    np.testing.assert_array_equal(again.dense(), train.dense())
    assert (train.num_params, train.num_bytes) == (2 * 4 * 2 + 2 * 3 * 5, 8 * 46)
    assert train.describe() == "2x3*4x5 rank=2"


@few
@given(st.integers(1, 400), st.integers(1, 4))
def test_balanced_modes_multiply_to_the_extent(extent: int, count: int) -> None:
    modes = balanced_modes(extent, count)
    primes, rest = 0, extent
    for p in range(2, extent + 1):
        while rest % p == 0:
            primes, rest = primes + 1, rest // p
    assert (modes is None) == (primes < count)
    if modes is not None:
        assert math.prod(modes) == extent and list(modes) == sorted(modes) and min(modes) > 1
    assert divisors(extent) == [d for d in range(1, extent + 1) if extent % d == 0]


def test_sizes_rise_and_stay_below_dense() -> None:
    layer = as_layer(np.ones((48, 60)))
    params = [TensorTrain.from_dense(layer, **size).num_params for size in TensorTrain.sizes(layer)]
    assert params and all(p < layer.num_params for p in params)
    sizes = list(TensorTrain.sizes(layer))
    assert {len(size["out_modes"]) for size in sizes} == {2, 3, 4}
    assert list(TensorTrain.sizes(as_layer(np.ones((7, 60))))) == []  # a prime has no two factors


# -- detection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(
    ("out_modes", "in_modes", "rank"),
    [((6,), (8,), 1), ((3, 5), (7, 2), 2), ((2, 3, 4), (5, 1, 6), 3), ((4, 4, 4, 4), (2, 7, 3, 2), 9)],
)
def test_two_halves_give_the_product_with_the_dense_matrix(out_modes: Any, in_modes: Any, rank: int, rows: int) -> None:
    layer = as_layer(np.ones((math.prod(out_modes), math.prod(in_modes))))
    drawn = TensorTrain.drawn(layer, np.random.default_rng(0), out_modes=out_modes, in_modes=in_modes, rank=rank)
    cores = [torch.tensor(core, dtype=torch.float64, requires_grad=True) for core in drawn.factors.values()]
    train = TensorTrain.from_factors(drawn.sizes_of, cores)
    x = torch.randn(2, rows, math.prod(in_modes), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = train._apply_halves(x)
    torch.testing.assert_close(y, x @ train.dense().T)
    found = torch.autograd.grad(y.square().sum(), cores)
    for a, b in zip(found, torch.autograd.grad((x @ train.dense().T).square().sum(), cores), strict=True):
        torch.testing.assert_close(a, b)
