"""What can be said of a stream before it runs: whether every instruction is legal and stays inside its buffers.

Vectorised over the instructions of a kind, since programs are long; the meanings in isa.py check for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import DramRangeError, IllegalInstructionError, ScratchpadOverflowError, VTAError
from tvm_structured.vta.bits import Words
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.isa import ALU_OPCODES, INSTRUCTIONS, LOADABLE, Alu, Gemm, Load, Store, field_names, opcodes
from tvm_structured.vta.machine import Regions
from tvm_structured.vta.order import CHANNELS, FLAGS, MODULES, modules_of

Columns = dict[str, NDArray[np.int64]]
Mask = NDArray[np.bool_]
Finding = tuple[Mask, type[VTAError], str, Callable[[int], str]]  # of which instructions, what, in which field
PADS = ("y_pad_0", "y_pad_1", "x_pad_0", "x_pad_1")


def columns_of(config: VTAConfig, words: Words) -> Columns:
    """Every field of every instruction, shape (N,); 0 where an instruction has no such field."""
    codes = opcodes(words)
    names = {name for cls in INSTRUCTIONS.values() for name in field_names(cls)}
    columns = {name: np.zeros(len(words), np.int64) for name in names}
    for opcode, cls in INSTRUCTIONS.items():
        where = np.flatnonzero(codes == opcode)
        if where.size:
            for name, values in cls.columns(config, words[where]).items():
                if name != "opcode":
                    columns[name][where] = values
    columns["opcode"] = codes
    return columns


def raise_first(findings: Iterator[Finding]) -> None:
    """Raise the error of the earliest instruction that a finding names."""
    errors = []
    for mask, cls, field, message in findings:
        if mask.any():
            index = int(mask.argmax())
            errors.append((index, cls, field, message))
    if errors:
        index, cls, field, message = min(errors, key=lambda error: error[0])
        raise cls(message(index), index, field)


def addresses(config: VTAConfig, c: Columns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First byte, and bytes of one DRAM element, of each LOAD and STORE; 32-bit arithmetic as in the original."""
    sizes = np.array([config.element_bytes(memory) for memory in Memory] + [1, 1], np.int64)
    element = sizes[c["memory_type"]]
    narrow = c["memory_type"] == Memory.ACC_8BIT
    scale = np.where(narrow, config.element_bytes(Memory.ACC), element)
    first = (c["dram_base"] * scale) & 0xFFFFFFFF
    return np.where(narrow, first // 4, first), element


def check_instructions(config: VTAConfig, c: Columns, negative_ranges: bool) -> None:
    """Raise the error of the first instruction that is illegal or leaves the on-chip buffers.

    Micro-ops are not looked at. With `negative_ranges`, uop_end < uop_bgn means no work, as in the original.
    """
    raise_first(_illegal(config, c))
    raise_first(_overflowing(config, c, negative_ranges))


def _illegal(config: VTAConfig, c: Columns) -> Iterator[Finding]:
    opcode, kind = c["opcode"], c["memory_type"]
    wrong = IllegalInstructionError
    yield opcode >= len(INSTRUCTIONS), wrong, "opcode", lambda i: f"{opcode[i]} is no instruction (0 to 4)"
    modules = modules_of(opcode, kind)
    for module, wires in enumerate(CHANNELS):
        for name in (name for name in FLAGS if name not in wires):
            yield (
                (modules == module) & (c[name] != 0),
                wrong,
                name,
                lambda i, module=module: f"the {MODULES[module]} module has no such neighbour",  # type: ignore[misc]
            )
    load = (opcode == Load.opcode) & (c["x_size"] != 0)
    yield load & ~np.isin(kind, list(LOADABLE)), wrong, "memory_type", lambda i: f"{kind[i]} cannot be loaded"
    if not config.has_acc_8bit:
        yield load & (kind == Memory.ACC_8BIT), wrong, "memory_type", lambda i: "ACC_8BIT needs 8-bit INP"
    store = (opcode == Store.opcode) & (c["x_size"] != 0)
    yield store & (kind != Memory.OUT), wrong, "memory_type", lambda i: f"{kind[i]} cannot be stored, only OUT (4)"
    for name in PADS:
        yield store & (c[name] != 0), wrong, name, lambda i: "a STORE has no padding"
    alu = opcode == Alu.opcode
    yield (
        alu & (c["alu_opcode"] >= len(ALU_OPCODES)),
        wrong,
        "alu_opcode",
        lambda i: f"{c['alu_opcode'][i]} is no operation (0 to 4)",
    )


def _overflowing(config: VTAConfig, c: Columns, negative_ranges: bool) -> Iterator[Finding]:
    opcode, kind = c["opcode"], c["memory_type"]
    width, height = c["x_pad_0"] + c["x_size"] + c["x_pad_1"], c["y_pad_0"] + c["y_size"] + c["y_pad_1"]
    depths = np.array([config.depth(memory) for memory in Memory] + [0, 0], np.int64)
    end, depth = c["sram_base"] + width * height, depths[kind]
    moves = ((opcode == Load.opcode) | (opcode == Store.opcode)) & (c["x_size"] != 0)
    yield (
        moves & (end > depth),
        ScratchpadOverflowError,
        "sram_base",
        lambda i: f"elements {c['sram_base'][i]} to {end[i]} of {Memory(kind[i]).name}, which has {depth[i]}",
    )
    loops = (opcode == Gemm.opcode) | (opcode == Alu.opcode)
    begin, stop = c["uop_bgn"], c["uop_end"]
    if not negative_ranges:
        yield (
            loops & (stop < begin),
            IllegalInstructionError,
            "uop_end",
            lambda i: f"{stop[i]} is before uop_bgn={begin[i]}",
        )
    uops = config.depth(Memory.UOP)
    yield (
        loops & (iterations(c) > 0) & (stop > uops),
        ScratchpadOverflowError,
        "uop_end",
        lambda i: f"micro-ops to {stop[i]} of UOP, which has {uops}",
    )


def iterations(c: Columns) -> NDArray[np.int64]:
    """Micro-ops each GEMM and ALU executes; negative for a negative range."""
    return c["iter_out"] * c["iter_in"] * (c["uop_end"] - c["uop_bgn"])


def check_memory(config: VTAConfig, c: Columns, regions: Regions) -> None:
    """Raise DramRangeError for the first LOAD or STORE that is not inside one of the half-open byte ranges."""
    moves = ((c["opcode"] == Load.opcode) | (c["opcode"] == Store.opcode)) & (c["x_size"] != 0)
    first, element = addresses(config, c)
    elements = np.where(c["y_size"] > 0, (c["y_size"] - 1) * c["x_stride"] + c["x_size"], 0)
    end = first + elements * element
    inside = np.zeros(len(first), np.bool_)
    for low, high in regions:
        inside |= (low <= first) & (first < high) & (end <= high)
    raise_first(
        iter(
            [
                (
                    moves & ~inside,
                    DramRangeError,
                    "dram_base",
                    lambda i: f"bytes {first[i]} to {end[i]} are outside the memory given to the program",
                )
            ]
        )
    )
