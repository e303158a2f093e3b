"""The instruction set: fields, encoding and meaning of every instruction, each in one class.

Instructions are 128 bits, two little-endian 64-bit words. LOAD INP and LOAD WGT run in the load module, STORE in the
store module, all else in the compute module; the modules synchronise by tokens only (see order.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import IllegalInstructionError, ScratchpadOverflowError
from tvm_structured.vta.bits import Slot, Words, bits, declared_fields, place
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.machine import Machine
from tvm_structured.vta.uops import decode_uops

OPCODE_BITS = 3
ALU_OPCODES = ("MIN", "MAX", "ADD", "SHR", "MUL")
LOADABLE = {
    Memory.UOP: "uop_load_nbytes",
    Memory.WGT: "wgt_load_nbytes",
    Memory.INP: "inp_load_nbytes",
    Memory.ACC: "acc_load_nbytes",
    Memory.ACC_8BIT: "acc_load_nbytes",
}


def log_depth(memory: Memory, more: int = 0) -> Callable[[VTAConfig], int]:
    """Width of an index into a memory."""
    return lambda config: config.log_depth(memory) + more


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """Four token flags, common to all. `previous` and `next` are modules in the sequence load, compute, store."""

    opcode: ClassVar[int]
    mnemonic: ClassVar[str]

    pop_prev: int = bits(1)
    pop_next: int = bits(1)
    push_prev: int = bits(1)
    push_next: int = bits(1)

    @classmethod
    def slots(cls, config: VTAConfig) -> tuple[Slot, ...]:
        """Where the fields lie, the opcode first."""
        return _slots(cls, config)  # type: ignore[arg-type]  # mypy takes instances' __hash__ for that of the class

    def encode(self, config: VTAConfig) -> Words:
        """The two words. Raises IllegalInstructionError, naming the field, where a value does not fit."""
        words = [0, 0]
        for slot in self.slots(config):
            words[slot.word] |= slot.insert(int(getattr(self, slot.name)))
        return np.array(words, np.uint64)

    @classmethod
    def columns(cls, config: VTAConfig, words: Words) -> dict[str, NDArray[np.int64]]:
        """Every field of N encoded instructions of this kind."""
        return {slot.name: slot.extract(words) for slot in cls.slots(config)}

    def execute(self, machine: Machine) -> None:
        """The meaning. Raises a VTAError without an index, before anything changed but the counters."""


@lru_cache(maxsize=256)
def _slots(cls: type[Instruction], config: VTAConfig) -> tuple[Slot, ...]:
    return place([("opcode", OPCODE_BITS, False), *declared_fields(cls, config)])


@dataclass(frozen=True, kw_only=True)
class _Transfer(Instruction):
    """Rows of elements between DRAM and a buffer; x_size = 0 is the no-op, of which only the tokens act."""

    memory_type: int = bits(3)
    sram_base: int = bits(16)
    dram_base: int = bits(32)
    y_size: int = bits(16)
    x_size: int = bits(16)
    x_stride: int = bits(16)
    y_pad_0: int = bits(4)
    y_pad_1: int = bits(4)
    x_pad_0: int = bits(4)
    x_pad_1: int = bits(4)

    def check_dram(self, machine: Machine, memory: Memory) -> int:
        """The first byte's address, when all rows are in memory; it is checked even where there are no rows."""
        first = machine.address(memory, self.dram_base)
        elements = (self.y_size - 1) * self.x_stride + self.x_size if self.y_size else 0
        machine.check_range(first, first + elements * machine.config.element_bytes(memory))
        return first

    def check_sram(self, machine: Machine, memory: Memory, elements: int) -> None:
        end, depth = self.sram_base + elements, machine.config.depth(memory)
        if end > depth:
            raise ScratchpadOverflowError(
                f"elements {self.sram_base} to {end} of {memory.name}, which has {depth}", field="sram_base"
            )


@dataclass(frozen=True, kw_only=True)
class Load(_Transfer):
    """buffer[sram_base + i] = padded 2D window of DRAM, row major; padding is zero."""

    opcode = 0
    mnemonic = "LOAD"

    def execute(self, machine: Machine) -> None:
        if self.x_size == 0:
            return
        if self.memory_type not in LOADABLE:
            raise IllegalInstructionError(f"{self.memory_type} cannot be loaded", field="memory_type")
        memory = Memory(self.memory_type)
        if memory is Memory.ACC_8BIT and not machine.config.has_acc_8bit:
            raise IllegalInstructionError("ACC_8BIT needs 8-bit INP", field="memory_type")
        home = Memory.ACC if memory is Memory.ACC_8BIT else memory
        machine.count(LOADABLE[memory], self.x_size * self.y_size * machine.config.element_bytes(home))
        width = self.x_pad_0 + self.x_size + self.x_pad_1
        height = self.y_pad_0 + self.y_size + self.y_pad_1
        self.check_sram(machine, memory, width * height)
        first = self.check_dram(machine, memory)
        if machine.skip_execution and memory is not Memory.UOP:
            return
        buffer = machine.buffer(memory)
        window = np.zeros((height, width, *buffer.shape[1:]), buffer.dtype)
        for y in range(self.y_size):
            row = first + y * self.x_stride * machine.config.element_bytes(memory)
            values = machine.read(memory, row, self.x_size)
            window[self.y_pad_0 + y, self.x_pad_0 : self.x_pad_0 + self.x_size] = values
        buffer[self.sram_base : self.sram_base + width * height] = window.reshape(-1, *buffer.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Store(_Transfer):
    """DRAM OUT[dram_base + y*x_stride + x] = low bits of ACC[sram_base + y*x_size + x]; later rows win."""

    opcode = 1
    mnemonic = "STORE"

    def execute(self, machine: Machine) -> None:
        if self.x_size == 0:
            return
        if self.memory_type != Memory.OUT:
            raise IllegalInstructionError(f"{self.memory_type} cannot be stored, only OUT (4)", field="memory_type")
        for field in ("y_pad_0", "y_pad_1", "x_pad_0", "x_pad_1"):
            if getattr(self, field):
                raise IllegalInstructionError("a STORE has no padding", field=field)
        size = machine.config.element_bytes(Memory.OUT)
        machine.count("out_store_nbytes", self.x_size * self.y_size * size)
        self.check_sram(machine, Memory.ACC, self.x_size * self.y_size)
        first = self.check_dram(machine, Memory.OUT)
        if machine.skip_execution:
            return
        for y in range(self.y_size):
            row = self.sram_base + y * self.x_size
            machine.write_out(first + y * self.x_stride * size, machine.acc[row : row + self.x_size])


@dataclass(frozen=True, kw_only=True)
class _Loops(Instruction):
    """For y < iter_out, x < iter_in, u in [uop_bgn, uop_end), one after the other; an element's index is the
    micro-op's plus y*..._out plus x*..._in."""

    reset: int = bits(1)
    uop_bgn: int = bits(log_depth(Memory.UOP))
    uop_end: int = bits(log_depth(Memory.UOP, 1))
    iter_out: int = bits(14)
    iter_in: int = bits(14)
    dst_out: int = bits(log_depth(Memory.ACC))
    dst_in: int = bits(log_depth(Memory.ACC))

    @property
    def iterations(self) -> int:
        """May be negative, which counts and does nothing in the original."""
        return self.iter_out * self.iter_in * (self.uop_end - self.uop_bgn)

    def has_work(self, machine: Machine) -> bool:
        """Whether micro-ops will be executed; checks their range."""
        if self.uop_end < self.uop_bgn and not machine.negative_ranges:
            raise IllegalInstructionError(f"{self.uop_end} is before uop_bgn={self.uop_bgn}", field="uop_end")
        if self.iterations <= 0:
            return False
        machine.check_indices("uop_end", Memory.UOP, [self.uop_end - 1])
        return not machine.skip_execution

    def indices(self, of_uop: NDArray[np.int64], outer: int, inner: int) -> NDArray[np.int64]:
        """Element indices of all iterations, in order."""
        y, x = np.ogrid[: self.iter_out, : self.iter_in]
        all_indices: NDArray[np.int64] = (of_uop + (y * outer + x * inner)[:, :, None]).reshape(-1)
        return all_indices


@dataclass(frozen=True, kw_only=True)
class Gemm(_Loops):
    """ACC[dst][b][o] += sum_k INP[src][b][k] * WGT[wgt][o][k] modulo 2^32; with `reset`, ACC[dst] = 0."""

    opcode = 2
    mnemonic = "GEMM"

    src_out: int = bits(log_depth(Memory.INP))
    src_in: int = bits(log_depth(Memory.INP))
    wgt_out: int = bits(log_depth(Memory.WGT))
    wgt_in: int = bits(log_depth(Memory.WGT))

    def execute(self, machine: Machine) -> None:
        if not self.reset:
            machine.count("gemm_counter", self.iterations)
        if not self.has_work(machine):
            return
        uops = decode_uops(machine.config, machine.uop[self.uop_bgn : self.uop_end])
        dst = self.indices(uops[0], self.dst_out, self.dst_in)
        machine.check_indices("dst", Memory.ACC, dst)
        if self.reset:
            machine.acc[dst] = 0
            return
        src = self.indices(uops[1], self.src_out, self.src_in)
        machine.check_indices("src", Memory.INP, src)
        wgt = self.indices(uops[2], self.wgt_out, self.wgt_in)
        machine.check_indices("wgt", Memory.WGT, wgt)
        for first in range(0, len(dst), 4096):  # bounds the memory
            part = slice(first, first + 4096)
            products = np.matmul(machine.inp[src[part]], machine.wgt[wgt[part]].transpose(0, 2, 1))
            np.add.at(machine.acc, dst[part], products.astype(np.int32))


@dataclass(frozen=True, kw_only=True)
class Finish(Instruction):
    """End of the run."""

    opcode = 3
    mnemonic = "FINISH"


@dataclass(frozen=True, kw_only=True)
class Alu(_Loops):
    """ACC[dst] = op(ACC[dst], imm or ACC[src]) in every lane, modulo 2^32; each iteration sees the ones before.

    SHR by v >= 0 is arithmetic, by v < 0 it is a left shift by -v; amounts beyond 31 leave the sign, or zero.
    """

    opcode = 4
    mnemonic = "ALU"

    src_out: int = bits(log_depth(Memory.ACC))
    src_in: int = bits(log_depth(Memory.ACC))
    alu_opcode: int = bits(3)
    use_imm: int = bits(1)
    imm: int = bits(16, signed=True)

    def execute(self, machine: Machine) -> None:
        machine.count("alu_counter", self.iterations)
        if self.alu_opcode >= len(ALU_OPCODES):
            raise IllegalInstructionError(f"{self.alu_opcode} is no operation (0 to 4)", field="alu_opcode")
        if not self.has_work(machine):
            return
        uops = decode_uops(machine.config, machine.uop[self.uop_bgn : self.uop_end])
        dst = self.indices(uops[0], self.dst_out, self.dst_in)
        machine.check_indices("dst", Memory.ACC, dst)
        src = self.indices(uops[1], self.src_out, self.src_in)
        machine.check_indices("src", Memory.ACC, src)
        immediate = np.full(machine.acc.shape[1:], self.imm, np.int64)
        for d, s in zip(dst.tolist(), src.tolist(), strict=True):
            operand = immediate if self.use_imm else machine.acc[s].astype(np.int64)
            machine.acc[d] = alu(self.alu_opcode, machine.acc[d].astype(np.int64), operand).astype(np.int32)


def alu(opcode: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """One ALU operation on 32-bit values held in 64 bits; the low 32 bits of the result count."""
    if opcode == 0:
        return np.minimum(a, b)
    if opcode == 1:
        return np.maximum(a, b)
    if opcode == 2:
        return a + b
    if opcode == 3:
        return np.where(b >= 0, a >> np.clip(b, 0, 31), a << np.clip(-b, 0, 32))
    return a * b


INSTRUCTIONS: dict[int, type[Instruction]] = {cls.opcode: cls for cls in (Load, Store, Gemm, Finish, Alu)}


def opcodes(words: Words) -> NDArray[np.int64]:
    """Opcode of each of N encoded instructions."""
    return (words[:, 0] & np.uint64((1 << OPCODE_BITS) - 1)).astype(np.int64)


def decode(config: VTAConfig, words: Words) -> Instruction:
    """The instruction that two words spell. Raises IllegalInstructionError for an unknown opcode."""
    pair = np.asarray(words, np.uint64).reshape(1, 2)
    opcode = int(opcodes(pair)[0])
    if opcode not in INSTRUCTIONS:
        raise IllegalInstructionError(f"{opcode} is no instruction (0 to 4)", field="opcode")
    cls = INSTRUCTIONS[opcode]
    values = {name: int(column[0]) for name, column in cls.columns(config, pair).items() if name != "opcode"}
    return cls(**values)


def encode(config: VTAConfig, instructions: list[Instruction]) -> Words:
    """A stream, shape (N, 2). Raises IllegalInstructionError with the index of an instruction that does not fit."""
    words = np.zeros((len(instructions), 2), np.uint64)
    for index, instruction in enumerate(instructions):
        try:
            words[index] = instruction.encode(config)
        except IllegalInstructionError as error:
            raise error.at(index) from None
    return words


def field_names(cls: type[Instruction]) -> tuple[str, ...]:
    """Names of the fields, in the order of their bits."""
    return tuple(field.name for field in dataclasses.fields(cls))
