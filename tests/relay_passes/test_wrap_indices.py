"""Indices that count from the end: importers leave them as they are, and TVM would read in front of the array."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from graph_harness import Function
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import tvm_structured as ts


def check(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    compiled = ts.compile(Function(function), inputs, measure=False)
    torch.testing.assert_close(compiled(*inputs), function(*inputs), rtol=0, atol=0)


X = torch.arange(2.0 * 12 * 8).reshape(2, 12, 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, -1],
        lambda x: x[-1],
        lambda x: x[..., -8],
        lambda x: x[0, -1],
        lambda x: x.select(1, -12),
        lambda x: x[:, [-1, 2]],
        lambda x: x[[-1, 1], [-2, 0]],
        lambda x: x[:, :, torch.tensor([[-1, -8], [3, -2]])],
        lambda x: x[:, -5:-1],
    ],
)
def test_constant_indices_of_torch(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(function, X)


@pytest.mark.parametrize(
    "function", [lambda x, i: x[i], lambda x, i: x[:, i], lambda x, i: x[i, i], lambda x, i: x[i, i, i]]
)
def test_indices_that_are_inputs(function: Callable[..., torch.Tensor]) -> None:
    check(function, X, torch.tensor([-1, 0, 1, -2]))


@settings(max_examples=20)
@given(st.lists(st.integers(-7, 6), min_size=1, max_size=5), st.integers(0, 2))
def test_any_indices_along_any_axis(indices: list[int], axis: int) -> None:
    x = torch.arange(7.0**3).reshape(7, 7, 7)
    check(lambda x: x[(slice(None),) * axis + (indices,)], x)


def test_gather_of_onnx() -> None:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["x", "i"], ["y"], axis=1)],
        "gather",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 2])],
        [helper.make_tensor("i", TensorProto.INT64, [2], [-1, -5])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    np.testing.assert_array_equal(ts.compile(model, measure=False)(x), x[:, [-1, -5]])


def test_from_the_end_of_an_axis_whose_size_is_not_known() -> None:
    dynamic = ((({0: torch.export.Dim("n", min=2, max=64)},)),)  # the inputs are one argument, *inputs
    program = torch.export.export(Function(lambda x: x[[-1, 0], [1, 2]]), (X,), dynamic_shapes=dynamic)
    with pytest.raises(ts.ModelError, match=r"index -1 counts from the end of an axis of unknown extent"):
        ts.compile(program, measure=False)
    taken = torch.export.export(Function(lambda x: x[-1]), (X,), dynamic_shapes=dynamic)
    torch.testing.assert_close(ts.compile(taken, measure=False)(X), X[-1])
