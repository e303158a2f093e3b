"""The state that instructions act on, in NumPy: buffers, memory and counters. Plain, slow and the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import DramRangeError, ScratchpadOverflowError
from tvm_structured.vta.bits import pack_integers, unpack_integers
from tvm_structured.vta.config import Memory, VTAConfig

PAGE = 4096
COUNTERS = (
    "inp_load_nbytes",
    "wgt_load_nbytes",
    "acc_load_nbytes",
    "uop_load_nbytes",
    "out_store_nbytes",
    "gemm_counter",
    "alu_counter",
)
Regions = Sequence[tuple[int, int]]


def wrap32(value: int) -> int:
    """A product as the original forms it: a signed 32-bit number."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def whole_memory(dram: NDArray[np.uint8]) -> Regions:
    """Everything but page 0, which is never allocated: address 0 means null."""
    return ((PAGE, len(dram)),)


class Machine:
    """Buffers hold one integer per value: uop (depth,), wgt (depth, out, in), inp and acc (depth, batch, block).

    `dram` is changed in place. `regions` are the half-open ranges of it that may be accessed; no access crosses from
    one to another. With `skip_execution` only counters and micro-op loads happen.
    """

    def __init__(
        self,
        config: VTAConfig,
        dram: NDArray[np.uint8],
        regions: Regions | None = None,
        skip_execution: bool = False,
        negative_ranges: bool = False,
    ) -> None:
        self.config = config
        self.dram = dram
        self.regions = whole_memory(dram) if regions is None else regions
        self.skip_execution = skip_execution
        self.negative_ranges = negative_ranges
        vector = (config.batch, config.block)
        self.uop = np.zeros(config.depth(Memory.UOP), np.uint32)
        self.wgt = np.zeros((config.depth(Memory.WGT), config.block, config.block), np.int64)
        self.inp = np.zeros((config.depth(Memory.INP), *vector), np.int64)
        self.acc = np.zeros((config.depth(Memory.ACC), *vector), np.int32)
        self.counters = dict.fromkeys(COUNTERS, 0)

    def count(self, name: str, value: int) -> None:
        self.counters[name] = (self.counters[name] + wrap32(value)) % (1 << 64)

    def buffer(self, memory: Memory) -> NDArray[Any]:
        """The on-chip buffer of a memory."""
        buffers: dict[Memory, NDArray[Any]] = {Memory.UOP: self.uop, Memory.WGT: self.wgt, Memory.INP: self.inp}
        return buffers.get(memory, self.acc)

    def address(self, memory: Memory, element: int) -> int:
        """Byte address of a DRAM element, formed in 32 bits as in the original."""
        if memory is Memory.ACC_8BIT:
            return element * self.config.element_bytes(Memory.ACC) % (1 << 32) // 4
        return element * self.config.element_bytes(memory) % (1 << 32)

    def check_range(self, first: int, end: int) -> None:
        """Raise DramRangeError unless one region holds the bytes [first, end)."""
        if not any(low <= first < high and end <= high for low, high in self.regions):
            raise DramRangeError(
                f"bytes {first} to {end} are outside the memory given to the program", field="dram_base"
            )

    def read(self, memory: Memory, address: int, count: int) -> NDArray[Any]:
        """Values of `count` DRAM elements from a byte address, shaped like the on-chip buffer."""
        values = self.read_packed(memory, self.dram[address : address + count * self.config.element_bytes(memory)])
        return values.reshape(count, *self.buffer(memory).shape[1:])

    def read_packed(self, memory: Memory, raw: NDArray[np.uint8]) -> NDArray[Any]:
        """The values that the bytes of elements hold, flat."""
        if memory is Memory.UOP:
            return raw.copy().view("<u4").astype(np.uint32)
        width = {Memory.WGT: self.config.wgt_bits, Memory.INP: self.config.inp_bits, Memory.ACC: 32}.get(memory, 8)
        return unpack_integers(raw, width)

    def write_out(self, address: int, values: NDArray[np.int32]) -> None:
        """Low bits of ACC values to DRAM."""
        raw = pack_integers(values, self.config.out_bits)
        self.dram[address : address + len(raw)] = raw

    def check_indices(self, field: str, memory: Memory, indices: NDArray[np.int64] | Iterable[int]) -> None:
        """Raise ScratchpadOverflowError unless all elements exist."""
        largest = int(np.max(np.asarray(indices)))
        depth = self.config.depth(memory)
        if largest >= depth:
            raise ScratchpadOverflowError(
                f"element {largest} of {memory.name}, which has {depth}; make the loops or micro-ops smaller",
                field=field,
            )
