"""Random quantized operators, and modules of one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_structured.quantized import QuantizedCall
from tvm_structured.relay_passes.pipeline import structured_pipeline
from tvm_structured.targets import resolve_target


def int8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape, np.int8)


def inputs_of(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(relax.Var(f"x{i}", relax.TensorType(list(shape), "int8")) for i, shape in enumerate(shapes))


def constants(rng: np.random.Generator, weight: np.ndarray, outs: int, per_channel: bool = True) -> tuple[Any, ...]:
    """Weight, bias and multipliers."""
    bias = rng.integers(-5000, 5000, outs, np.int32)
    multiplier = rng.integers(1, 100, outs if per_channel else 1, np.int32)
    return tuple(relax.const(array) for array in (weight, bias, np.broadcast_to(multiplier, (outs,)).copy()))


def with_residual(call: QuantizedCall) -> QuantizedCall:
    """The same call plus a tensor of its output's shape."""
    (x,) = call.inputs
    shapes = [tuple(int(extent) for extent in x.ty.shape), call.output_shape()]
    return replace(call, inputs=inputs_of(*shapes), multipliers=(29,), shifts=(5,))


def module_of(call: QuantizedCall) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    with builder.function("main", list(call.inputs), attrs={"num_input": len(call.inputs)}):
        with builder.dataflow():
            result = builder.emit_output(call.to_relax())
        builder.emit_func_output(result)
    return builder.get()


def run_on_cpu(mod: tvm.IRModule, *arrays: np.ndarray) -> np.ndarray:
    target = resolve_target("host")
    with target:
        lowered = structured_pipeline({}, target)(mod)
        executable = tvm.compile(lowered, target, relax_pipeline="default_build")
    return relax.VirtualMachine(executable, tvm.cpu())["main"](*arrays).numpy()
