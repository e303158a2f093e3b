"""What every member of STRUCTURES promises of `apply`, of its accounts and of its storage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from structure_samples import (
    FAMILIES,
    TOLERANCE,
    USUAL,
    distance,
    expected_output,
    make_input,
    make_layer,
    members,
    some_sizes,
    with_torch,
)

from tvm_structured.errors import ModelError
from tvm_structured.structures import as_layer

# -- apply ----------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_apply_is_the_product_with_dense(family, dtype):
    for layer, _, member in members(family, (*USUAL, (7, 13), (1, 12), (7, 5, 3, 3)), dtype, 2):
        for lead in ((), (3,), (2, 3), (0,)):
            x = make_input(family, layer, lead, dtype)
            y = member.apply(x)
            expected = expected_output(family, layer, member, x)
            assert y.shape == expected.shape and y.dtype == x.dtype
            assert distance(y, expected) <= TOLERANCE[dtype]


@FAMILIES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_apply_in_torch_equals_numpy(family, dtype):
    for layer, _, member in members(family, (*USUAL, (7, 13), (7, 5, 3, 3)), dtype, 2):
        held = with_torch(member, getattr(torch, dtype))
        for lead in ((), (2, 3)):
            x = make_input(family, layer, lead, dtype)
            y = held.apply(torch.from_numpy(x))
            assert isinstance(y, torch.Tensor) and y.dtype == getattr(torch, dtype)
            assert distance(y.numpy(), expected_output(family, layer, member, x)) <= TOLERANCE[dtype]


@FAMILIES
def test_apply_takes_non_contiguous_inputs(family):
    for layer, _, member in members(family, count=1):
        x = np.repeat(make_input(family, layer, (4,), "float32"), 2, axis=-1)[..., ::2]
        assert distance(member.apply(x), expected_output(family, layer, member, x)) <= TOLERANCE["float32"]


@FAMILIES
def test_gradients_of_apply_are_right(family):
    shapes = ((6, 8), (4, 4, 3, 3), (3, 2, 5, 5))
    for layer, _, member in members(family, shapes, "float64", 1):
        held = with_torch(member)
        names = list(member.factors)
        trained = [held.factors[name].detach().requires_grad_() for name in held.trainable_factors]
        x = torch.from_numpy(make_input(family, layer, (3,), "float64")).requires_grad_()

        def output(x, *trained, held=held, names=names, family=family):
            values = {**held.factors, **dict(zip(held.trainable_factors, trained, strict=True))}
            return family.from_factors(held.sizes_of, [values[name] for name in names]).apply(x)

        assert torch.autograd.gradcheck(output, (x, *trained), fast_mode=True)


# -- accounts and storage -------------------------------------------------------------------------------


@FAMILIES
def test_error_is_the_relative_distance_in_float64(family):
    for layer, _, member in members(family):
        assert member.error(layer) == pytest.approx(distance(member.dense(), layer.matrix), rel=1e-5, abs=1e-7)
        assert member.error(layer.weight) == member.error(layer)


@FAMILIES
def test_parameters_bytes_and_operations_are_counted(family):
    for layer, _, member in members(family):
        factors = {name: np.asarray(array) for name, array in member.factors.items()}
        assert set(member.trainable_factors) <= set(factors)
        assert member.num_params == sum(factors[name].size for name in member.trainable_factors)
        assert member.num_bytes == sum(array.nbytes for array in factors.values())
        assert 0 < member.flops(1) <= member.flops(7) <= member.flops(1000)
        assert member.shape == layer.matrix.shape == np.asarray(member.dense()).shape
        assert isinstance(member.describe(), str) and member.describe()


@FAMILIES
def test_factors_and_sizes_rebuild_the_member_through_json(family):
    for _, _, member in members(family, (*USUAL, (7, 5, 3, 3))):
        sizes = json.loads(json.dumps(member.sizes_of))
        again = family.from_factors(sizes, list(member.factors.values()))
        assert again.sizes_of == member.sizes_of
        assert again.describe() == member.describe()
        assert again.num_params == member.num_params
        np.testing.assert_array_equal(again.dense(), member.dense())


@FAMILIES
def test_float_types_of_weights_are_kept(family):
    for dtype in ("float16", "float32", "float64"):
        for layer, _, member in members(family, dtype=dtype, count=1):
            assert all(member.factors[name].dtype == dtype for name in member.trainable_factors)
            assert np.asarray(member.dense()).dtype == dtype
            assert np.isfinite(member.error(layer))


@FAMILIES
def test_layout_of_the_weight_in_memory_does_not_matter(family):
    for shape in USUAL:
        layer = make_layer(shape)
        reversed_axes = np.ascontiguousarray(layer.weight.T).T
        every_second = np.repeat(layer.weight, 2, axis=1)[:, ::2]
        for size in some_sizes(family, layer, 1):
            expected = family.from_dense(layer, **size).dense()
            for weight in (reversed_axes, every_second):
                assert not weight.flags.c_contiguous
                assert distance(family.from_dense(as_layer(weight), **size).dense(), expected) <= 1e-6


@FAMILIES
@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((0, 4), np.float32),
        np.zeros((4, 0), np.float32),
        np.zeros((4, 0, 3, 3), np.float32),
        np.array([[1.0, np.nan]]),
        np.array([[1.0, np.inf]]),
        np.ones((4, 4), np.int32),
        np.ones((4, 4), bool),
        np.ones((4, 4), complex),
        np.ones(4),
        np.ones((4, 4, 3)),
        "weight",
    ],
    ids=["no rows", "no columns", "no channels", "nan", "inf", "int", "bool", "complex", "1-d", "3-d", "text"],
)
def test_weights_that_are_none_are_refused(family, weight):
    with pytest.raises(ModelError, match="weight"):
        family.detect(weight)
    with pytest.raises(ModelError, match="weight"):
        family.project(weight, 0.5)
