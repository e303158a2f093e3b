"""CUDA TensorIR  -->  TensorIR for the CPU that computes the same, one thread after the other

Thread bindings become serial loops, shared and local memory becomes memory. This is sound for scheduled functions
that are not lowered yet: there every stage that threads do together is a loop nest of its own, and every buffer has an
element for each thread. It is the proof of a kernel's indices and order on a machine without a GPU; it says nothing of
races within a stage (two threads that write one element), which `schedules.cuda` rules out by contract.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.ir import IRModule
from tvm.ir.transform import PassContext, module_pass
from tvm.tirx.buffer import is_buffer_var

from tvm_structured.errors import KernelNotFoundError

ON_CHIP = ("shared", "shared.dyn", "local", "warp")
# what only hardware has: barriers are implied by the order of the stages, the rest cannot be emulated
BARRIER = "tirx.tvm_storage_sync"
ONLY_ON_GPU = (
    "tirx.ptx",
    "tirx.cuda",
    "tirx.tvm_load_matrix",
    "tirx.tvm_mma",
    "tirx.tvm_store_matrix",
    "tirx.tvm_warp",
)


@module_pass(opt_level=0, name="EmulateKernels")
class EmulateKernels:
    """Every PrimFunc of a module of scheduled CUDA functions, for the CPU."""

    def transform_module(self, mod: Any, _: PassContext) -> Any:
        functions = {
            name: emulated(func) if isinstance(func, tirx.PrimFunc) else func for name, func in mod.functions_items()
        }
        return IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def emulated(func: Any) -> Any:
    """One function. Raises KernelNotFoundError where it uses an intrinsic that only a GPU has."""
    in_memory: dict[Any, Any] = {}

    def serial(loop: Any) -> Any:
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body, step=loop.step)

    def to_memory(variable: Any) -> Any:
        if not is_buffer_var(variable) or variable.scope() not in ON_CHIP:
            return variable
        if variable not in in_memory:
            kind = variable.ty
            in_memory[variable] = tirx.decl_buffer(
                kind.shape, str(kind.dtype), variable.name, elem_offset=kind.elem_offset, strides=kind.strides
            )
        return in_memory[variable]

    def without_hints(block: Any) -> Any:
        if not block.annotations:
            return block
        return s_tir.SBlock(
            block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init,
            block.alloc_buffers, block.match_buffers,
        )  # fmt: skip

    def plain(call: Any) -> Any:
        name = getattr(call.op, "name", "")
        if name.startswith(ONLY_ON_GPU):
            raise KernelNotFoundError(f"{name} cannot run on a CPU; emulate the configuration without tensorize")
        return tirx.const(0, "int32") if name == BARRIER else call

    body = func.body
    for kind, change in ((tirx.Var, to_memory), (tirx.For, serial), (s_tir.SBlock, without_hints), (ir.Call, plain)):
        body = tvm_ffi.structural_map(body, (kind, change))
    return func.with_body(body)
