"""The functional simulator: runs programs for their values, not their cycles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import ScratchpadOverflowError, VTAError
from tvm_structured.vta.bits import pack_integers
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.kernel import compiled, machinery_of
from tvm_structured.vta.kernel_compute import FIELDS
from tvm_structured.vta.kernel_state import STATUS
from tvm_structured.vta.machine import COUNTERS, Regions, whole_memory
from tvm_structured.vta.order import NO_TOKENS, Tokens
from tvm_structured.vta.program import Program, as_words, cached_program

ALIGNMENT = 64  # TVM assumes it of every tensor
MAX_ITERATIONS = 1 << 32  # more than 10^12 multiply-adds with the default configuration


class Simulator:
    """An accelerator with its memory: `dram` (uint8, index = physical address) is for the caller to fill and read.

    Buffers, counters and tokens live from run to run, all zero at first. A run that raises leaves counters and
    tokens as they were; if the fault showed before the run, everything is as it was, otherwise (an index in a
    micro-op) the instructions before the one at fault have been executed.
    """

    def __init__(self, config: VTAConfig, dram_bytes: int, target: Any = "host") -> None:
        from tvm_structured.targets import resolve_target

        if dram_bytes < 0:
            raise VTAError(f"dram_bytes={dram_bytes}: expected at least 0")
        resolved = resolve_target(target)
        self.config = config
        self.machinery = machinery_of(config, resolved)
        self._run = compiled(self.machinery, resolved)
        self.dram = aligned(dram_bytes, np.uint8)
        inp = config.depth(Memory.INP)
        self._uop = aligned(config.depth(Memory.UOP), np.uint32)
        self._wgt = aligned(config.depth(Memory.WGT) * config.block**2, self.machinery.wgt_dtype)
        self._inp = aligned(inp * self.machinery.values, np.int8)
        self._offset = aligned(inp * config.batch, np.int32)
        self._acc = aligned(config.depth(Memory.ACC) * self.machinery.values, np.int32)
        self._status = aligned(STATUS, np.int64)
        state = (self.dram, self._uop, self._wgt, self._inp, self._offset, self._acc, self._status)
        self._tensors = [as_tensor(array) for array in state]
        self._counts = np.zeros(len(COUNTERS), np.int64)
        self.tokens: Tokens = NO_TOKENS
        self.reset()

    def reset(self) -> None:
        """Zero buffers and counters, no tokens; `dram` stays."""
        for array in (self._uop, self._inp, self._offset, self._acc):
            array[:] = 0
        self._wgt[:] = 128 if self.machinery.group == 4 else 0
        self.clear_counters()
        self.tokens = NO_TOKENS

    def clear_counters(self) -> None:
        self._counts[:] = 0

    @property
    def counters(self) -> dict[str, int]:
        """Bytes moved and micro-ops executed since the start; unsigned 64-bit, as the original counts."""
        return {name: int(value) for name, value in zip(COUNTERS, self._counts.view(np.uint64), strict=True)}

    def sram(self, memory: Memory) -> NDArray[Any]:
        """A copy of a buffer, as in DRAM: uint32 micro-ops, int32 ACC, packed bytes of WGT and INP; flat."""
        if memory is Memory.UOP:
            return self._uop.copy()
        if memory is Memory.WGT:
            return pack_integers(self.machinery.unpack_wgt(self._wgt), self.config.wgt_bits)
        if memory is Memory.INP:
            return pack_integers(self._inp, self.config.inp_bits)
        return self._acc.copy()

    def run(
        self,
        program: Program | NDArray[np.uint64],
        *,
        skip_execution: bool = False,
        regions: Regions | None = None,
        polling: Sequence[int] = (0, 1, 2),
        max_iterations: int = MAX_ITERATIONS,
    ) -> None:
        """One run, up to and including FINISH.

        `regions` are byte ranges of DRAM that the program may touch, by default all but page 0; `polling` is the
        order in which load (0), compute (1) and store (2) are looked at, which changes no valid program's result.
        With `skip_execution` only counters and micro-op loads happen. Raises a VTAError that names instruction and
        field; more than `max_iterations` micro-op executions are refused, so that no stream runs for hours.
        """
        if not isinstance(program, Program):
            program = cached_program(self.config, as_words(program).tobytes(), False)
        if program.config != self.config:
            raise VTAError("the program was made for another configuration")
        if sorted(polling) != [0, 1, 2]:
            raise VTAError(f"polling={polling!r}: expected the three modules 0, 1, 2 in some order")
        self._check_work(program, max_iterations)
        program.check_memory(self._regions(regions))
        order = program.order(self.tokens, polling)
        self._execute(program, order.indices, skip_execution)
        self._counts += program.counts.sum(axis=0)
        self.tokens = order.tokens

    def _regions(self, regions: Regions | None) -> Regions:
        if regions is None:
            return whole_memory(self.dram)
        for low, high in regions:
            if not 0 <= low <= high <= len(self.dram):
                raise VTAError(f"region {low} to {high} is not inside the {len(self.dram)} bytes of DRAM")
        return regions

    def _check_work(self, program: Program, limit: int) -> None:
        if program.iterations > limit:
            raise VTAError(
                f"the run would execute {program.iterations} micro-ops; raise max_iterations={limit} if it should",
                int(program.iterations_each.argmax()),
                "iter_out",
            )

    def _execute(self, program: Program, order: NDArray[np.int64], skip_execution: bool) -> None:
        order = order[program.table[order, 0] >= 0]
        if skip_execution:
            order = order[program.table[order, 0] == Memory.UOP]
        if not order.size:
            return
        table = aligned((len(order), program.table.shape[1]), np.int64)
        np.take(program.table, order, axis=0, out=table)
        self._status[:] = 0
        self._run(as_tensor(table), *self._tensors)
        fault = int(self._status[0])
        if not fault:
            return
        field, memory = FIELDS[fault - 1]
        index = int(order[self._status[1]])
        if field == "src" and program.columns["opcode"][index] == 4:
            memory = Memory.ACC
        raise ScratchpadOverflowError(
            f"element {int(self._status[1 + fault])} of {memory.name}, which has {self.config.depth(memory)}; make "
            "the loops or micro-ops smaller",
            index,
            field,
        )


def aligned(shape: Any, dtype: Any) -> NDArray[Any]:
    """Zeros that begin at a multiple of ALIGNMENT."""
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * kind.itemsize
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    array: NDArray[Any] = raw[start : start + nbytes].view(kind).reshape(shape)
    return array


def as_tensor(array: NDArray[Any]) -> Any:
    """A TVM tensor on the array's memory."""
    import tvm

    return tvm.runtime.from_dlpack(array)
