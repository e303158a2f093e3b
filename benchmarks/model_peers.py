"""The others on whole models: PyTorch in its four settings, ONNX Runtime and plain TVM, each as fast as users get it.

A peer is made by `make(module, x)` and returns a call whose result `to_numpy` understands; a peer that cannot run
a model raises, and the benchmark prints why.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tvm_structured.targets import physical_cores

Call = Callable[[], Any]


class NotApplicable(Exception):
    """The peer's setting means nothing for this model."""


def to_numpy(output: Any) -> np.ndarray:
    """The first output, as numpy."""
    if isinstance(output, (tuple, list)):
        output = output[0]
    if isinstance(output, onnxruntime.OrtValue):
        return output.numpy()
    if isinstance(output, torch.Tensor):
        return (output.to_dense() if output.is_mkldnn else output).numpy()
    return np.asarray(output)


def inference(function: Callable[..., Any], *inputs: Any) -> Call:
    def call() -> Any:
        with torch.inference_mode():
            return function(*inputs)

    return call


def eager(module: nn.Module, x: torch.Tensor) -> Call:
    return inference(module, x)


def channels_last(module: nn.Module, x: torch.Tensor) -> Call:
    """Convolutions in the layout that oneDNN prefers."""
    if x.dim() != 4 or not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        raise NotApplicable("no images")
    memory = torch.channels_last
    return inference(copy.deepcopy(module).to(memory_format=memory), x.to(memory_format=memory))


def compiled(module: nn.Module, x: torch.Tensor) -> Call:
    """torch.compile with its default settings."""
    call = inference(torch.compile(module), x)
    call()
    return call


def frozen(module: nn.Module, x: torch.Tensor) -> Call:
    """torch.compile with frozen weights: batch-norm folded, weights packed by oneDNN beforehand."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch(freezing=True):
        call = inference(torch.compile(module), x)
        call()
    return call


def prepacked(module: nn.Module, x: torch.Tensor) -> Call:
    """Eager PyTorch with weights in oneDNN's blocked layout, activations too between the layers."""
    from torch.utils.mkldnn import to_mkldnn

    packed = to_mkldnn(copy.deepcopy(module))
    call = inference(packed, x.to_mkldnn())
    call()
    return call


def onnx_runtime(module: nn.Module, x: torch.Tensor) -> Call:
    """ONNX Runtime with all graph optimisations, inputs and outputs bound beforehand."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with quiet():
            torch.onnx.export(module, (x,), path, dynamo=True, external_data=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        return bound(session, x.numpy(), tuple(module(x).shape))


def onnx_runtime_conv(module: nn.Sequential, x: torch.Tensor) -> Call:
    """ONNX Runtime on a convolution with bias and its ReLU; the graph is written down here, which is faster."""
    conv = module[0]
    with torch.inference_mode():
        shape = tuple(module(x).shape)
    nodes = [
        helper.make_node(
            "Conv",
            ["x", "w", "b"],
            ["c"],
            strides=conv.stride,
            pads=2 * conv.padding,
            kernel_shape=conv.kernel_size,
            group=conv.groups,
        ),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    weights = [numpy_helper.from_array(conv.weight.numpy(), "w"), numpy_helper.from_array(conv.bias.numpy(), "b")]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(s)) for name, s in (("x", x.shape), ("y", shape))
    ]
    graph = helper.make_graph(nodes, "convolution", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
    )
    return bound(session, x.numpy(), shape)


def bound(session: onnxruntime.InferenceSession, x: np.ndarray, shape: tuple[int, ...]) -> Call:
    """A call with the only input and the only output bound beforehand."""
    binding = session.io_binding()
    given = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x))
    output = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
    binding.bind_ortvalue_input(session.get_inputs()[0].name, given)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, output)

    def call() -> Any:
        session.run_with_iobinding(binding)
        return output

    return call


def session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = physical_cores(), 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return options


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell what they do, at length."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def plain_tvm(module: nn.Module, x: torch.Tensor) -> Call:
    """TVM's own pipeline for the same target; nothing of this package."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    from tvm_structured.targets import resolve_target

    target = resolve_target("host")
    mod = from_exported_program(torch.export.export(module, (x,)), unwrap_unit_return_tuple=True)
    with target:
        executable = tvm.compile(mod, target, relax_pipeline=relax.get_default_pipeline(target))
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    tensor = tvm.runtime.tensor(x.numpy())
    return lambda: main(tensor).numpy()


PEERS: dict[str, Callable[[nn.Module, torch.Tensor], Call]] = {
    "eager": eager,
    "channels_last": channels_last,
    "compile": compiled,
    "frozen": frozen,
    "prepacked": prepacked,
    "onnxruntime": onnx_runtime,
}
