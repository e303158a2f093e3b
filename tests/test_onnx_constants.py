"""What ONNX graphs compute from constants is computed before TVM sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tvm_structured as ts
from tvm_structured.onnx_constants import fold_constants

THREE_AXES = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["p", "q", "r"])


def model_of(nodes: list[Any], x_shape: list[Any], constants: dict[str, np.ndarray], y: Any = THREE_AXES) -> Any:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [y],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    return model


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def computed_pads(x_shape: list[Any]) -> Any:
    """As torch writes `F.pad`: the pads are concatenated and turned around."""
    nodes = [
        helper.make_node("ConstantOfShape", ["four"], ["zeros"], value=numpy_helper.from_array(ints(0))),
        helper.make_node("Concat", ["given", "zeros"], ["all"], axis=0),
        helper.make_node("Reshape", ["all", "pairs"], ["table"]),
        helper.make_node("Slice", ["table", "last", "first", "rows", "back"], ["turned"]),
        helper.make_node("Transpose", ["turned"], ["columns"], perm=[1, 0]),
        helper.make_node("Reshape", ["columns", "flat"], ["pads"]),
        helper.make_node("Pad", ["x", "pads"], ["y"]),
    ]
    constants = {"given": ints(1, 2), "four": ints(4), "pairs": ints(-1, 2), "flat": ints(-1)}
    constants |= {"last": ints(-1), "first": ints(-(2**62)), "rows": ints(0), "back": ints(-1)}
    return model_of(nodes, x_shape, constants)


def test_computed_paddings_are_numbers() -> None:
    model = computed_pads([2, 3, 4])
    folded = fold_constants(model)
    assert [node.op_type for node in folded.graph.node] == ["Constant"] * 6 + ["Pad"]
    np.testing.assert_array_equal(ts.compile(model, measure=False)(X), np.pad(X, ((0, 0), (0, 0), (1, 2))))


@pytest.mark.parametrize("inputs", [None, (X,)])
def test_counts_come_from_shapes_where_these_are_known(inputs: Any) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "axis"], ["k"]),
        helper.make_node("TopK", ["x", "k"], ["y", "places"], axis=-1),
    ]
    model = model_of(nodes, ["n", 3, 4] if inputs else [2, 3, 4], {"axis": ints(-1)})
    compiled = ts.compile(model, inputs, measure=False)
    np.testing.assert_array_equal(np.asarray(compiled(X)), -np.sort(-X))


def test_nothing_is_known_of_an_open_batch() -> None:
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [3])
    model = model_of([helper.make_node("Shape", ["x"], ["y"])], ["n", 3, 4], {}, y)
    assert fold_constants(model) is model


def test_weights_stay_what_they_are_and_keep_their_names() -> None:
    weight = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["fc.weight"], ["turned"]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    model = model_of(nodes, [2, 3, 4], {"fc.weight": weight})
    assert fold_constants(model) is model
    compiled = ts.compile(model, measure=False)
    assert [row.layer for row in compiled.report().rows] == ["fc.weight"]
    np.testing.assert_allclose(compiled(X), X @ weight.T, atol=1e-5)


def test_random_numbers_are_no_constants() -> None:
    nodes = [
        helper.make_node("RandomNormal", [], ["noise"], shape=[4]),
        helper.make_node("Add", ["x", "noise"], ["y"]),
    ]
    assert [node.op_type for node in fold_constants(model_of(nodes, [2, 3, 4], {})).graph.node] == [
        "RandomNormal",
        "Add",
    ]
