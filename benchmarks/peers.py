"""The others on one linear layer: see `model_peers`, whose settings these are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from model_peers import Call, bound, eager, frozen, prepacked, session_options
from onnx import TensorProto, helper, numpy_helper


def linear_peers(weight: np.ndarray, x: np.ndarray) -> dict[str, Call]:
    """Calls of a linear layer without bias, by the name of the peer."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).eval().requires_grad_(False)
    module.weight.data = torch.from_numpy(weight)
    tensor = torch.from_numpy(x)
    return {
        "torch": eager(module, tensor),
        "torch.compile": frozen(module, tensor),
        "torch mkldnn": prepacked(module, tensor),
        "ort": onnxruntime_linear(weight, x),
    }


def onnxruntime_linear(weight: np.ndarray, x: np.ndarray) -> Call:
    """ONNX Runtime's MatMul with a constant weight, inputs and outputs bound beforehand."""
    rows, out = x.shape[0], weight.shape[0]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, out])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
    )
    return bound(session, x, (rows, out))
