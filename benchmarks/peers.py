"""The others: PyTorch and ONNX Runtime on the same layer, each as fast as its users can make it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils import mkldnn

Call = Callable[[], Any]


def linear_peers(weight: np.ndarray, x: np.ndarray, threads: int) -> dict[str, Call]:
    """Calls of a linear layer without bias, by the name of the peer."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).eval()
    module.weight.data = torch.from_numpy(weight)
    return {
        "torch": torch_call(module, x),
        "torch.compile": compiled_torch_call(module, x),
        "torch mkldnn": mkldnn_call(module, x),
        "ort": onnxruntime_linear(weight, x, threads),
    }


def torch_call(module: torch.nn.Module, x: np.ndarray) -> Call:
    """Eager PyTorch without gradients."""
    tensor = torch.from_numpy(x)

    def call() -> Any:
        with torch.inference_mode():
            return module(tensor)

    return call


def compiled_torch_call(module: torch.nn.Module, x: np.ndarray) -> Call:
    """torch.compile with frozen weights, which it then packs."""
    tensor = torch.from_numpy(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, dynamic=False)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled(tensor)

    def call() -> Any:
        with torch.no_grad():
            return compiled(tensor)

    return call


def mkldnn_call(module: torch.nn.Module, x: np.ndarray) -> Call:
    """oneDNN with a weight in its own layout; x and y are ordinary tensors."""
    tensor = torch.from_numpy(x)
    with torch.no_grad():
        packed = mkldnn.to_mkldnn(module)

    def call() -> Any:
        with torch.no_grad():
            return packed(tensor.to_mkldnn()).to_dense()

    return call


def onnxruntime_linear(weight: np.ndarray, x: np.ndarray, threads: int) -> Call:
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
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((rows, out), np.float32)))
    return lambda: session.run_with_iobinding(binding)
