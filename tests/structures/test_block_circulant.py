"""Block-circulant mathematics against scipy's circulant blocks, least squares and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import circulant
from structure_samples import random_circulant

from tvm_structured.errors import ModelError
from tvm_structured.structures import STRUCTURES, Budget, as_layer
from tvm_structured.structures.block_circulant import BlockCirculant
from tvm_structured.structures.circulant_pattern import Blocks

few = settings(max_examples=25)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
blocks = st.integers(2, 45)


def matrix_of(c: np.ndarray, shape: tuple[int, int], taps: int) -> np.ndarray:
    """The definition, block by block."""
    p, columns, n = c.shape
    out, inner = shape
    grid = np.block([[circulant(c[i, j]) for j in range(columns)] for i in range(p)])
    return grid.reshape(p * n, taps, -1)[:out, :, : inner // taps].reshape(out, inner)


def basis_of(shape: tuple[int, int], block: int, taps: int = 1) -> np.ndarray:
    """One column for each number of c: what it contributes to the flattened matrix."""
    size = Blocks.of(shape, taps, block).factor_shape
    units = np.eye(int(np.prod(size))).reshape(-1, *size)
    return np.stack([matrix_of(unit, shape, taps).ravel() for unit in units], axis=1)


@few
@given(shapes, blocks, st.integers(0, 10))
def test_dense_is_made_of_circulant_blocks(shape: tuple[int, int], block: int, seed: int) -> None:
    member = random_circulant(np.random.default_rng(seed), shape, block)
    np.testing.assert_array_equal(member.dense(), matrix_of(member.c, shape, 1))


@pytest.mark.parametrize("width", [1, 3, 8, 11])
@pytest.mark.parametrize("block", [2, 3, 8, 10])
def test_every_tap_is_padded_by_itself(width: int, block: int) -> None:
    member = random_circulant(np.random.default_rng(0), (13, 6 * width), block, taps=6)
    np.testing.assert_array_equal(member.dense(), matrix_of(member.c, member.shape, 6))
    assert member.c.shape == (-(-13 // block), 6 * -(-width // block), block)


@few
@given(shapes, blocks, st.integers(0, 10))
def test_apply_is_the_product_with_dense(shape: tuple[int, int], block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    member = random_circulant(rng, shape, block)
    x = rng.standard_normal((2, 3, shape[1]))
    expected = x @ member.dense().T
    np.testing.assert_allclose(member.apply(x), expected, atol=1e-11)
    as_torch = BlockCirculant(shape, 1, torch.tensor(member.c))
    np.testing.assert_allclose(as_torch.apply(torch.tensor(x)).numpy(), expected, atol=1e-11)
    np.testing.assert_array_equal(as_torch.dense().numpy(), member.dense())


def test_apply_takes_a_single_vector_no_rows_and_strided_input() -> None:
    rng = np.random.default_rng(1)
    member = random_circulant(rng, (7, 12), 5, taps=2)
    x = rng.standard_normal((12, 4)).T  # columns as rows: not contiguous
    expected = x @ member.dense().T
    np.testing.assert_allclose(member.apply(x), expected, atol=1e-12)
    np.testing.assert_allclose(member.apply(x[0]), expected[0], atol=1e-12)
    assert member.apply(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_apply_keeps_the_precision_of_its_input(dtype: str) -> None:
    rng = np.random.default_rng(2)
    member = random_circulant(rng, (6, 9), 4)
    narrow = BlockCirculant(member.shape, 1, member.c.astype(dtype))
    x = rng.standard_normal((2, 9)).astype(dtype)
    assert narrow.apply(x).dtype == dtype
    assert narrow.apply(torch.tensor(x)).dtype == getattr(torch, dtype)
    np.testing.assert_allclose(narrow.apply(x), x @ member.dense().T, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors_are_applied_in_single_precision(dtype: torch.dtype) -> None:
    member = random_circulant(np.random.default_rng(3), (6, 8), 4)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    half = BlockCirculant(member.shape, 1, torch.tensor(member.c).to(dtype))
    y = half.apply(x)
    assert y.dtype == dtype
    expected = x.double() @ torch.tensor(matrix_of(half.c.double().numpy(), member.shape, 1)).T
    torch.testing.assert_close(y.double(), expected, atol=0.05, rtol=0.02)


def test_gradients_agree_with_finite_differences() -> None:
    member = random_circulant(np.random.default_rng(4), (5, 6), 4, taps=2)
    c = torch.nn.Parameter(torch.tensor(member.c))
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def apply(c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return BlockCirculant((5, 6), 2, c).apply(x)

    assert torch.autograd.gradcheck(apply, (c, x))
    apply(c, x).square().sum().backward()
    assert c.grad is not None and c.grad.shape == c.shape


@few
@given(st.tuples(st.integers(1, 14), st.integers(1, 14)), st.integers(2, 16), st.integers(0, 10))
def test_projection_is_the_least_squares_solution(shape: tuple[int, int], block: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape)
    member = BlockCirculant.from_dense(as_layer(weight), block=block)
    # lstsq returns the solution of least norm: 0 for the diagonals that lie in the padding
    solution = np.linalg.lstsq(basis_of(shape, block), weight.ravel(), rcond=None)[0]
    np.testing.assert_allclose(member.c.ravel(), solution, atol=1e-12)


@pytest.mark.parametrize("width", [2, 5, 6])
def test_projection_of_a_convolution_is_the_least_squares_solution_of_each_tap(width: int) -> None:
    weight = np.random.default_rng(5).standard_normal((7, width, 3, 2))
    layer = as_layer(weight)
    member = BlockCirculant.from_dense(layer, block=4)
    assert member.taps == 6
    solution = np.linalg.lstsq(basis_of(layer.matrix.shape, 4, 6), layer.matrix.ravel(), rcond=None)[0]
    np.testing.assert_allclose(member.c.ravel(), solution, atol=1e-12)


@few
@given(shapes, blocks, st.integers(0, 10))
def test_projection_of_a_member_is_the_member(shape: tuple[int, int], block: int, seed: int) -> None:
    weight = random_circulant(np.random.default_rng(seed), shape, block).dense()
    again = BlockCirculant.from_dense(as_layer(weight), block=block)
    np.testing.assert_allclose(again.dense(), weight, atol=1e-13)


def test_taps_make_no_difference_where_the_block_divides_the_channels() -> None:
    layer = as_layer(np.random.default_rng(6).standard_normal((8, 12, 3, 3)))
    per_tap, flat = (BlockCirculant.from_dense(layer, block=4, taps=taps) for taps in (None, 1))
    np.testing.assert_array_equal(per_tap.dense(), flat.dense())


@few
@given(shapes, st.floats(0.02, 0.9), st.integers(0, 5))
def test_projection_stays_within_a_parameter_budget_with_the_shortest_block(
    shape: tuple[int, int], fraction: float, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape)
    member = BlockCirculant.project(weight, fraction)
    possible = [n for n in range(2, max(shape) + 1) if Blocks.of(shape, 1, n).num_params <= fraction * weight.size]
    if not possible:
        assert member is None
        return
    assert member is not None and member.num_params <= fraction * weight.size
    shortest = BlockCirculant.from_dense(as_layer(weight), block=possible[0])
    assert member.error(weight) <= shortest.error(weight)


@pytest.mark.parametrize(("fraction", "block"), [(0.5, 2), (0.1, 10), (1 / 12, 12), (0.05, 20), (0.01, 100)])
def test_a_fraction_of_the_parameters_gives_its_block(fraction: float, block: int) -> None:
    weight = np.random.default_rng(12).standard_normal((600, 600))
    member = BlockCirculant.project(weight, fraction)
    assert member is not None and member.block == block


def test_projection_follows_the_pattern_of_the_weight() -> None:
    rng = np.random.default_rng(13)
    planted = random_circulant(rng, (120, 240), 20).dense()
    noisy = planted + 0.1 * rng.standard_normal(planted.shape)
    member = BlockCirculant.project(noisy, 0.25)
    assert member is not None and member.block == 20
    assert member.error(planted) < 0.1


def test_an_error_budget_gives_the_smallest_member_that_is_near_enough() -> None:
    rng = np.random.default_rng(14)
    planted = random_circulant(rng, (96, 96), 16).dense()
    noisy = planted + 0.02 * rng.standard_normal(planted.shape)
    member = BlockCirculant.project(noisy, Budget(max_error=0.05))
    assert member is not None and member.block == 16
    assert BlockCirculant.project(rng.standard_normal((96, 96)), Budget(max_error=0.05)) is None


def test_an_operation_budget_is_kept() -> None:
    layer = as_layer(np.random.default_rng(15).standard_normal((128, 256)))
    member = BlockCirculant.project(layer, Budget(max_flops=0.2))
    assert member is not None and member.flops(1) <= 0.2 * layer.flops(1)


def test_operations_are_those_of_the_spectral_evaluation() -> None:
    member = random_circulant(np.random.default_rng(16), (16, 24), 8)
    transforms = (3 + 2) * 2.5 * 8 * 3
    products = 2 * (3 * 3 + 2) * 3 * 2
    assert member.flops(7) == 7 * (transforms + products)
    rng = np.random.default_rng(16)
    assert random_circulant(rng, (15, 15), 15).flops(1) == 2 * 15 * (3 + 5) + 2 * (3 * 7 + 1)
    assert random_circulant(rng, (130, 130), 130).flops(1) == 2 * 130**2 + 2 * (3 * 64 + 2)


def test_a_member_is_rebuilt_from_its_sizes_and_factors() -> None:
    member = random_circulant(np.random.default_rng(17), (9, 14), 3, taps=2)
    sizes = {key: list(v) if isinstance(v, tuple) else v for key, v in member.sizes_of.items()}
    again = BlockCirculant.from_factors(sizes, list(member.factors.values()))
    np.testing.assert_array_equal(again.dense(), member.dense())
    assert member.describe() == "block=3, taps=2" and member.num_params == 3 * 2 * 3 * 3


def test_impossible_requests_name_the_value() -> None:
    layer = as_layer(np.ones((4, 6)), "fc")
    with pytest.raises(ModelError, match=r"fc: block 1"):
        BlockCirculant.from_dense(layer, block=1)
    with pytest.raises(ModelError, match=r"fc: 4 taps do not divide the 6 columns"):
        BlockCirculant.from_dense(layer, block=2, taps=4)
    with pytest.raises(ModelError, match=r"has shape \(2, 3, 2\), got \(2, 2, 2\)"):
        BlockCirculant((4, 6), 1, np.ones((2, 2, 2)))
    with pytest.raises(ModelError, match=r"takes 6 features"):
        BlockCirculant.from_dense(layer, block=2).apply(np.ones((2, 5)))


def test_the_table_knows_the_family() -> None:
    assert STRUCTURES["block_circulant"] is BlockCirculant
