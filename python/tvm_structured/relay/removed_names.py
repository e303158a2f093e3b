"""Names of TVM 0.19's Relay that this package does not offer, and what serves in their place."""

from __future__ import annotations

from tvm_structured.errors import RemovedNameError

RELAY = "relay"
FRONTEND = "relay.frontend"
_BUILD_IR = "write the function in Relax: tvm.relax.BlockBuilder, or tvm.script.relax"
_PARTITION = "tvm.relax.transform.FuseOpsByPattern with RunCodegen"

_INSTEAD = {
    RELAY: {
        "transform": "tvm.relax.transform has today's passes; they apply to what relay.frontend returns",
        "analysis": "tvm.relax.analysis has today's analyses",
        "op": "tvm.relax.op has today's operators",
        "nn": "tvm.relax.op.nn has today's operators",
        "image": "tvm.relax.op.image has today's operators",
        "vision": "tvm.relax.op.vision has today's operators",
        "dataflow_pattern": "tvm.relax.dpl matches and rewrites today",
        "quantize": "quantize the model before the import (torch or onnxruntime); TVM quantizes no longer",
        "qnn": "tvm.relax.op has quantize and dequantize",
        "vm": "relay.build: today everything runs on TVM's virtual machine",
        "aot": "relay.build: ahead-of-time executors are gone",
        "testing": "build the model in torch and use relay.frontend.from_pytorch",
        "var": _BUILD_IR,
        "const": _BUILD_IR,
        "Var": _BUILD_IR,
        "Constant": _BUILD_IR,
        "Function": _BUILD_IR,
        "Call": _BUILD_IR,
        "Let": _BUILD_IR,
        "Tuple": _BUILD_IR,
        "TensorType": "tvm.relax.TensorType",
        "ExprVisitor": "tvm.relax.expr_functor.PyExprVisitor",
        "ExprMutator": "tvm.relax.expr_functor.PyExprMutator",
        "optimize": "relay.build, then lib.ir_mod is the optimised module",
        "bind_params_by_name": "give the parameters to relay.build(mod, params=params)",
        "Any": "a fixed shape, or ts.compile with torch.export's dynamic shapes",
        "collage": _PARTITION,
        "annotation": _PARTITION,
        "build_config": "tvm.transform.PassContext",
    },
    FRONTEND: {
        "from_tflite": "tvm.relax.frontend.tflite.from_tflite, then relay.build of what it returns",
        "from_tensorflow": "convert the model to ONNX (tf2onnx) and use relay.frontend.from_onnx",
        "from_keras": "convert the model to ONNX (tf2onnx) and use relay.frontend.from_onnx",
        "from_paddle": "convert the model to ONNX (paddle2onnx) and use relay.frontend.from_onnx",
        "from_oneflow": "convert the model to ONNX and use relay.frontend.from_onnx",
        "from_mxnet": "convert the model to ONNX and use relay.frontend.from_onnx",
        "from_coreml": "convert the model to ONNX and use relay.frontend.from_onnx",
        "from_caffe": "convert the model to ONNX and use relay.frontend.from_onnx",
        "from_caffe2": "convert the model to ONNX and use relay.frontend.from_onnx",
        "from_darknet": "convert the model to ONNX and use relay.frontend.from_onnx",
    },
}


def removed(name: str, namespace: str = RELAY) -> AttributeError:
    """The error for a name that a namespace of ours lacks; a RemovedNameError where Relay had it."""
    instead = _INSTEAD[namespace].get(name)
    if instead is None:
        return AttributeError(f"'{namespace}' of tvm_structured has no {name!r}")
    return RemovedNameError(f"{namespace}.{name}: TVM removed it with Relay after 0.19; instead: {instead}")
