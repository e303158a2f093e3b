"""The functional simulator as one TensorIR function: a loop over a table of checked instructions.

The table is in the order of execution; what it says has been checked, save the indices in micro-ops, which only the
memory knows. They are checked here, instruction by instruction, before anything is touched.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.emit import prim_func, when
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.isa import ALU_OPCODES
from tvm_structured.vta.kernel_compute import branch, emit_alu, emit_gemm, emit_reset
from tvm_structured.vta.kernel_state import Machinery, State, int64, store
from tvm_structured.vta.kernel_transfer import emit_store, load_acc, load_inp, load_uop, load_wgt

_COMPILED: dict[tuple[Machinery, str], Any] = {}
STORE, RESET, GEMM, ALU = 6, 7, 8, 9  # kinds 0 to 5 are loads of that memory type


def alu_kind(opcode: Any, use_imm: Any) -> Any:
    """Kind of an ALU instruction."""
    return ALU + 2 * opcode + use_imm


def simulator_func(machinery: Machinery) -> Any:
    """PrimFunc(table, dram, uop, wgt, inp, offset, acc, status): executes rows from status[1] on.

    status[0] becomes 1, 2 or 3 where an index of dst, src or wgt in row status[1] is too large; status[2:5] are the
    largest ones.
    """
    with prim_func("vta_run") as made:
        state = State.declare(machinery)
        actions: dict[int, Any] = {
            Memory.UOP: partial(load_uop, state),
            Memory.WGT: partial(load_wgt, machinery, state),
            Memory.INP: partial(load_inp, machinery, state),
            Memory.ACC: partial(load_acc, machinery, state, Memory.ACC),
            STORE: partial(emit_store, machinery, state),
            RESET: partial(emit_reset, machinery, state),
            GEMM: partial(emit_gemm, machinery, state),
        }
        if machinery.config.has_acc_8bit:
            actions[Memory.ACC_8BIT] = partial(load_acc, machinery, state, Memory.ACC_8BIT)
        for opcode in range(len(ALU_OPCODES)):
            for use_imm in (False, True):
                actions[alu_kind(opcode, use_imm)] = partial(emit_alu, machinery, state, opcode, use_imm)
        with I.While(tirx.all(state.status[0] == int64(0), state.status[1] < state.table.shape[0])):
            kind = I.Bind(state.table[state.status[1], int64(0)])
            branch(kind, {int(key): action for key, action in actions.items()})
            with when(state.status[0] == int64(0)):
                store(state.status, state.status[1] + 1, 1)
    return made.func


def machinery_of(config: VTAConfig, target: Any) -> Machinery:
    """What the target's processor offers."""
    from tvm.target.codegen import target_has_features

    return Machinery(config, bool(target_has_features("avx512vnni", target)))


def compiled(machinery: Machinery, target: Any) -> Any:
    """The compiled function; compiling takes about a second, once per configuration and process."""
    key = (machinery, repr(sorted(target.export().items())))  # equal targets are not equal objects
    if key not in _COMPILED:
        import tvm

        func = simulator_func(machinery).with_attr("global_symbol", "vta_run")
        _COMPILED[key] = tvm.compile(func, target)["vta_run"]
    return _COMPILED[key]
