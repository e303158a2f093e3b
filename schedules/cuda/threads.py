"""Emission of CUDA kernels: a grid of blocks, and in each block stages that its threads run together.

A stage ends where its threads must wait for each other. On a GPU a stage is plain code of one thread and its end is a
barrier. With `serial` (the form for emulation) every stage is a loop nest of its own over `threadIdx.x`, and registers
are arrays with a row for every thread: the same statements, run one thread after the other.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Extent
from tvm_structured.schedules.cuda.device_code import PUT
from tvm_structured.schedules.emit import i64, when

WARP = 32
VECTOR_BYTES = 16
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def f32(value: Any) -> Any:
    """A float32 expression of a number or of a value of any float type."""
    return tirx.FloatImm("float32", float(value)) if isinstance(value, (int, float)) else tirx.Cast("float32", value)


def i32(value: Any) -> Any:
    """Threads count in int32; no dimension here has more than 2^31 elements."""
    return tirx.IntImm("int32", value) if isinstance(value, int) else tirx.Cast("int32", value)


def ceildiv(a: Extent, b: int) -> Extent:
    return -(-a // b) if isinstance(a, int) else (a + (b - 1)) // b


def multiple(a: int, b: int) -> int:
    """The next multiple of b."""
    return -(-a // b) * b


class Registers:
    """`count` values of one thread."""

    def __init__(self, threads: Threads, count: int, dtype: str) -> None:
        self.threads, self.count, self.dtype = threads, count, dtype
        shape = (threads.count, count) if threads.serial else (count,)
        self.buffer = I.alloc_buffer(shape, dtype, scope="local")

    def index(self, *i: Any) -> list[Any]:
        return [self.threads.tx, *i] if self.threads.serial else [*i]

    def __getitem__(self, i: Any) -> Any:
        return self.buffer[tuple(self.index(i))]

    def vector(self, i: Any, lanes: int) -> Any:
        return self.buffer[tuple(self.index(I.ramp(i, 1, lanes)))]

    def __setitem__(self, i: Any, value: Any) -> None:
        I.buffer_store(self.buffer, value, self.index(i))

    def set_vector(self, i: Any, value: Any, lanes: int) -> None:
        I.buffer_store(self.buffer, value, self.index(I.ramp(i, 1, lanes)))

    def address(self, i: Any = 0) -> Any:
        return I.address_of(self[i])

    def fill(self, value: float = 0.0) -> None:
        for i in range(self.count):
            self[i] = tirx.const(value, self.dtype)


class Shared:
    """An array that the threads of a block share, with strides of our own: `stride` elements from row to row.

    Device functions read and write an `opaque` one through addresses. TVM would cut off what it does not see used, and
    where it saw writes it would ask for barriers that the order of the tiles in flight makes needless.
    """

    def __init__(self, shape: Sequence[int], stride: int, dtype: str, opaque: bool) -> None:
        self.dtype, self.opaque = dtype, opaque
        self.strides = [stride, 1]
        for extent in reversed(shape[1:-1]):
            self.strides.insert(0, self.strides[0] * extent)
        size = self.strides[0] * shape[0]
        # ThreadSync fails on stores to "shared.dyn" under a condition; opaque arrays may be larger than 48 KB
        self.buffer = I.alloc_buffer((size,), dtype, scope="shared.dyn" if opaque else "shared")
        if opaque:
            I.evaluate(I.address_of(self.buffer[size - 1]))

    def flat(self, index: Sequence[Any]) -> Any:
        return sum(i * stride for i, stride in zip(index, self.strides, strict=True))

    def __getitem__(self, index: Sequence[Any]) -> Any:
        return self.buffer[self.flat(index)]

    def __setitem__(self, index: Sequence[Any], value: Any) -> None:
        if self.opaque:
            call("ts_put", self.address(*index), value, source=PUT)
        else:
            I.buffer_store(self.buffer, value, [self.flat(index)])

    def set_vector(self, index: Sequence[Any], value: Any, lanes: int) -> None:
        I.buffer_store(self.buffer, value, [I.ramp(self.flat(index), 1, lanes)])

    def at_first(self, index: Any) -> Any:
        """Element `index` of the first row."""
        return self.buffer[index]

    def address(self, *index: Any) -> Any:
        return I.address_of(self[index])


class Threads:
    """The threads of one block while its code is emitted; see `launch`."""

    def __init__(self, count: int, serial: bool) -> None:
        self.count, self.serial = count, serial
        self.tx: Any = None

    @contextmanager
    def stage(self) -> Iterator[None]:
        """What every thread does up to the next barrier."""
        if not self.serial:
            yield
            self.barrier()
            return
        with I.thread_binding(0, self.count, thread="threadIdx.x") as self.tx:
            yield
        self.tx = None

    @contextmanager
    def last_stage(self) -> Iterator[None]:
        """A stage behind which no barrier is needed."""
        if not self.serial:
            yield
            return
        with self.stage():
            yield

    def barrier(self) -> None:
        I.evaluate(tirx.call_intrin("", "tirx.tvm_storage_sync", "shared"))

    def shared(self, shape: Sequence[int], dtype: str, padding: int = 0, opaque: bool = False) -> Shared:
        """Rows (the last extent) are padded so that columns do not meet in one bank."""
        return Shared(shape, shape[-1] + padding, dtype, opaque and not self.serial)

    def registers(self, count: int, dtype: str = "float32") -> Registers:
        return Registers(self, count, dtype)

    def value(self, value: Any, dtype: str = "float32") -> Any:
        """Evaluate once, into a register of its own."""
        register = self.registers(1, dtype)
        register[0] = value
        return register[0]

    @property
    def lane(self) -> Any:
        return self.tx % WARP

    @property
    def warp(self) -> Any:
        return self.tx // WARP


@contextmanager
def launch(grid: Sequence[Extent], threads: int, serial: bool) -> Iterator[tuple[Threads, list[Any]]]:
    """One kernel of `threads` threads to a block. Yields the threads and the block's coordinates in the grid.

    The first extent of the grid is the fastest; the last may be symbolic.
    """
    made = Threads(threads, serial)
    # in one dimension: the others end at 65535 blocks
    frames = [I.thread_binding(0, i32(functools.reduce(operator.mul, grid)), thread="blockIdx.x")]
    rest, where = frames[0].__enter__(), []
    for extent in grid[:-1]:
        where.append(rest % extent)
        rest = rest // extent
    where.append(rest)
    if not serial:
        frame = I.thread_binding(0, threads, thread="threadIdx.x")
        made.tx = frame.__enter__()
        frames.append(frame)
    try:
        yield made, where
    finally:
        for frame in reversed(frames):
            frame.__exit__(None, None, None)


def scratch(shape: Sequence[Extent], dtype: str) -> Any:
    """Device memory between two kernels of one function. It stays in L2 if it is small."""
    return I.alloc_buffer([i64(extent) for extent in shape], dtype)


def call(name: str, *args: Any, source: str) -> None:
    """Call a device function that is given as CUDA source."""
    I.evaluate(cuda_func_call(name, *args, source_code=source))


def load_vector(buffer: Any, index: Sequence[Any], lanes: int) -> Any:
    *lead, last = index
    return buffer[(*lead, I.ramp(last, 1, lanes))]


def all_of(conditions: Sequence[Any]) -> Any:
    """The conjunction of expressions and of True; True for none."""
    result: Any = True
    for condition in conditions:
        if condition is not True:
            result = condition if result is True else tirx.all(result, condition)
    return result


def under(condition: Any, body: Callable[[], None]) -> None:
    """body, under the condition unless that is True."""
    if condition is True:
        body()
        return
    with when(condition):
        body()
