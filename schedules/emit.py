"""Emission of TensorIR: Python loops become straight-line code, vectors and registers are explicit.

Used for kernels that schedule primitives cannot express. An `Emitter` knows the number of lanes; all
indices are element indices, the last one is the start of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cpu import Cpu

serial = I.serial
parallel = I.parallel
STORAGE_FLOOR = 256  # float32 values


class EmittedFunc:
    """Holds the PrimFunc once the `prim_func` context has closed."""

    func: Any = None


@contextmanager
def prim_func(name: str) -> Iterator[EmittedFunc]:
    """Open a PrimFunc that is already scheduled and that fusion must leave alone."""
    made = EmittedFunc()
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):
            I.func_name(name)
            # 8 is TVM's kOpaque: FuseOps neither looks inside nor merges it
            I.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
            yield made
    made.func = builder.get().without_attr("global_symbol")


@contextmanager
def root_block() -> Iterator[None]:
    """The body of a function with one input: Relax looks for a reshape in those, and insists on a block."""
    with I.sblock("root"):
        I.reads([])
        I.writes([])
        yield


def i64(extent: Extent) -> Any:
    """Relax shapes are int64; an int32 extent breaks FuseTIR."""
    return tirx.IntImm("int64", extent) if isinstance(extent, int) else extent


def i32(value: Any) -> Any:
    """Lane masks count in int32; no dimension has more than 2^31 elements."""
    return I.int32(value) if isinstance(value, int) else tirx.Cast("int32", value)


def arg(name: str, shape: Sequence[Extent], dtype: str = "float32") -> Any:
    """The next parameter of the PrimFunc."""
    return I.arg(name, I.buffer([i64(s) for s in shape], dtype))


def scratch(shape: Sequence[Extent], dtype: str = "float32") -> Any:
    """Workspace on the heap, allocated where it is declared (once a thread inside `parallel`)."""
    return roomy([i64(s) for s in shape], dtype, {})


def local(shape: Sequence[int], dtype: str = "float32") -> Any:
    """A small array on the stack, of any size: without the annotation TVM moves 1 KiB and more to the heap."""
    return roomy(list(shape), dtype, {"disable_lower_builtin": True})


def roomy(shape: Sequence[Extent], dtype: str, annotations: dict[str, Any]) -> Any:
    """Allocate an array at least 16 times as large as a vector register, by raising its leading extent.

    StorageRewrite lets arrays whose sizes differ by less take over each other's storage, also a scalar array that
    of a dead register, and then fails on the two kinds of access.
    """
    if not all(isinstance(extent, (int, tirx.IntImm)) for extent in shape):
        return I.alloc_buffer(shape, dtype, annotations=annotations)
    leading, *rest = (int(extent) for extent in shape)
    needed = STORAGE_FLOOR // math.prod(rest) + 1
    if leading >= needed:
        return I.alloc_buffer(shape, dtype, annotations=annotations)
    buffer = I.alloc_buffer([i64(needed), *(i64(extent) for extent in rest)], dtype, annotations=annotations)
    # CompactBufferAllocation would take the room away again if nothing used it
    I.buffer_store(buffer, tirx.const(0, dtype), [needed - 1, *(extent - 1 for extent in rest)])
    return buffer


def ceildiv(a: Extent, b: int) -> Extent:
    """Ceiling of a / b for ints and expressions."""
    return -(-a // b) if isinstance(a, int) else (a + (b - 1)) // b


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Statements under a run-time condition."""
    with I.If(condition):
        with I.Then():
            yield


def either(condition: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """`then` under the condition, `otherwise` without it."""
    with I.If(condition):
        with I.Then():
            then()
        with I.Else():
            otherwise()


def row_blocks(rows: Extent, block: int, body: Callable[[Any, int], None], start: Any = 0) -> None:
    """body(first_row, count) over all rows: full blocks in a loop, then the rest.

    A rest known at compile time is one smaller block, otherwise single rows.
    """
    if isinstance(rows, int):
        full, rest = divmod(rows, block)
        if full == 1:
            body(start, block)
        elif full:
            with serial(0, full) as i:
                body(start + i * block, block)
        if rest:
            body(start + full * block, rest)
        return
    with serial(0, rows // block) as i:
        body(held(start + i * block), block)
    with serial(0, rows % block) as i:
        body(held(start + rows // block * block + i), 1)


def held(index: Any) -> Any:
    """An index behind a stack slot. TVM's simplifier goes through each use of an index with symbolic extents,
    also when it is bound to a variable, and takes seconds; it does not look into a load."""
    # int32: StorageRewrite would let a wider slot take over that of a register, see `roomy`
    slot = I.alloc_buffer((1,), "int32")
    I.buffer_store(slot, tirx.Cast("int32", index), [0])
    return tirx.Cast("int64", slot[0])


class Emitter:
    """Vector operations for one CPU."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.lanes = cpu.lanes
        self.dtype = f"float32x{cpu.lanes}"

    def load(self, buffer: Any, *index: Any) -> Any:
        """`lanes` consecutive elements of the last dimension."""
        *lead, last = index
        return buffer[(*lead, I.ramp(last, 1, self.lanes))]

    def store(self, buffer: Any, value: Any, *index: Any) -> None:
        *lead, last = index
        I.buffer_store(buffer, value, [*lead, I.ramp(last, 1, self.lanes)])

    def mask(self, first: Any, limit: Extent) -> Any:
        """Lane i is on where first + i < limit."""
        # the intrinsic takes two numbers of one type; beside a symbolic extent one of them would be int64
        return tirx.op.get_active_lane_mask(f"boolx{self.lanes}", i32(first), i32(limit))

    def bind_mask(self, first: Any, limit: Extent) -> Any:
        return I.Bind(self.mask(first, limit))

    def load_masked(self, buffer: Any, mask: Any, *index: Any) -> Any:
        """Like `load`, but lanes that are off are not read (their value is undefined)."""
        *lead, last = index
        return tirx.op.masked_load(self.dtype, buffer, *lead, I.ramp(last, 1, self.lanes), mask)

    def load_or_zero(self, buffer: Any, mask: Any, *index: Any) -> Any:
        """Like `load_masked`, but lanes that are off are zero. The mask is an expression, not a bound one.

        In two statements: within a Select TVM takes the condition for granted, also where it is the mask of a load.
        """
        loaded = self.bind(self.load_masked(buffer, mask, *index))
        return self.bind(tirx.Select(mask, loaded, self.splat(0.0)))

    def store_masked(self, buffer: Any, value: Any, mask: Any, *index: Any) -> None:
        *lead, last = index
        I.evaluate(tirx.op.masked_store(buffer, value, *lead, I.ramp(last, 1, self.lanes), mask))

    def splat(self, value: Any) -> Any:
        """One number in every lane; Python numbers become float32."""
        if isinstance(value, (int, float)):
            value = I.float32(float(value))
        return I.broadcast(value, self.lanes)

    def bind(self, value: Any) -> Any:
        """Evaluate once, through a stack slot: LLVM makes it a register, and unlike long chains of
        `T.Bind` it does not blow up the time TVM's passes take."""
        slot = self.registers(1)[0]
        self.set(slot, value)
        return slot[0]

    def registers(self, count: int) -> list[Any]:
        """Mutable vectors, one stack slot each, so that LLVM can keep them in registers."""
        return [I.alloc_buffer((1,), self.dtype) for _ in range(count)]

    def set(self, register: Any, value: Any) -> None:
        I.buffer_store(register, value, [0])

    def zero(self, registers: Sequence[Any]) -> None:
        for register in registers:
            self.set(register, self.splat(0.0))

    def prefetch(self, buffer: Any, *index: Any) -> None:
        """Ask for the cache line, to be read, in level 2."""
        self.prefetch_element(buffer[tuple(index)])

    def prefetch_element(self, element: Any, level: int = 2) -> None:
        """Ask for the cache line of an element, to be read, in level 1 or 2. It may lie behind the end of its array."""
        hint = I.int32(4 - level)  # LLVM's locality: 3 is the nearest
        I.evaluate(tirx.call_intrin("void", "tirx.prefetch", I.address_of(element), I.int32(0), hint, I.int32(1)))

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        """Lanes of the concatenation of a and b."""
        return I.Shuffle([a, b], [I.int32(int(i)) for i in lanes])
