"""Writes an accelerator's instructions from accesses to its buffers; tokens and micro-op loads come by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.bits import pack_integers
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.isa import ALU_OPCODES, Alu, Finish, Gemm, Load, Store
from tvm_structured.vta.lower.dependences import COMPUTE, LOAD, STORE, Accesses, Dependences, Draft, Need
from tvm_structured.vta.lower.uop_kernels import Loop, UopBuffer, Uops, as_uops, fold
from tvm_structured.vta.uops import encode_uops

MOST_ITERATIONS = (1 << 14) - 1
MOST_PADDING = 15
CONSTANTS = (Memory.UOP, Memory.WGT, Memory.ACC)
Pads = tuple[int, int, int, int]  # top, left, bottom, right


class Constants:
    """Elements of one memory type that the program finds in DRAM; equal ones are kept once, and made when needed."""

    def __init__(self, width: int, element_bytes: int) -> None:
        self.width = width
        self.element_bytes = element_bytes
        self.parts: list[Callable[[], NDArray[Any]]] = []
        self.known: dict[Any, int] = {}
        self.elements = 0

    def add(self, key: Any, count: int, values: Callable[[], NDArray[Any]]) -> int:
        """Index of the first of `count` elements; `key` names the contents."""
        if key not in self.known:
            self.known[key] = self.elements
            self.parts.append(values)
            self.elements += count
        return self.known[key]

    @property
    def nbytes(self) -> int:
        return self.elements * self.element_bytes

    def raw(self) -> NDArray[np.uint8]:
        raw = np.zeros(self.nbytes, np.uint8)
        end = 0
        for part in self.parts:
            packed = pack_integers(part(), self.width)
            raw[end : end + len(packed)] = packed
            end += len(packed)
        return raw


class Builder:
    """Instructions are added in an order that is right one by one; the modules overlap wherever tokens let them.

    DRAM is a set of named regions; the constants' are "UOP", "WGT" and "ACC". SRAM addresses are the caller's.
    """

    def __init__(self, config: VTAConfig) -> None:
        self.config = config
        self.dependences = Dependences()
        self.constants = {
            memory: Constants(config.wgt_bits if memory is Memory.WGT else 32, config.element_bytes(memory))
            for memory in CONSTANTS
        }
        self.uop_buffer = UopBuffer(config.depth(Memory.UOP))
        depths = {memory: config.depth(memory) for memory in (Memory.INP, Memory.WGT, Memory.ACC)}
        # by the compute module, and by its neighbour: LOAD for INP and WGT, STORE for ACC
        self.computed = {memory: Accesses(depth) for memory, depth in depths.items()}
        self.others = {memory: Accesses(depth) for memory, depth in depths.items()}
        self.scratch: dict[str, Accesses] = {}

    def add_scratch(self, region: str, elements: int) -> None:
        """A region of DRAM that the program stores to and loads from."""
        self.scratch[region] = Accesses(elements)

    def constant(self, memory: Memory, key: Any, count: int, values: Callable[[], NDArray[Any]]) -> int:
        """DRAM element of `count` constants, appended to the memory's region unless the key is known."""
        return self.constants[memory].add(key, count, values)

    # -- transfers -------------------------------------------------------------------------------------------

    def load(
        self,
        memory: Memory,
        sram: int,
        region: str,
        first: int,
        columns: int,
        rows: int = 1,
        stride: int = 0,
        pads: Pads = (0, 0, 0, 0),
    ) -> None:
        """sram[...] = `rows` rows of `columns` elements, `stride` apart, from element `first` of a region."""
        top, left, bottom, right = pads
        fields = {
            "memory_type": int(memory), "sram_base": sram, "dram_base": first, "y_size": rows, "x_size": columns,
            "x_stride": stride or columns, "y_pad_0": top, "x_pad_0": left, "y_pad_1": bottom, "x_pad_1": right,
        }  # fmt: skip
        end = sram + (top + rows + bottom) * (left + columns + right)
        needs: list[Need] = []
        if region in self.scratch:
            last = first + max(rows - 1, 0) * (stride or columns) + columns
            needs.append((STORE, self.scratch[region].latest(first, last)))
        draft = Draft(Load, fields, region)
        if memory in (Memory.INP, Memory.WGT):
            needs.append((COMPUTE, self.computed[memory].latest(sram, end)))
            self.others[memory].touch(sram, end, self.dependences.add(LOAD, draft, needs))
            return
        if memory is not Memory.UOP:
            needs.append((STORE, self.others[Memory.ACC].latest(sram, end)))
        number = self.dependences.add(COMPUTE, draft, needs)
        if memory is not Memory.UOP:
            self.computed[Memory.ACC].touch(sram, end, number)

    def store(self, sram: int, region: str, first: int, columns: int, rows: int = 1, stride: int = 0) -> None:
        """Element `first` and on of a region, `rows` rows `stride` apart = sram[...]."""
        fields = {
            "memory_type": int(Memory.OUT), "sram_base": sram, "dram_base": first, "y_size": rows, "x_size": columns,
            "x_stride": stride or columns,
        }  # fmt: skip
        end = sram + rows * columns
        needs = [(COMPUTE, self.computed[Memory.ACC].latest(sram, end))]
        number = self.dependences.add(STORE, Draft(Store, fields, region), needs)
        self.others[Memory.ACC].touch(sram, end, number)
        if region in self.scratch:
            self.scratch[region].touch(first, first + max(rows - 1, 0) * (stride or columns) + columns, number)

    # -- computation -----------------------------------------------------------------------------------------

    def gemm(self, uops: Uops, outer: Loop | None = None, inner: Loop | None = None) -> None:
        """ACC[dst] += INP[src] WGT[wgt]^T for all iterations; loops that are not given are found in the micro-ops."""
        self._loops(Gemm, uops, outer, inner, {}, (Memory.ACC, Memory.INP, Memory.WGT))

    def zero(self, first: int, count: int) -> None:
        """ACC[first : first + count] = 0."""
        for start in range(first, first + count, MOST_ITERATIONS):
            part = Loop(min(MOST_ITERATIONS, first + count - start), 1)
            self._loops(Gemm, as_uops(start), Loop(), part, {"reset": 1}, (Memory.ACC,))

    def alu_immediate(self, operation: str, imm: int, dst: int, outer: Loop, inner: Loop | None = None) -> None:
        """ACC[dst] = op(ACC[dst], imm) for all iterations."""
        fields = {"alu_opcode": ALU_OPCODES.index(operation), "use_imm": 1, "imm": imm}
        inner = Loop() if inner is None else inner
        # the sources are checked although they are not used
        outer, inner = (Loop(loop.count, loop.dst, loop.dst) for loop in (outer, inner))
        self._loops(Alu, as_uops(dst, dst), outer, inner, fields, (Memory.ACC, Memory.ACC))

    def alu(self, operation: str, dst: Any, src: Any, outer: Loop, inner: Loop | None = None) -> None:
        """ACC[dst] = op(ACC[dst], ACC[src]) for all iterations; dst and src may be arrays of as many elements."""
        fields = {"alu_opcode": ALU_OPCODES.index(operation)}
        inner = Loop() if inner is None else inner
        self._loops(Alu, as_uops(dst, src), outer, inner, fields, (Memory.ACC, Memory.ACC))

    def _loops(
        self,
        kind: type[Gemm] | type[Alu],
        uops: Uops,
        outer: Loop | None,
        inner: Loop | None,
        fields: dict[str, int],
        memories: tuple[Memory, ...],
    ) -> None:
        if outer is None:
            uops, outer = fold(uops, MOST_ITERATIONS)
        if inner is None:
            uops, inner = fold(uops, MOST_ITERATIONS)
        for start in range(0, len(uops), self.uop_buffer.depth):
            self._one(kind, uops[start : start + self.uop_buffer.depth], outer, inner, fields, memories)

    def _one(
        self,
        kind: type[Gemm] | type[Alu],
        uops: Uops,
        outer: Loop,
        inner: Loop,
        fields: dict[str, int],
        memories: tuple[Memory, ...],
    ) -> None:
        words = encode_uops(self.config, *uops.T)
        begin, present = self.uop_buffer.place(words)
        if not present:
            source = self.constant(Memory.UOP, words.tobytes(), len(words), lambda: words)
            self.load(Memory.UOP, begin, "UOP", source, len(words))
        every = {
            **fields, "uop_bgn": begin, "uop_end": begin + len(words), "iter_out": outer.count, "iter_in": inner.count,
        }  # fmt: skip
        names = ("dst", "src", "wgt") if kind is Gemm else ("dst", "src")
        for loop, suffix in ((outer, "out"), (inner, "in")):
            for name in names:
                every[f"{name}_{suffix}"] = getattr(loop, name) if loop.count > 1 else 0
        first, end = uops.min(axis=0), uops.max(axis=0) + outer.reach + inner.reach + 1
        ranges = [(memory, int(first[i]), int(end[i])) for i, memory in enumerate(memories)]
        needs = [
            (STORE if memory is Memory.ACC else LOAD, self.others[memory].latest(low, high))
            for memory, low, high in ranges
        ]
        number = self.dependences.add(COMPUTE, Draft(kind, every), needs)
        for memory, low, high in ranges:
            self.computed[memory].touch(low, high, number)

    def finish(self) -> list[Draft]:
        """The stream, ended by a FINISH that waits for everything."""
        self.dependences.add(COMPUTE, Draft(Finish, {}), [self.dependences.done(m) for m in (LOAD, STORE)])
        stream = self.dependences.stream
        if self.uop_buffer.has_all and self.uop_buffer.free:
            # what fits is loaded at once; such a load needs no token and none needs it
            fields = {"memory_type": int(Memory.UOP), "x_size": self.uop_buffer.free, "y_size": 1}
            first = Draft(Load, {**fields, "x_stride": self.uop_buffer.free, "dram_base": 0}, "UOP")
            return [first, *(draft for draft in stream if draft.region != "UOP")]
        return stream


class Slots:
    """A part of a buffer, cut into equal slots that are used in turn; each is remembered by what it holds."""

    def __init__(self, first: int, size: int, count: int) -> None:
        self.starts = [first + i * size for i in range(count)]
        self.held: dict[Any, int] = {}

    def take(self, key: Any) -> tuple[int, bool]:
        """Where the contents belong, and whether they are there already; the slot unused for longest is given up."""
        if key in self.held:
            start = self.held.pop(key)
            self.held[key] = start
            return start, True
        start = self.starts.pop(0) if self.starts else self.held.pop(next(iter(self.held)))
        self.held[key] = start
        return start, False


def tiles(extent: int, size: int) -> Iterable[tuple[int, int]]:
    """(first, count) of consecutive parts."""
    for first in range(0, extent, size):
        yield first, min(size, extent - first)
