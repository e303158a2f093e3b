"""Layers, budgets and what `Structure` derives for a family that writes its four members only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tvm_structured.errors import BudgetError, ModelError
from tvm_structured.structures import Budget, Conv2d, Dense, Structure, Unstructured, as_budget, as_layer, factor


def random(*shape):
    return np.random.default_rng(list(shape)).standard_normal(shape)


# -- layers ---------------------------------------------------------------------------------------------


def test_arrays_become_layers_by_their_rank():
    assert isinstance(as_layer(random(3, 4)), Dense)
    assert isinstance(as_layer(random(3, 4, 5, 5)), Conv2d)
    layer = as_layer(random(3, 4), "fc1.weight")
    assert as_layer(layer) is layer and layer.name == "fc1.weight"


def test_torch_parameters_become_layers():
    parameter = torch.nn.Linear(4, 3).weight
    np.testing.assert_array_equal(as_layer(parameter).weight, parameter.detach().numpy())


@pytest.mark.parametrize("shape", [(), (3,), (3, 4, 5), (1, 2, 3, 4, 5)])
def test_other_ranks_are_refused(shape):
    with pytest.raises(ModelError, match=r"fc1: a weight has 2 .* or 4 .* dimensions"):
        as_layer(np.ones(shape), "fc1")


def test_a_refused_weight_is_named_and_counted():
    with pytest.raises(ModelError, match="fc1: weight holds 2 NaN or Inf"):
        as_layer(np.array([[1.0, np.nan, np.inf]]), "fc1")
    with pytest.raises(ModelError, match="fc1: weights must be floating point, got int8"):
        as_layer(np.ones((2, 2), np.int8), "fc1")
    with pytest.raises(ModelError, match=r"fc1: weight of shape \(0, 3\) is empty"):
        as_layer(Dense("fc1", np.ones((0, 3))))


def test_convolutions_flatten_channel_fastest():
    layer = as_layer(random(2, 3, 4, 5))
    for out, channel, y, x in np.ndindex(2, 3, 4, 5):
        assert layer.matrix[out, (y * 5 + x) * 3 + channel] == layer.weight[out, channel, y, x]
    assert layer.taps == 20 and layer.kernel == (4, 5)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3, 3), (1, 1, 1, 1)])
def test_a_layer_takes_another_matrix(shape):
    layer = as_layer(random(*shape), "some.weight")
    other = layer.with_matrix(2 * layer.matrix)
    np.testing.assert_array_equal(other.weight, 2 * layer.weight)
    assert (type(other), other.name) == (type(layer), "some.weight")


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 2, 0, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_geometry_of_a_convolution_is_that_of_torch(stride, padding, dilation, groups):
    weight = random(6, 4 // groups, 3, 2)
    layer = Conv2d("conv", weight, stride, padding, dilation, groups, (11, 9))
    top, left, bottom, right = padding
    image = torch.nn.functional.pad(torch.zeros(5, 4, 11, 9, dtype=torch.float64), (left, right, top, bottom))
    y = torch.conv2d(image, torch.from_numpy(weight), stride=stride, dilation=dilation, groups=groups)
    assert layer.output_hw == tuple(y.shape[2:])
    assert layer.rows(5) == 5 * y.shape[2] * y.shape[3]
    assert layer.flops(5) == 2 * y.numel() * weight[0].size


def test_an_unknown_image_counts_as_one_position():
    layer = as_layer(random(6, 4, 3, 3))
    assert layer.output_hw is None and layer.rows(7) == 7
    assert Dense("fc", random(3, 4)).flops(7) == 2 * 7 * 12


# -- budgets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["max_params", "max_flops", "max_error"])
@pytest.mark.parametrize("value", [-0.1, 1.0001, float("nan"), float("inf"), "0.5", True, [0.5]])
def test_budgets_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(BudgetError, match=field):
        Budget(**{field: value})


def test_zero_is_an_error_but_no_size():
    assert Budget(max_error=0).max_error == 0
    for field in ("max_params", "max_flops"):
        with pytest.raises(BudgetError, match=field):
            Budget(**{field: 0})


def test_numbers_are_budgets_of_parameters():
    assert as_budget(0.25) == Budget(max_params=0.25)
    assert as_budget(1) == Budget(max_params=1)
    budget = Budget(max_error=0.1)
    assert as_budget(budget) is budget


@pytest.mark.parametrize("value", [None, "0.5", True, {"max_params": 0.5}])
def test_other_budgets_are_refused(value):
    with pytest.raises(BudgetError, match=r"ts\.Budget or a fraction"):
        as_budget(value)


# -- what is derived ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ConstantRows(Structure):
    """Every row of W is constant in groups of `group` columns: the least a family has to write."""

    name: ClassVar[str] = "constant_rows"
    accepts: ClassVar[tuple[type, ...]] = (Dense, Conv2d)

    group: int
    values: Any = factor()
    order: Any = factor(trainable=False)

    @classmethod
    def sizes(cls, layer) -> Iterator[dict[str, int]]:
        inner = layer.matrix.shape[1]
        yield from ({"group": g} for g in range(inner, 0, -1) if inner % g == 0)

    @classmethod
    def from_dense(cls, layer, *, group):
        out, inner = layer.matrix.shape
        means = layer.matrix.reshape(out, inner // group, group).mean(axis=2)
        return cls((out, inner), group, means, np.arange(inner // group))

    def apply(self, x):
        return x.reshape((*x.shape[:-1], -1, self.group)).sum(-1)[..., self.order] @ self.values.T

    def flops(self, rows):
        return 2 * rows * self.num_params


def test_a_family_of_four_members_detects_and_projects():
    planted = np.repeat(random(5, 3), 4, axis=1)
    found = ConstantRows.detect(planted)
    assert found is not None and found.group == 4
    np.testing.assert_allclose(found.dense(), planted, atol=1e-12)
    assert ConstantRows.detect(random(5, 12)) is None
    nearest = ConstantRows.project(random(5, 12), 0.5)
    assert nearest.group == 2
    smallest = ConstantRows.project(planted + 1e-3 * random(5, 12), Budget(max_error=0.1))
    assert smallest.group == 4
    assert ConstantRows.project(random(5, 12), Budget(max_params=0.5, max_error=1e-3)) is None


def test_derived_accounts_separate_indices_from_parameters():
    member = ConstantRows.from_dense(as_layer(random(5, 12)), group=4)
    assert member.trainable_factors == ("values",) and list(member.factors) == ["values", "order"]
    assert member.num_params == 15
    assert member.num_bytes == 15 * 8 + 3 * 8
    assert member.sizes_of == {"shape": (5, 12), "group": 4}


def test_error_of_a_zero_weight_is_absolute():
    member = ConstantRows((2, 4), 4, np.ones((2, 1)), np.arange(1))
    assert member.error(np.zeros((2, 4))) == pytest.approx(np.sqrt(8))


def test_grouped_convolutions_are_left_to_the_dense_family():
    layer = Conv2d("grouped", random(4, 2, 3, 3), groups=2)
    assert not ConstantRows.takes(layer)
    assert Unstructured.takes(layer)
    np.testing.assert_array_equal(Unstructured.from_dense(layer).dense(), layer.matrix)
