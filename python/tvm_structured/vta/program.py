"""A checked stream, and the table of its instructions that the simulator executes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import VTAError
from tvm_structured.vta.bits import Words
from tvm_structured.vta.checks import Columns, addresses, check_instructions, check_memory, columns_of, iterations
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.isa import LOADABLE, Alu, Gemm, Load, Store
from tvm_structured.vta.kernel import GEMM, RESET, STORE, alu_kind
from tvm_structured.vta.kernel_state import COLUMNS
from tvm_structured.vta.listing import disassemble
from tvm_structured.vta.machine import COUNTERS, Regions
from tvm_structured.vta.order import FLAGS, NO_TOKENS, Order, Tokens, execution_order, modules_of

TRANSFER = ("y_size", "x_size", "x_stride", "y_pad_0", "y_pad_1", "x_pad_0", "x_pad_1")
LOOPS = ("uop_bgn", "uop_end", "iter_out", "iter_in", "dst_out", "dst_in", "src_out", "src_in", "wgt_out", "wgt_in")


class Program:
    """One run of the accelerator: `words` of shape (N, 2), uint64.

    Raises VTAError, naming instruction and field, for what is illegal or leaves the on-chip buffers; `order` and
    `check_memory` find the other faults that show before a run, and remember what they found. With
    `negative_ranges`, uop_end < uop_bgn is counted and does nothing, as in the original.
    """

    def __init__(self, config: VTAConfig, words: Any, negative_ranges: bool = False) -> None:
        self.config = config
        self.words = as_words(words)
        self.columns: Columns = columns_of(config, self.words)
        check_instructions(config, self.columns, negative_ranges)
        self.table = table_of(config, self.columns)
        self.counts = counts_of(config, self.columns)
        self._orders: dict[tuple[Tokens, tuple[int, ...]], Order] = {}
        self._safe: set[tuple[tuple[int, int], ...]] = set()

    def __len__(self) -> int:
        return len(self.words)

    def __str__(self) -> str:
        """The listing."""
        return disassemble(self.config, self.words)

    def order(self, start: Tokens = NO_TOKENS, polling: Sequence[int] = (0, 1, 2)) -> Order:
        """When each instruction is executed. Raises DeadlockError or FinishError."""
        key = (start, tuple(polling))
        if key not in self._orders:
            c = self.columns
            flags = np.stack([c[name] for name in FLAGS], axis=1).tolist()
            modules = modules_of(c["opcode"], c["memory_type"]).tolist()
            self._orders[key] = execution_order(c["opcode"].tolist(), modules, flags, start, polling)
        return self._orders[key]

    def check_memory(self, regions: Regions) -> None:
        """Raise DramRangeError unless all accesses stay inside the regions."""
        key = tuple((int(low), int(high)) for low, high in regions)
        if key not in self._safe:
            check_memory(self.config, self.columns, key)
            self._safe.add(key)

    @cached_property
    def iterations_each(self) -> NDArray[np.int64]:
        """Micro-ops that each instruction executes."""
        each: NDArray[np.int64] = np.maximum(iterations(self.columns), 0)
        return each

    @cached_property
    def iterations(self) -> int:
        """Micro-ops that the run executes."""
        return int(self.iterations_each.astype(object).sum())


@lru_cache(maxsize=64)
def cached_program(config: VTAConfig, raw: bytes, negative_ranges: bool) -> Program:
    """The program of a stream seen before is not checked again."""
    return Program(config, np.frombuffer(raw, np.uint64).reshape(-1, 2), negative_ranges)


def as_words(words: Any) -> Words:
    """A private copy, shape (N, 2). Raises VTAError for anything else."""
    array = np.asarray(words)
    if array.dtype != np.uint64 or array.ndim != 2 or array.shape[1] != 2:
        raise VTAError(f"a stream is a uint64 array of shape (N, 2); this is {array.dtype}{list(array.shape)}")
    return np.array(array, order="C")


def table_of(config: VTAConfig, c: Columns) -> NDArray[np.int64]:
    """Rows of the simulator's table, kind -1 for what only moves tokens."""
    opcode, memory = c["opcode"], c["memory_type"]
    table = np.zeros((len(opcode), COLUMNS), np.int64)
    loop = (opcode == Gemm.opcode) | (opcode == Alu.opcode)
    kind = np.select(
        [
            (opcode == Load.opcode) & (c["x_size"] != 0),
            (opcode == Store.opcode) & (c["x_size"] != 0),
            loop & (iterations(c) <= 0),
            opcode == Gemm.opcode,
            opcode == Alu.opcode,
        ],
        [memory, STORE, -1, np.where(c["reset"] != 0, RESET, GEMM), alu_kind(c["alu_opcode"], c["use_imm"])],
        -1,
    )
    table[:, 0] = kind
    move = ~loop
    table[move, 1] = c["sram_base"][move]
    table[move, 2] = addresses(config, c)[0][move]
    for column, name in enumerate(TRANSFER, 3):
        table[move, column] = c[name][move]
    for column, name in enumerate(LOOPS, 1):
        table[loop, column] = c[name][loop]
    alu = opcode == Alu.opcode
    table[alu, 9] = c["imm"][alu]
    return table


def counts_of(config: VTAConfig, c: Columns) -> NDArray[np.int64]:
    """What each instruction adds to the counters, shape (N, 7); products wrap at 32 bits as in the original."""
    counts = np.zeros((len(c["opcode"]), len(COUNTERS)), np.int64)
    area = c["x_size"] * c["y_size"]
    for memory, name in LOADABLE.items():
        home = Memory.ACC if memory is Memory.ACC_8BIT else memory
        loads = (c["opcode"] == Load.opcode) & (c["memory_type"] == memory)
        counts[loads, COUNTERS.index(name)] = area[loads] * config.element_bytes(home)
    stores = c["opcode"] == Store.opcode
    counts[stores, COUNTERS.index("out_store_nbytes")] = area[stores] * config.element_bytes(Memory.OUT)
    gemm = (c["opcode"] == Gemm.opcode) & (c["reset"] == 0)
    counts[gemm, COUNTERS.index("gemm_counter")] = iterations(c)[gemm]
    alu = c["opcode"] == Alu.opcode
    counts[alu, COUNTERS.index("alu_counter")] = iterations(c)[alu]
    return counts.astype(np.int32).astype(np.int64)
