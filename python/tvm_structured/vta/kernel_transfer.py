"""Emitted LOAD and STORE: elements between DRAM bytes and the unpacked buffers.

Operands: sram_base, byte address, y_size, x_size, x_stride, y_pad_0, y_pad_1, x_pad_0, x_pad_1. Every range was
checked before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.emit import either
from tvm_structured.vta.config import Memory
from tvm_structured.vta.kernel_state import Machinery, State, int64, put, splat, store, vector

Element = Callable[[Any, Any], None]  # (element in the buffer, its byte address)
CHUNK = 16  # values in one vector of a copy


def emit_load(state: State, size: int, copy: Element, zero: Callable[[Any], None]) -> None:
    """Rewrite a padded window; `size` is the bytes of an element in DRAM."""
    base, address, y_size, x_size, stride = (state.operand(1 + i) for i in range(5))
    top, bottom, left, right = (state.operand(6 + i) for i in range(4))
    with I.serial(0, top + y_size + bottom) as y:
        with I.serial(0, left + x_size + right) as x:
            element = I.Bind(base + y * (left + x_size + right) + x)
            inside = tirx.all(y >= top, y < top + y_size, x >= left, x < left + x_size)
            source = address + ((y - top) * stride + (x - left)) * int64(size)
            either(inside, lambda: copy(element, I.Bind(source)), lambda: zero(element))


def load_uop(state: State) -> None:
    def copy(element: Any, address: Any) -> None:
        store(state.uop, tirx.reinterpret("uint32", vector(state.dram, address, 4)), element)

    emit_load(state, 4, copy, lambda element: store(state.uop, I.uint32(0), element))


def load_acc(machinery: Machinery, state: State, memory: Memory) -> None:
    """int32, or int8 sign-extended."""
    values = machinery.values
    lanes = min(CHUNK, values)
    size = machinery.config.element_bytes(memory)
    narrow = memory is Memory.ACC_8BIT

    def copy(element: Any, address: Any) -> None:
        with I.serial(0, int64(values // lanes)) as chunk:
            first = I.Bind(chunk * lanes)
            if narrow:
                raw = tirx.reinterpret(f"int8x{lanes}", vector(state.dram, address + first, lanes))
                value = tirx.Cast(f"int32x{lanes}", raw)
            else:
                value = tirx.reinterpret(f"int32x{lanes}", vector(state.dram, address + first * 4, 4 * lanes))
            put(state.acc, value, element * values + first, lanes)

    emit_load(state, size, copy, lambda element: fill(state.acc, I.int32(0), element * values, values))


def load_inp(machinery: Machinery, state: State) -> None:
    """Unpack, and note -128 times each vector's sum where WGT has an offset."""
    config, values = machinery.config, machinery.values

    def copy(element: Any, address: Any) -> None:
        unpack(state, config.inp_bits, address, values, lambda j: element * values + j, state.inp, "int8")
        if machinery.group == 1:
            return
        with I.serial(0, int64(config.batch)) as b:
            first = I.Bind(element * values + b * config.block)
            parts = [tirx.Cast("int32", state.inp[first + k]) for k in range(config.block)]
            while len(parts) > 1:  # a balanced tree, which LLVM turns into a vector reduction
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
            store(state.offset, parts[0] * I.int32(-128), element * config.batch + b)

    def zero(element: Any) -> None:
        fill(state.inp, I.int8(0), element * values, values)
        if machinery.group != 1:
            fill(state.offset, I.int32(0), element * config.batch, config.batch)

    emit_load(state, config.element_bytes(Memory.INP), copy, zero)


def load_wgt(machinery: Machinery, state: State) -> None:
    """Unpack and transpose."""
    config, block = machinery.config, machinery.config.block
    values = block * block
    grouped = machinery.group == 4

    def copy(element: Any, address: Any) -> None:
        first = I.Bind(element * values)
        if not grouped or config.wgt_bits < 8:
            position = lambda j: first + machinery.wgt_position(j // block, j % block)  # noqa: E731
            unpack(state, config.wgt_bits, address, values, position, state.wgt, machinery.wgt_dtype)
        elif block == 16:
            transpose_quads(state, first, address)
        else:
            with I.serial(0, int64(block // 4)) as quad:
                with I.serial(0, int64(block)) as out:
                    raw = vector(state.dram, address + out * block + quad * 4, 4)
                    put(state.wgt, raw ^ splat(I.uint8(128), 4), first + (quad * block + out) * 4, 4)

    blank = tirx.const(128 if grouped else 0, machinery.wgt_dtype)
    emit_load(
        state, config.element_bytes(Memory.WGT), copy, lambda element: fill(state.wgt, blank, element * values, values)
    )


def transpose_quads(state: State, first: Any, address: Any) -> None:
    """16 rows of 4 groups of 4 bytes, transposed as a 16 x 4 matrix of 32-bit numbers, in registers."""
    rows = [tirx.reinterpret("int32x16", vector(state.dram, address + 64 * i, 64)) for i in range(4)]
    rows = [I.Bind(row) for row in rows]
    for quad in range(4):
        column = I.Shuffle(rows, [I.int32(4 * out + quad) for out in range(16)])
        put(state.wgt, tirx.reinterpret("uint8x64", column) ^ splat(I.uint8(128), 64), first + 64 * quad, 64)


def unpack(
    state: State, width: int, address: Any, count: int, position: Callable[[Any], Any], buffer: Any, dtype: str
) -> None:
    """buffer[position(j)] = the j-th signed value of DRAM, for j < count; 128 is added in unsigned buffers."""
    if width == 8 and dtype == "int8" and buffer is state.inp:
        lanes = min(CHUNK, count)
        with I.serial(0, int64(count // lanes)) as chunk:
            first = I.Bind(chunk * lanes)
            raw = vector(state.dram, address + first, lanes)
            put(buffer, tirx.reinterpret(f"int8x{lanes}", raw), position(first), lanes)
        return
    with I.serial(0, int64(count)) as j:
        bit = I.Bind(j * width)
        byte = tirx.Cast("int32", state.dram[address + bit // 8])
        raw = (byte >> tirx.Cast("int32", bit % 8)) & I.int32((1 << width) - 1)
        sign = 1 << (width - 1)
        value = (raw ^ I.int32(sign)) - I.int32(sign)
        store(buffer, tirx.Cast(dtype, value + I.int32(128) if dtype == "uint8" else value), position(j))


def fill(buffer: Any, value: Any, first: Any, count: int) -> None:
    """The same value in `count` elements."""
    lanes = min(CHUNK, count)
    with I.serial(0, int64(count // lanes)) as chunk:
        if lanes == 1:
            store(buffer, value, first + chunk)
        else:
            put(buffer, splat(value, lanes), first + chunk * lanes, lanes)


def emit_store(machinery: Machinery, state: State) -> None:
    """Low bits of ACC to DRAM, rows in order."""
    base, address, y_size, x_size, stride = (state.operand(1 + i) for i in range(5))
    size = machinery.config.element_bytes(Memory.OUT)
    with I.serial(0, y_size) as y:
        with I.serial(0, x_size) as x:
            source = I.Bind((base + y * x_size + x) * machinery.values)
            target = I.Bind(address + (y * stride + x) * int64(size))
            narrow(machinery, state, source, target)


def narrow(machinery: Machinery, state: State, source: Any, target: Any) -> None:
    width = machinery.config.out_bits
    if width == 8:
        lanes = min(CHUNK, machinery.values)
        with I.serial(0, int64(machinery.values // lanes)) as chunk:
            low = tirx.Cast(f"int8x{lanes}", vector(state.acc, source + chunk * lanes, lanes))
            put(state.dram, tirx.reinterpret(f"uint8x{lanes}", low), target + chunk * lanes, lanes)
        return
    per_byte = 8 // width
    with I.serial(0, int64(machinery.values // per_byte)) as byte:
        packed: Any = I.int32(0)
        for i in range(per_byte):
            low = state.acc[source + byte * per_byte + i] & I.int32((1 << width) - 1)
            packed = packed | (low << I.int32(i * width))
        store(state.dram, tirx.Cast("uint8", packed), target + byte)
