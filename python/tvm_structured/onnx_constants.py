"""Shapes, paddings and counts that an ONNX graph computes from constants and known shapes --> Constant nodes.

Exporters write `pads` or `k` as small graphs (Shape, Gather, Concat, ...); TVM's importer wants the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LARGEST = 4096  # elements of integers
FLOATS = 16  # elements of other constants: weights are none of this module's business, and keep their names
RANDOM = (
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
)


def fold_constants(model: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> Any:
    """The model with such nodes as Constant nodes; the model itself where there are none.

    shapes: those of inputs, where the model leaves them open. A node that onnx's reference implementation cannot
    compute stays.
    """
    known = small_constants(model.graph)
    asks = any(node.op_type == "Shape" for node in model.graph.node)
    extents = known_shapes(model, shapes or {}) if asks else {}
    folded: dict[int, list[Any]] = {}
    for number, node in enumerate(model.graph.node):
        if node.op_type == "Constant" or node.op_type in RANDOM or any(len(a.g.node) for a in node.attribute):
            continue
        values = evaluate(node, known, extents, model)
        if values is not None:
            known.update(zip(node.output, values, strict=False))
            folded[number] = values
    return with_constants(model, folded) if folded else model


def small_constants(graph: Any) -> dict[str, np.ndarray]:
    """Name -> value of the constants that shapes may be computed from."""
    from onnx import numpy_helper

    nodes = [node for node in graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]
    written = {node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in nodes}
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer if np.prod(t.dims) <= LARGEST}
    integers = {name: array for name, array in {**stored, **written}.items() if array.dtype.kind in "iub"}
    floats = {name: array for name, array in written.items() if array.dtype.kind == "f" and array.size <= FLOATS}
    return {**floats, **{name: array for name, array in integers.items() if array.size <= LARGEST}}


def known_shapes(model: Any, given: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Name -> shape of the values whose shape is known before the model runs."""
    import onnx
    from onnx import helper

    graph = onnx.GraphProto()
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    for value in graph.input:
        for dim, extent in zip(value.type.tensor_type.shape.dim, given.get(value.name, ()), strict=False):
            dim.dim_value = extent
    named = {value.name for value in graph.input}
    for tensor in model.graph.initializer:  # large ones without their data
        if np.prod(tensor.dims) <= LARGEST:
            graph.initializer.append(tensor)
        elif tensor.name not in named:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph.name = "shapes"
    try:
        skeleton = helper.make_model(graph, opset_imports=model.opset_import)
        graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except Exception:  # of several kinds, for a model that does not check: nothing is known
        return {}
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.dim_value > 0 for dim in dims):
            found[value.name] = np.array([dim.dim_value for dim in dims], np.int64)
    return found


def evaluate(node: Any, known: Mapping[str, np.ndarray], extents: Mapping[str, np.ndarray], model: Any) -> Any:
    """The outputs of a node whose inputs are known, all small; else None."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    if node.op_type == "Shape" and not node.attribute:
        shape = extents.get(node.input[0])
        return None if shape is None else [shape]
    if not all(name in known for name in node.input if name):
        return None
    try:
        inputs = [helper.make_tensor_value_info(name, onnx_type(known[name]), None) for name in node.input if name]
        outputs = [helper.make_tensor_value_info(name, 0, None) for name in node.output]
        graph = helper.make_graph([node], "node", inputs, outputs)
        alone = helper.make_model(graph, opset_imports=model.opset_import)
        values = ReferenceEvaluator(alone).run(None, {name: known[name] for name in node.input if name})
    except Exception:  # what onnx cannot compute is left to TVM
        return None
    return values if all(isinstance(v, np.ndarray) and v.size <= LARGEST for v in values) else None


def onnx_type(array: np.ndarray) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def with_constants(model: Any, folded: Mapping[int, Sequence[np.ndarray]]) -> Any:
    """The model with the numbered nodes as Constant nodes."""
    import onnx
    from onnx import helper, numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    for number, node in enumerate(model.graph.node):
        if number not in folded:
            result.graph.node.append(node)
            continue
        for name, value in zip(node.output, folded[number], strict=False):
            result.graph.node.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)))
    return result
