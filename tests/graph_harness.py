"""Build small models, run the graph passes on them, and run the result without any kernel of ours.

`as_stock_relax` writes every structured operator out in TVM's own operators, with the structure's dense matrix as the
weight: what the passes produce can be checked without trusting a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import tvm
import tvm_ffi
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from tvm import ir, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_structured.dialect import LayerCall
from tvm_structured.frontend import Imported, import_model
from tvm_structured.relay_passes.canonicalize_layers import CanonicalizeLayers
from tvm_structured.relay_passes.find_layers import find_calls, find_layers
from tvm_structured.relay_passes.fuse_epilogue import FuseEpilogue
from tvm_structured.structures import Unstructured

FLOAT = TensorProto.FLOAT
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order, a few hundred terms


# -- models -----------------------------------------------------------------------------------------------


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """An ONNX node; names are separated by spaces."""
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def onnx_model(
    nodes: Sequence[Any], weights: Mapping[str, np.ndarray], x: Sequence[Any], y: Sequence[Any], opset: int = 17
) -> onnx.ModelProto:
    """A model of one input x and one output y, of the given shapes (names stand for symbolic extents)."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, list(x))],
        [helper.make_tensor_value_info("y", FLOAT, list(y))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def onnx_runtime(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """As the model says, without optimisations: those compute products with quantized weights in int8."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def relax_main(body: Callable[..., Any], *shapes: Sequence[Any], dtype: str = "float32") -> tvm.IRModule:
    """A module whose `main` takes x0, x1, ... of these shapes; `body(emit, x0, ...)` gives its result."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(list(shape), dtype)) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs, attrs={"num_input": len(inputs)}):
        with builder.dataflow():
            result = builder.emit_output(body(builder.emit, *inputs))
        builder.emit_func_output(result)
    return builder.get()


def weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def const(value: Any) -> Any:
    return relax.const(np.asarray(value, np.float32))


def batch_norm(rng: np.random.Generator, x: Any, channels: int, axis: int, **options: Any) -> Any:
    """Inference by default; statistics and coefficients are random."""
    mean, gamma, beta, spread = (weight(rng, channels) for _ in range(4))
    statistics = [const(value) for value in (gamma, beta, mean, np.abs(spread) + 0.5)]
    return relax.op.nn.batch_norm(x, *statistics, axis, **{"epsilon": 1e-3, "training": False, **options})


# -- passes -----------------------------------------------------------------------------------------------


def canonical(model: Any, fuse: bool = True) -> tvm.IRModule:
    """The model (torch program, ONNX, Relax) after the canonicalising passes, well formed."""
    imported = import_model(model)
    mod = canonicalized(imported)
    if fuse:
        mod = FuseEpilogue()(mod)
    relax.analysis.well_formed(mod)
    return mod


def canonicalized(imported: Imported) -> tvm.IRModule:
    mod = CanonicalizeLayers(imported.params, imported.names)(imported.mod)
    relax.analysis.well_formed(mod)
    assert [p.name for p in mod["main"].params] == [spec.name for spec in imported.inputs]
    return mod


def operators(mod: tvm.IRModule) -> list[str]:
    """Names of the operators that `main` calls, in order."""
    names: list[str] = []
    tvm_ffi.structural_walk(
        mod["main"], (ir.Call, lambda call: names.append(call.op.name) if isinstance(call.op, ir.Op) else None)
    )
    return names


def only_call(mod: tvm.IRModule) -> LayerCall:
    """The one layer call of a module."""
    ((call,),) = find_calls(mod).values()
    return call


def fused(before: tvm.IRModule) -> tvm.IRModule:
    """A module without parameters, canonical and with epilogues."""
    mod = FuseEpilogue()(CanonicalizeLayers()(before))
    relax.analysis.well_formed(mod)
    return mod


def with_input(layer: LayerCall, x: Any) -> Any:
    return LayerCall(
        layer.op, layer.layer, x, layer.factors, layer.sizes, layer.epilogue, layer.operands, layer.conv
    ).to_relax()


# -- running ----------------------------------------------------------------------------------------------


def run(mod: tvm.IRModule, *inputs: Any) -> Any:
    """Result of `main` with structured operators written out: an array, or a list of them."""
    quick = {"kind": "llvm", "opt-level": 0}  # these models are tiny: compiling takes longer than running
    executable = tvm.compile(as_stock_relax(mod), tvm.target.Target(quick))
    arrays = [np.asarray(x.detach() if hasattr(x, "detach") else x) for x in inputs]
    return as_numpy(relax.VirtualMachine(executable, tvm.cpu())["main"](*arrays))


def run_on_kernels(mod: tvm.IRModule, *inputs: Any) -> Any:
    """Result of `main` with structured operators legalised by themselves, inside TVM's own pipeline."""
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    executable = tvm.compile(mod, target, relax_pipeline=relax.get_default_pipeline(target))
    arrays = [np.asarray(x.detach() if hasattr(x, "detach") else x) for x in inputs]
    return as_numpy(relax.VirtualMachine(executable, tvm.cpu())["main"](*arrays))


def as_numpy(value: Any) -> Any:
    return value.numpy() if hasattr(value, "numpy") else [as_numpy(field) for field in value]


def as_stock_relax(mod: tvm.IRModule) -> tvm.IRModule:
    return _WriteOut(mod).run()


@mutator
class _WriteOut(PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod = mod

    def run(self) -> tvm.IRModule:
        for var, function in self.mod.functions_items():
            if isinstance(function, relax.Function):
                self.builder_.update_func(var, self.visit_expr(function))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        layer = LayerCall.of(call)
        return call if layer is None else self.written_out(layer)

    def written_out(self, layer: LayerCall) -> Any:
        """act(scale * layer(x) + bias + residual), one operator each."""
        emit, op, conv = self.builder_.emit, relax.op, layer.conv
        structure = layer.to_structure()
        if conv is None:
            y = emit(op.matmul(layer.x, const(structure.dense().T)))
            by_feature = (-1,)
        else:
            y = emit(
                op.nn.conv2d(
                    layer.x,
                    const(conv_weight(layer, structure)),
                    strides=list(conv.stride),
                    padding=list(conv.padding),
                    dilation=list(conv.dilation),
                    groups=conv.groups,
                )
            )
            by_feature = (1, -1, 1, 1)
        operands = dict(zip(layer.epilogue.operands, layer.operands, strict=True))
        if "scale" in operands:
            y = emit(op.multiply(y, emit(op.reshape(operands["scale"], by_feature))))
        if "bias" in operands:
            y = emit(op.add(y, emit(op.reshape(operands["bias"], by_feature))))
        if "residual" in operands:
            y = emit(op.add(y, operands["residual"]))
        match layer.epilogue.activation:
            case "relu":
                return op.nn.relu(y)
            case "gelu":
                return op.nn.gelu(y)
            case "gelu_tanh":
                return op.nn.gelu_tanh(y)
            case "silu":
                return op.nn.silu(y)
            case "clip":
                return op.clip(y, layer.epilogue.low, layer.epilogue.high)
        return y


def conv_weight(layer: LayerCall, structure: Any) -> np.ndarray:
    """(out, in / groups, kh, kw) from the matrix (out, kh, kw, in), channel fastest."""
    if isinstance(structure, Unstructured):
        return layer.to_layer().weight
    kh, kw = layer.conv.kernel
    return structure.dense().reshape(structure.shape[0], kh, kw, -1).transpose(0, 3, 1, 2)


# -- checks -----------------------------------------------------------------------------------------------


def check_fused(body: Callable[..., Any], *shapes: Any) -> tvm.IRModule:
    """Fuse, and compare with TVM's own operators on the module as it was. Symbolic extents are 3 at run time."""
    rng = np.random.default_rng(0)
    before = relax_main(body, *shapes)
    mod = fused(before)
    inputs = [weight(rng, *(extent if isinstance(extent, int) else 3 for extent in shape)) for shape in shapes]
    compare(run(mod, *inputs), run(before, *inputs))
    return mod


def check_torch(net: nn.Module, *inputs: torch.Tensor, names: list[str] | None = None, **options: Any) -> tvm.IRModule:
    """Export, canonicalise and compare with torch; `names` are the layers in order of use."""
    net = net.eval()
    mod = canonical(torch.export.export(net, inputs, **options))
    if names is not None:
        assert list(find_layers(mod)) == names
    with torch.no_grad():
        expected = net(*inputs)
    found = run(mod, *inputs)
    compare(found, [e.numpy() for e in expected] if isinstance(expected, tuple) else expected.numpy())
    return mod


def compare(found: Any, expected: Any) -> None:
    """Equal within CLOSE: an array, or a list of them."""
    for mine, theirs in zip(*(v if isinstance(v, list) else [v] for v in (found, expected)), strict=True):
        np.testing.assert_allclose(mine, theirs, **CLOSE)


class Function(torch.nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)
