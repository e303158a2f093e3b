"""Emitted GEMM and ALU.

Operands: uop_bgn, uop_end, iter_out, iter_in, dst_out, dst_in, src_out, src_in, wgt_out, wgt_in (for the ALU imm).
All indices grow with the loops, so the largest ones decide, before the first iteration, whether all are in range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.emit import either, when
from tvm_structured.vta.config import Memory
from tvm_structured.vta.isa import ALU_OPCODES
from tvm_structured.vta.kernel_state import Machinery, State, int64, put, splat, store, vector

FIELDS = (("dst", Memory.ACC), ("src", Memory.INP), ("wgt", Memory.WGT))
UNROLLED = 16  # products in one expression


def uop_indices(machinery: Machinery, word: Any, count: int) -> list[Any]:
    """The first `count` of dst, src, wgt."""
    indices, shift = [], 0
    for width in machinery.config.uop_widths[:count]:
        field = (word >> I.uint32(shift)) & I.uint32((1 << width) - 1)
        indices.append(tirx.Cast("int64", field))
        shift += width
    return indices


def emit_loops(machinery: Machinery, state: State, depths: list[int], body: Callable[..., None]) -> None:
    """body(dst, src, ...) for every iteration, if all indices are below `depths`; otherwise only status is set."""
    begin, end, outer, inner = (state.operand(1 + i) for i in range(4))
    strides = [(state.operand(5 + 2 * i), state.operand(6 + 2 * i)) for i in range(len(depths))]

    def run() -> None:
        with I.serial(0, outer) as y:
            with I.serial(0, inner) as x:
                offsets = [I.Bind(y * a + x * b) for a, b in strides]
                with I.serial(0, end - begin) as u:
                    word = I.Bind(state.uop[begin + u])
                    uop = uop_indices(machinery, word, len(depths))
                    body(*(I.Bind(index + offset) for index, offset in zip(uop, offsets, strict=True)))

    with when(tirx.all(outer > 0, inner > 0, end > begin)):
        for i, (a, b) in enumerate(strides):
            store(state.status, (outer - 1) * a + (inner - 1) * b, 2 + i)
        largest_uops(machinery, state, begin, end, len(depths))
        for i, depth in reversed(list(enumerate(depths))):  # the first field at fault is reported
            with when(state.status[2 + i] >= int64(depth)):
                store(state.status, int64(1 + i), 0)
        with when(state.status[0] == int64(0)):
            run()


def largest_uops(machinery: Machinery, state: State, begin: Any, end: Any, count: int) -> None:
    """status[2 + i] += the largest i-th index of the micro-ops [begin, end)."""
    base = [I.Bind(state.status[2 + i]) for i in range(count)]
    with I.serial(0, end - begin) as u:
        word = I.Bind(state.uop[begin + u])
        for i, index in enumerate(uop_indices(machinery, word, count)):
            store(state.status, tirx.max(state.status[2 + i], base[i] + index), 2 + i)


def emit_reset(machinery: Machinery, state: State) -> None:
    """ACC[dst] = 0."""
    lanes = machinery.lanes

    def body(dst: Any) -> None:
        with I.serial(0, int64(machinery.values // lanes)) as chunk:
            put(state.acc, splat(I.int32(0), lanes), dst * machinery.values + chunk * lanes, lanes)

    emit_loops(machinery, state, [machinery.config.depth(Memory.ACC)], body)


def emit_gemm(machinery: Machinery, state: State) -> None:
    """ACC[dst][b][o] += sum_k INP[src][b][k] * WGT[wgt][o][k]."""
    config, lanes, values = machinery.config, machinery.lanes, machinery.values
    product = dot_product if machinery.group == 4 else plain_product

    def vectors(dst: Any, src: Any, wgt: Any, b: Any) -> None:
        for first in range(0, config.block, lanes):
            product(
                machinery,
                state,
                I.Bind(dst * values + b * config.block + first),
                I.Bind(src * values + b * config.block),
                I.Bind(wgt * config.block**2),
                src * config.batch + b,
                first,
            )

    def body(dst: Any, src: Any, wgt: Any) -> None:
        if config.batch == 1:
            vectors(dst, src, wgt, int64(0))
            return
        with I.serial(0, int64(config.batch)) as b:
            vectors(dst, src, wgt, b)

    emit_loops(machinery, state, [config.depth(memory) for _, memory in FIELDS], body)


def dot_product(
    machinery: Machinery, state: State, target: Any, row: Any, tile: Any, vector_index: Any, first: int
) -> None:
    """Four unsigned times four signed bytes a lane; the offset of the unsigned ones is taken out first."""
    block, lanes = machinery.config.block, machinery.lanes
    intrinsic = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    total = splat(state.offset[vector_index], lanes)
    for quad in range(block // 4):
        four = tirx.reinterpret("int32", vector(state.inp, row + 4 * quad, 4))
        weights = vector(state.wgt, tile + (quad * block + first) * 4, 4 * lanes)
        inputs = tirx.reinterpret(f"int8x{4 * lanes}", splat(four, lanes))
        total = tirx.op.call_llvm_pure_intrin(f"int32x{lanes}", intrinsic, total, weights, inputs)
    # added last: what waits for the sum before it is one addition, not the chain
    put(state.acc, vector(state.acc, target, lanes) + total, target, lanes)


def plain_product(
    machinery: Machinery, state: State, target: Any, row: Any, tile: Any, vector_index: Any, first: int
) -> None:
    """One input times a vector of outputs at a time."""
    block, lanes = machinery.config.block, machinery.lanes
    step = min(block, UNROLLED)
    with I.serial(0, int64(block // step)) as part:
        total = vector(state.acc, target, lanes)
        for k in range(step):
            inner = part * step + k
            weights = tirx.Cast(f"int32x{lanes}", vector(state.wgt, tile + inner * block + first, lanes))
            total = total + splat(tirx.Cast("int32", state.inp[row + inner]), lanes) * weights
        put(state.acc, total, target, lanes)


def emit_alu(machinery: Machinery, state: State, opcode: int, use_imm: bool) -> None:
    """ACC[dst] = op(ACC[dst], imm or ACC[src]), one element after the other."""
    lanes, values = machinery.lanes, machinery.values
    imm = I.Bind(tirx.Cast("int32", state.operand(9)))

    def body(dst: Any, src: Any) -> None:
        with I.serial(0, int64(values // lanes)) as chunk:
            target = I.Bind(dst * values + chunk * lanes)
            a = vector(state.acc, target, lanes)
            b = splat(imm, lanes) if use_imm else vector(state.acc, src * values + chunk * lanes, lanes)
            put(state.acc, alu(ALU_OPCODES[opcode], I.Bind(a), I.Bind(b), lanes), target, lanes)

    emit_loops(machinery, state, [machinery.config.depth(Memory.ACC)] * 2, body)


def alu(name: str, a: Any, b: Any, lanes: int) -> Any:
    """One operation on vectors of int32."""
    if name == "MIN":
        return tirx.min(a, b)
    if name == "MAX":
        return tirx.max(a, b)
    if name == "ADD":
        return a + b
    if name == "MUL":
        return a * b
    zero, most = splat(I.int32(0), lanes), splat(I.int32(31), lanes)
    # amounts stay within 0..31, as LLVM's shifts demand; what they would shift out is settled by the selects
    right = a >> tirx.max(tirx.min(b, most), zero)
    left = a << tirx.max(tirx.min(zero - b, most), zero)
    left = tirx.Select(b < splat(I.int32(-31), lanes), zero, left)
    return tirx.Select(b >= zero, right, left)


def branch(kind: Any, table: dict[int, Callable[[], None]]) -> None:
    """Execute the entry of `kind`."""
    (first, action), *rest = table.items()
    if not rest:
        action()
        return
    either(kind == int64(first), action, lambda: branch(kind, dict(rest)))
