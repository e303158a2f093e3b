"""DeBut mathematics against the definition, published chains and the best approximation of small cases."""

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
from structure_samples import PUBLISHED_CHAINS, random_debut

from tvm_structured.errors import ModelError
from tvm_structured.structures import STRUCTURES, Budget, Dense, as_layer
from tvm_structured.structures.debut import DeBut
from tvm_structured.structures.debut_chain import (
    as_chain,
    butterfly,
    chain_of,
    generate_chains,
    has_dense_support,
    is_bulging,
    num_params,
)
from tvm_structured.structures.debut_fit import outer_products

few = settings(max_examples=25)
radices = st.integers(1, 4).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(1, 4), min_size=n, max_size=n).map(tuple)] * 2, st.integers(1, 3))
)


def matrix_by_definition(member: DeBut) -> np.ndarray:
    """The product of the sparse factors, each written out entry by entry."""
    product = np.eye(member.shape[1])
    for f, grid in zip(member.chain, member.grids, strict=True):
        matrix = np.zeros((f.p, f.q))
        for b, i, j, d in np.ndindex(*grid.shape):
            matrix[b * f.r * f.t + i * f.t + d, b * f.s * f.t + j * f.t + d] = grid[b, i, j, d]
        product = matrix @ product
    return product


# -- chains ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED_CHAINS)
def test_published_chains_have_their_published_size(name: str) -> None:
    shape, count, compression, bulging, rows, columns = PUBLISHED_CHAINS[name]
    chain = as_chain([list(f) for f in chain_of(rows, columns)], shape)
    member = random_debut(chain)
    assert member.num_params == num_params(chain) == count
    assert round(100 * (1 - count / math.prod(shape)), 2) == compression
    assert is_bulging(chain) == bulging and has_dense_support(chain)


def test_a_chain_is_the_one_of_the_paper() -> None:
    """LeNet FC1, rightmost factor first, as printed."""
    printed = [
        [256, 400, 16, 25, 1],
        [256, 256, 2, 2, 16],
        [128, 256, 1, 2, 32],
        [128, 128, 2, 2, 32],
        [128, 128, 2, 2, 64],
    ]
    assert chain_of((16, 2, 1, 2, 2), (25, 2, 2, 2, 2)) == as_chain(printed, (128, 400))


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ([], "at least one"),
        ("chain", "list of factors"),
        ([(8, 8, 2, 2)], "list of factors"),
        ([(8, 9, 2, 2, 1)], "8 come"),
        ([(8, 8, 2, 2, 2)], "t = 1"),
        ([(8, 8, 2, 2, 1), (8, 8, 2, 2, 1)], "t = 2"),
        ([(8, 8, 3, 2, 1)], "whole number"),
        ([(8, 8, 2, 4, 1)], "whole number"),
        ([(4, 8, 2, 4, 1)], "ends with 4"),
        ([(4, 8, 2, 4, 1), (8, 8, 2, 1, 2)], "4 come"),
        ([(8, 8, 0, 2, 1)], "below 1"),
    ],
)
def test_invalid_chains_are_refused_with_the_broken_rule(broken: Any, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        as_chain(broken, (8, 8))
    with pytest.raises(ModelError, match=what):
        DeBut.from_dense(as_layer(np.ones((8, 8)), "some.weight"), chain=broken)


@few
@given(st.integers(1, 96), st.integers(1, 96))
def test_generated_chains_are_valid_dense_and_sorted(out: int, inner: int) -> None:
    chains = list(generate_chains((out, inner)))
    for chain in chains:
        assert as_chain(chain, (out, inner)) == chain and has_dense_support(chain)
    counts = [num_params(chain) for chain in chains]
    assert counts == sorted(counts) and all(count < out * inner for count in counts)
    every = list(generate_chains((out, inner), max_params=1 << 20))
    assert chains == [c for c in every if num_params(c) < out * inner]
    assert list(generate_chains((out, inner), max_params=50)) == [c for c in every if num_params(c) <= 50]
    kinds = [list(generate_chains((out, inner), bulging=kind)) for kind in (False, True)]
    assert sorted(kinds[0] + kinds[1]) == sorted(chains)


def test_generator_offers_both_kinds_and_the_butterfly() -> None:
    kinds = {is_bulging(chain) for chain in generate_chains((512, 4608))}
    assert kinds == {False, True}
    assert butterfly(64) in generate_chains((64, 64)) and butterfly(64, 8) in generate_chains((64, 64))
    with pytest.raises(ModelError, match="power"):
        butterfly(48, 4)


@few
@given(radices)
def test_dense_support_is_what_the_product_shows(sizes: Any) -> None:
    chain = chain_of(*sizes)
    ones = DeBut((chain[-1].p, chain[0].q), chain, tuple(np.ones((f.blocks, f.r, f.s, f.t)) for f in chain))
    assert has_dense_support(chain) == bool((ones.dense() != 0).all())


# -- meaning --------------------------------------------------------------------------------------------


@few
@given(radices, st.integers(0, 99))
def test_dense_and_apply_are_the_product_of_the_factors(sizes: Any, seed: int) -> None:
    member = random_debut(chain_of(*sizes), seed)
    expected = matrix_by_definition(member)
    np.testing.assert_allclose(member.dense(), expected, atol=1e-12)
    x = np.random.default_rng(seed).standard_normal((3, member.shape[1]))
    np.testing.assert_allclose(member.apply(x), x @ expected.T, atol=1e-12)
    held = DeBut(member.shape, member.chain, tuple(torch.tensor(grid) for grid in member.grids))
    np.testing.assert_allclose(held.apply(torch.tensor(x)), x @ expected.T, atol=1e-12)
    np.testing.assert_allclose(held.dense(), expected, atol=1e-12)


def test_the_hadamard_matrix_is_a_butterfly() -> None:
    size = 16
    hadamard = np.array([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)], float)
    found = DeBut.detect(hadamard)
    assert found is not None and found.num_params <= num_params(butterfly(size))


def test_grids_of_the_wrong_shape_are_refused() -> None:
    member = random_debut(butterfly(8))
    with pytest.raises(ModelError, match="shapes"):
        DeBut(member.shape, member.chain, member.grids[:2])
    with pytest.raises(ModelError, match="8 features"):
        member.apply(np.ones((2, 7)))


# -- projection -----------------------------------------------------------------------------------------


@few
@given(radices, st.integers(0, 99))
def test_members_are_peeled_exactly(sizes: Any, seed: int) -> None:
    member = random_debut(chain_of(*sizes), seed)
    found = DeBut.from_dense(as_layer(member.dense()), chain=member.chain)
    assert found.error(member.dense()) <= 1e-12


@pytest.mark.parametrize(("rows", "columns"), [((4, 6), (5, 4)), ((3, 2), (2, 6)), ((30, 2), (2, 40))])
def test_two_factors_are_the_nearest(rows: Any, columns: Any) -> None:
    """Each block's best outer product, from its SVD."""
    chain = chain_of(rows, columns)
    weight = np.random.default_rng(1).standard_normal((math.prod(rows), math.prod(columns)))
    left_out = 0.0
    for first in range(rows[0]):
        for group in range(columns[1]):
            block = weight[first :: rows[0], group * columns[0] : (group + 1) * columns[0]]
            left_out += float(np.square(np.linalg.svd(block, compute_uv=False)[1:]).sum())
    found = DeBut.from_dense(as_layer(weight), chain=chain)
    tolerance = 1e-9 if columns[0] <= 24 or rows[1] <= 24 else 1e-3  # larger blocks: powers of their Gram matrix
    assert found.error(weight) == pytest.approx(math.sqrt(left_out) / np.linalg.norm(weight), rel=tolerance)


def test_sweeps_never_lose_and_end_where_no_factor_can_improve() -> None:
    rng = np.random.default_rng(2)
    layer = as_layer(rng.standard_normal((24, 36)))
    chain = chain_of((2, 3, 4), (3, 4, 3))
    errors = [DeBut.from_dense(layer, chain=chain, sweeps=count).error(layer) for count in range(5)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    settled = DeBut.from_dense(layer, chain=chain, sweeps=200)
    held = DeBut(settled.shape, chain, tuple(torch.tensor(grid, requires_grad=True) for grid in settled.grids))
    loss = ((held.dense() - torch.tensor(layer.matrix)) ** 2).sum()
    for gradient in torch.autograd.grad(loss, held.grids):
        assert float(gradient.abs().max()) <= 1e-3


def test_sweeps_from_random_factors_find_a_member_too_but_need_many() -> None:
    """The paper's way: a few sweeps leave an error on a long chain, peeling leaves none."""
    member = random_debut(butterfly(64))
    layer = as_layer(member.dense())
    errors = [
        DeBut.from_dense(layer, chain=member.chain, start="random", sweeps=count).error(layer) for count in (1, 3, 10)
    ]
    assert 1 > errors[0] > errors[1] >= errors[2]
    assert DeBut.from_dense(layer, chain=member.chain).error(layer) <= 1e-12
    with pytest.raises(ModelError, match="start"):
        DeBut.from_dense(layer, chain=member.chain, start="warm")


@pytest.mark.parametrize("shape", [(3, 30, 50), (3, 50, 30), (2, 4, 3), (5, 1, 40), (5, 40, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_outer_products_are_exact_and_nearest_at_any_scale(shape: Any, scale: float) -> None:
    rng = np.random.default_rng(0)
    stack = scale * rng.standard_normal(shape)
    stack[1] *= 1e-20  # beside large matrices a small one keeps its direction, too
    u, v = outer_products(stack)
    left_out = np.square(np.linalg.svd(stack / scale, compute_uv=False)[:, 1:]).sum()
    found = np.square((stack - u[..., None] * v[..., None, :]) / scale).sum()
    assert found <= left_out * (1 + 1e-6) + 1e-28
    member = u[..., None] * v[..., None, :]
    u, v = outer_products(member)
    for part, again in zip(member, u[..., None] * v[..., None, :], strict=True):
        assert np.linalg.norm(again - part) <= 1e-14 * np.linalg.norm(part)


def test_the_bound_of_peeling_holds() -> None:
    """At most sqrt(N - 1) times as far as what many sweeps reach."""
    chain = chain_of((2, 2, 3), (3, 2, 2))
    for seed in range(5):
        layer = as_layer(np.random.default_rng(seed).standard_normal((12, 12)))
        best = min(
            DeBut.from_dense(layer, chain=chain, start="random", sweeps=60, seed=s).error(layer) for s in range(4)
        )
        assert DeBut.from_dense(layer, chain=chain).error(layer) <= math.sqrt(2) * best + 1e-9


# -- budgets and storage --------------------------------------------------------------------------------


def test_project_prefers_the_own_chain_of_the_weight() -> None:
    planted = random_debut(chain_of((8, 2, 2), (2, 2, 12)), dtype=np.float32).dense()
    found = DeBut.project(planted, 0.9)
    assert found is not None and found.error(planted) <= 1e-6


def test_project_takes_the_chain_that_the_budget_affords() -> None:
    layer = as_layer(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32))
    found = [DeBut.project(layer, Budget(max_params=share)) for share in (0.2, 0.3, 0.6)]
    assert all(member is not None for member in found)
    errors = [member.error(layer) for member in found if member is not None]
    assert errors == sorted(errors, reverse=True)


def test_sizes_go_through_json() -> None:
    member = random_debut(chain_of((3, 2), (2, 4)))
    again = STRUCTURES["debut"].from_factors(json.loads(json.dumps(member.sizes_of)), list(member.factors.values()))
    assert again.chain == member.chain and again.describe() == member.describe() == "3x2*2x4"


def test_a_layer_with_prime_sides_has_no_chain() -> None:
    assert list(DeBut.sizes(Dense("fc", np.ones((7, 13))))) == []
