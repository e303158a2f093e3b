"""Weights in half precision are members where rounding explains the difference, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16, finfo

from tvm_structured.structures import STRUCTURES, Dense, as_layer

TYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
SIZES = {
    "low_rank": {"rank": 8},
    "block_circulant": {"block": 8},
    "permuted_diagonal": {"block": 4},
    "tensor_train": {"out_modes": (6, 4, 4), "in_modes": (8, 4, 4), "rank": 4},
    "toeplitz_like": {"rank": 2},
    "debut": {"chain": ((64, 128, 4, 8, 1), (96, 64, 24, 16, 4))},
}
CONVS = {"low_rank": {"rank": 5}, "spatial_low_rank": {"rank": 4}, "tucker": {"ranks": (6, 5)}, "cp": {"rank": 3}}


def member_of(name, shape, size, seed=0):
    noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return STRUCTURES[name].from_dense(as_layer(0.02 * noise), **size)


def rounded(matrix, shape, dtype):
    """The member's weight as a tensor in half precision."""
    layer = as_layer(np.ones(shape, np.float32)).with_matrix(np.asarray(matrix, np.float32))
    return torch.from_numpy(np.ascontiguousarray(layer.weight)).to(getattr(torch, dtype))


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@TYPES
def test_the_tolerance_is_what_rounding_to_nearest_can_do(dtype):
    numbers = np.random.default_rng(0).standard_normal((60, 50)).astype(np.float32)
    layer = as_layer(torch.from_numpy(numbers).to(getattr(torch, dtype)))
    held = layer.weight.astype(np.float64)
    unit = np.exp2(np.floor(np.log2(np.abs(held)))) * float(finfo(dtype).eps)
    assert layer.tolerance == pytest.approx(np.linalg.norm(unit / 2) / np.linalg.norm(held), rel=1e-6)
    # the error that was made, and the largest that any single number may have
    assert relative(held, numbers) < layer.tolerance < float(finfo(dtype).eps) / 2


def test_subnormal_numbers_and_zeros_are_counted_as_they_are_rounded():
    sparse = np.zeros((64, 64), np.float16)
    sparse[::3] = 0.7
    assert as_layer(sparse).tolerance == as_layer(sparse[::3]).tolerance
    assert as_layer(np.zeros((3, 3), np.float16)).tolerance == 1e-5
    tiny = np.float16(1e-6) * np.ones((4, 4), np.float16)
    expected = np.spacing(tiny[0, 0]).astype(np.float64) / 2 / float(tiny[0, 0])
    assert as_layer(tiny).tolerance == pytest.approx(expected, rel=1e-6)


def test_wider_weights_keep_the_strict_tolerance():
    for dtype in (np.float32, np.float64):
        assert as_layer(np.ones((3, 4), dtype)).tolerance == 1e-5
    stored = Dense("w", np.ones((3, 4), np.float32), stored="bfloat16")
    assert stored.tolerance > 1e-3


@TYPES
@pytest.mark.parametrize("name", SIZES)
def test_a_rounded_member_is_found(name, dtype):
    member = member_of(name, (96, 128), SIZES[name])
    weight = rounded(member.dense(), (96, 128), dtype)
    found = STRUCTURES[name].detect(weight)
    assert found is not None and found.num_params <= member.num_params
    assert relative(found.dense(), weight.double().numpy()) <= as_layer(weight).tolerance


@TYPES
@pytest.mark.parametrize("name", CONVS)
def test_a_rounded_member_of_convolutions_is_found(name, dtype):
    shape = (16, 12, 3, 3)
    member = member_of(name, shape, CONVS[name])
    weight = rounded(member.dense(), shape, dtype)
    found = STRUCTURES[name].detect(weight)
    assert found is not None and found.num_params <= member.num_params
    assert found.error(weight) <= as_layer(weight).tolerance


@TYPES
@pytest.mark.parametrize("name", SIZES)
def test_what_rounding_does_not_explain_is_not_found(name, dtype):
    member = np.asarray(member_of(name, (96, 128), SIZES[name]).dense(), np.float32)
    noise = np.random.default_rng(1).standard_normal(member.shape).astype(np.float32)
    limit = as_layer(rounded(member, (96, 128), dtype)).tolerance
    disturbed = member + noise * (5 * limit * np.linalg.norm(member) / np.linalg.norm(noise))
    assert STRUCTURES[name].detect(rounded(disturbed, (96, 128), dtype)) is None
    assert STRUCTURES[name].detect(rounded(noise, (96, 128), dtype)) is None


def test_numpy_arrays_and_tensors_are_found_alike():
    matrix = np.asarray(member_of("low_rank", (40, 30), {"rank": 3}).dense(), np.float32)
    for array, dtype in ((matrix.astype(np.float16), "float16"), (matrix.astype(bfloat16), "bfloat16")):
        found, again = (STRUCTURES["low_rank"].detect(w) for w in (array, rounded(matrix, (40, 30), dtype)))
        assert found is not None and again is not None
        np.testing.assert_array_equal(found.dense(), again.dense())
        assert found.u.dtype == np.float32  # rounding the factors as well would take the member off again


def test_a_tolerance_that_is_given_counts():
    matrix = np.asarray(member_of("low_rank", (40, 30), {"rank": 3}).dense()).astype(np.float16)
    assert STRUCTURES["low_rank"].detect(matrix) is not None
    assert STRUCTURES["low_rank"].detect(matrix, 1e-5) is None
