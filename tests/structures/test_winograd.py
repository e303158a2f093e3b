"""Winograd: exact matrices, the same convolution, tiles chosen for the image."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.errors import ModelError
from tvm_structured.structures import Budget, Conv2d, Dense, Winograd
from tvm_structured.structures.winograd import TILES, transforms

VARIANTS = [(tile, kernel) for kernel, tiles in TILES.items() for tile in tiles]
RNG = np.random.default_rng(0)


def conv(out: int = 5, inner: int = 3, kernel: int = 3, dtype: str = "float64", **geometry: Any) -> Conv2d:
    return Conv2d("block.conv.weight", RNG.standard_normal((out, inner, kernel, kernel)).astype(dtype), **geometry)


def reference(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """In float64."""
    return torch.conv2d(torch.from_numpy(x).double(), torch.from_numpy(np.ascontiguousarray(weight)).double()).numpy()


def times(matrix: Any, vector: list[Fraction]) -> list[Fraction]:
    return [sum((c * v for c, v in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


# -- the matrices ----------------------------------------------------------------------------------------


def test_all_promised_variants_exist():
    assert set(VARIANTS) == {(2, 3), (4, 3), (6, 3), (2, 5), (4, 5)}


@pytest.mark.parametrize(("tile", "kernel"), VARIANTS)
def test_transforms_are_an_identity_of_rational_numbers(tile, kernel):
    """A^T [(G g) * (B^T d)] is bilinear: equal to the correlation for all unit vectors means equal always."""
    a_t, g, b_t = transforms(tile, kernel)
    size = tile + kernel - 1
    assert len(a_t) == tile and {len(row) for row in (*a_t, *b_t)} == {size} and {len(row) for row in g} == {kernel}
    for tap, place in product(range(kernel), range(size)):
        weight = [Fraction(k == tap) for k in range(kernel)]
        data = [Fraction(i == place) for i in range(size)]
        products = [u * v for u, v in zip(times(g, weight), times(b_t, data), strict=True)]
        expected = [sum(data[i + k] * weight[k] for k in range(kernel)) for i in range(tile)]
        assert times(a_t, products) == expected


@pytest.mark.parametrize(("tile", "kernel"), VARIANTS)
def test_transforms_of_data_are_exact_in_float32(tile, kernel):
    a_t, _, b_t = transforms(tile, kernel)
    for entry in (c for matrix in (a_t, b_t) for row in matrix for c in row):
        assert Fraction(float(np.float32(float(entry)))) == entry


# -- the convolution -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    variant=st.sampled_from(VARIANTS),
    batch=st.integers(1, 3),
    out=st.integers(1, 6),
    inner=st.integers(1, 6),
    extra=st.tuples(st.integers(0, 14), st.integers(0, 14)),
    seed=st.integers(0, 2**32 - 1),
)
def test_apply_equals_the_convolution(variant, batch, out, inner, extra, seed):
    tile, kernel = variant
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out, inner, kernel, kernel))
    x = rng.standard_normal((batch, inner, kernel + extra[0], kernel + extra[1]))
    member = Winograd.from_dense(Conv2d("w", weight), tile=tile)
    expected = reference(x, weight)
    np.testing.assert_allclose(member.apply(x), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(member.apply(torch.from_numpy(x)).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("tile", "kernel"), VARIANTS)
def test_gradients_are_those_of_the_convolution(tile, kernel):
    layer = conv(kernel=kernel)
    x = torch.from_numpy(RNG.standard_normal((2, 3, 11, 9)))
    weight = torch.from_numpy(layer.weight)
    results = []
    for function in (
        lambda x, w: Winograd((5, 3 * kernel**2), tile, w).apply(x),
        lambda x, w: torch.conv2d(x, w),
    ):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        function(*inputs).square().sum().backward()
        results.append([tensor.grad for tensor in inputs])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("tile", "kernel", "bound"), [(2, 3, 1e-6), (4, 3, 3e-6), (6, 3, 2e-5), (2, 5, 3e-6), (4, 5, 2e-5)]
)
def test_rounding_in_float32_stays_small(tile, kernel, bound):
    """Bounds are about three times what 64 channels of normal data show."""
    layer = conv(8, 64, kernel, "float32")
    x = RNG.standard_normal((1, 64, 20, 20)).astype(np.float32)
    y, expected = Winograd.from_dense(layer, tile=tile).apply(x), reference(x, layer.weight)
    assert y.dtype == np.float32
    assert np.linalg.norm(y - expected) <= bound * np.linalg.norm(expected)


def test_float32_torch_inputs_meet_a_numpy_weight():
    layer = conv(dtype="float32")
    x = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
    y = Winograd.from_dense(layer).apply(torch.from_numpy(x))
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), reference(x, layer.weight), rtol=1e-4, atol=1e-4)


def test_transformed_weight_is_the_definition():
    layer = conv(4, 3, 3)
    member = Winograd.from_dense(layer, tile=4)
    g = np.array([[float(c) for c in row] for row in transforms(4, 3)[1]])
    expected = np.array([[g @ kernel @ g.T for kernel in filters] for filters in layer.weight])
    np.testing.assert_allclose(member.transformed_weight(), expected.transpose(2, 3, 0, 1).reshape(36, 4, 3), rtol=1e-6)


# -- what is taken, and which tile -----------------------------------------------------------------------


REFUSED = {
    "stride": conv(stride=(2, 2)),
    "stride in one direction": conv(stride=(1, 2)),
    "dilation": conv(dilation=(2, 2)),
    "groups": conv(4, 2, groups=2),
    "kernel of 7": conv(kernel=7),
    "pointwise": conv(kernel=1),
    "kernel 1 x 3": Conv2d("w", np.ones((2, 2, 1, 3))),
    "kernel 3 x 5": Conv2d("w", np.ones((2, 2, 3, 5))),
    "dense": Dense("w", np.ones((4, 9))),
}


@pytest.mark.parametrize("layer", REFUSED.values(), ids=REFUSED)
def test_other_layers_are_not_taken(layer):
    assert not Winograd.takes(layer)
    assert Winograd.detect(layer) is None
    assert Winograd.project(layer, Budget(max_error=1.0)) is None
    assert list(Winograd.sizes(layer)) == []
    with pytest.raises(ModelError, match=f"{layer.name}.*leave this layer dense"):
        Winograd.from_dense(layer, tile=4)


def test_an_unknown_tile_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match=r"tile 3 .*\[2, 4, 6\]"):
        Winograd.from_dense(conv(), tile=3)
    with pytest.raises(ModelError, match=r"tile 6 .*\[2, 4\]"):
        Winograd.from_dense(conv(kernel=5), tile=6)


@pytest.mark.parametrize(
    ("image", "padding", "tile"),
    [
        ((56, 56), 1, 4),
        ((7, 7), 1, 2),
        ((8, 8), 1, 4),
        ((14, 300), 1, 4),
        ((300, 5), 1, 2),
        (None, 1, 4),
        ((9, 9), 0, 2),
    ],
)
def test_detection_chooses_the_tile_for_the_image(image, padding, tile):
    found = Winograd.detect(conv(64, 64, 3, "float32", padding=(padding,) * 4, input_hw=image))
    assert found is not None and found.tile == tile


def test_the_least_exact_tile_is_never_chosen_unasked():
    for size in range(3, 60):
        found = Winograd.detect(conv(16, 16, input_hw=(size, size)))
        assert found is not None and found.tile in (2, 4)


def test_the_weight_is_kept_and_nothing_is_lost():
    layer = conv(dtype="float32")
    member = Winograd.detect(layer)
    assert member is not None
    np.testing.assert_array_equal(member.dense(), layer.matrix)
    assert member.error(layer) == 0 and member.num_params == layer.num_params


def test_a_budget_for_parameters_is_never_met():
    layer = conv(64, 64, input_hw=(56, 56))
    for budget in (0.99, Budget(max_params=0.5), Budget(max_params=0.5, max_error=0.5)):
        assert Winograd.project(layer, budget) is None
    assert Winograd.project(layer, 1.0) is not None


def test_budgets_for_operations_and_errors_are_met_where_they_can_be():
    layer = conv(64, 64, input_hw=(56, 56))
    member = Winograd.project(layer, Budget(max_flops=0.5, max_error=0.0))
    assert member is not None and member.flops(layer.rows(1)) <= 0.5 * layer.flops(1)
    assert Winograd.project(layer, Budget(max_flops=0.05)) is None


def test_operations_are_counted_with_both_transforms():
    """More than the products alone, fewer than the direct convolution; larger tiles need fewer products."""
    layer, rows = conv(64, 64), 56 * 56
    direct = 2 * rows * layer.num_params
    counts = []
    for tile in (2, 4, 6):
        products = 2 * rows * 64 * 64 * (tile + 2) ** 2 // tile**2
        count = Winograd.from_dense(layer, tile=tile).flops(rows)
        assert products < count < direct
        counts.append(count - products)
    assert counts[0] < counts[2]  # transforms of larger tiles cost more for each output
