"""Emitted functions around a run: fill DRAM, read results, count what was executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.emit import arg, either, prim_func, root_block, when
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.kernel import ALU, GEMM, STORE
from tvm_structured.vta.kernel_state import COLUMNS, STATUS, Machinery, int64, put, store, vector
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.machine import COUNTERS
from tvm_structured.vta.region import Placed, Region

LANES = 64  # bytes that are copied at once; regions begin and end at multiples of it


def begin_func(region: Region, machinery: Machinery, name: str) -> Any:
    """PrimFunc(constants, *inputs, dram, uop, wgt, inp, offset, acc, status): constants and inputs into DRAM, status
    zero. Buffers on chip are allocated by this call and hold anything: programs load what they use."""
    with prim_func(name) as made:
        constants = arg("constants", [region.constants.size], "uint8")
        inputs = [arg(f"input{i}", placed.layout.shape, "int8") for i, placed in enumerate(region.inputs)]
        dram, *_, status = (arg(what, shape, dtype) for what, shape, dtype in state_shapes(region, machinery))
        with root_block():
            with I.serial(0, int64(region.constants.size // LANES)) as i:
                put(dram, vector(constants, i * LANES, LANES), i * LANES + region.first_constant, LANES)
            for tensor, placed in zip(inputs, region.inputs, strict=True):
                pack(tensor, dram, placed)
            with I.serial(0, int64(STATUS)) as i:
                store(status, tirx.IntImm("int64", 0), i)
    return made.func


def state_shapes(region: Region, machinery: Machinery) -> list[tuple[str, list[int], str]]:
    """Name, shape and dtype of the simulator's arguments behind the table (see `State`)."""
    config = region.config
    inp = config.depth(Memory.INP)
    return [
        ("dram", [region.dram_bytes], "uint8"),
        ("uop", [config.depth(Memory.UOP)], "uint32"),
        ("wgt", [config.depth(Memory.WGT) * config.block**2], machinery.wgt_dtype),
        ("inp", [inp * machinery.values], "int8"),
        ("offset", [inp * config.batch], "int32"),
        ("acc", [config.depth(Memory.ACC) * machinery.values], "int32"),
        ("status", [STATUS], "int64"),
    ]


def each_element(layout: Layout, body: Callable[[Any, Any, Any, Any, Any], None]) -> None:
    """body(element, batch block, channel block, row, column) for every element of a tensor in DRAM."""
    height, width = layout.size
    with I.serial(0, int64(layout.rows)) as n:
        with I.serial(0, int64(layout.channels)) as c:
            with I.serial(0, int64(height)) as y:
                with I.serial(0, int64(width)) as x:
                    body(I.Bind(((n * layout.channels + c) * height + y) * width + x), n, c, y, x)


def each_value(layout: Layout, body: Callable[[Any, Any, Any], None]) -> None:
    """body(value's position in DRAM, index into the tensor, whether it is inside) for every value, padding included."""

    def element(position: Any, n: Any, c: Any, y: Any, x: Any) -> None:
        with I.serial(0, int64(layout.batch)) as b:
            with I.serial(0, int64(layout.block)) as k:
                row, channel = n * layout.batch + b, c * layout.block + k
                index = (row, channel, y, x)[: len(layout.shape)]
                inside = tirx.all(row < int64(layout.shape[0]), channel < int64(layout.shape[1]))
                body((position * layout.batch + b) * layout.block + k, index, inside)

    each_element(layout, element)


def pack(tensor: Any, dram: Any, placed: Placed) -> None:
    """int8 tensor to DRAM; what rounds up to whole blocks is zero."""

    def value(position: Any, index: Any, inside: Any) -> None:
        target = position + int64(placed.address)
        byte = tirx.reinterpret("uint8", tensor[index])
        either(inside, lambda: store(dram, byte, target), lambda: store(dram, I.uint8(0), target))

    each_value(placed.layout, value)


def end_func(region: Region, name: str) -> Any:
    """PrimFunc(dram, status, *results): results from DRAM. Fails where the run met a fault."""
    with prim_func(name) as made:
        dram = arg("dram", [region.dram_bytes], "uint8")
        status = arg("status", [STATUS], "int64")
        results = [arg(f"output{i}", p.layout.shape, "int8") for i, p in enumerate(region.results)]
        with root_block():
            I.Assert(status[0] == int64(0), "the accelerator's program has an index outside a buffer")
            for tensor, placed in zip(results, region.results, strict=True):
                unpack(tensor, dram, placed)
    return made.func


def unpack(tensor: Any, dram: Any, placed: Placed) -> None:
    def value(position: Any, index: Any, inside: Any) -> None:
        with when(inside):
            byte = tirx.reinterpret("int8", dram[position + int64(placed.address)])
            I.buffer_store(tensor, byte, list(index))

    each_value(placed.layout, value)


def count_func(config: VTAConfig, name: str) -> Any:
    """PrimFunc(table, status, counters): what the executed rows add to COUNTERS, int64 (7,)."""
    with prim_func(name) as made:
        rows = tirx.Var("rows", "int64")
        table = arg("table", [rows, COLUMNS], "int64")
        status = arg("status", [STATUS], "int64")
        counters = arg("counters", [len(COUNTERS)], "int64")
        with root_block():
            emit_counting(config, table, status, counters)
    return made.func


def emit_counting(config: VTAConfig, table: Any, status: Any, counters: Any) -> None:
    with I.serial(0, int64(len(COUNTERS))) as i:
        store(counters, tirx.IntImm("int64", 0), i)

    def add(counter: str, amount: Any) -> None:
        index = int64(COUNTERS.index(counter))
        store(counters, counters[index] + amount, index)

    with I.serial(0, status[1]) as row:
        kind = I.Bind(table[row, int64(0)])
        elements = I.Bind(table[row, int64(3)] * table[row, int64(4)])
        iterations = I.Bind((table[row, 2] - table[row, 1]) * table[row, 3] * table[row, 4])
        for kinds, counter, memory in TRANSFERS:
            with when(tirx.any(*(kind == int64(int(k)) for k in kinds))):
                add(counter, elements * int64(config.element_bytes(memory)))
        with when(kind == int64(GEMM)):
            add("gemm_counter", iterations)
        with when(kind >= int64(ALU)):
            add("alu_counter", iterations)


TRANSFERS = (  # kinds of rows, the counter of their bytes, the memory whose elements they move
    ((Memory.UOP,), "uop_load_nbytes", Memory.UOP),
    ((Memory.WGT,), "wgt_load_nbytes", Memory.WGT),
    ((Memory.INP,), "inp_load_nbytes", Memory.INP),
    ((Memory.ACC, Memory.ACC_8BIT), "acc_load_nbytes", Memory.ACC),
    ((STORE,), "out_store_nbytes", Memory.OUT),
)
