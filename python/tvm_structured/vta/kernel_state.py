"""What the emitted simulator works on: its arguments and how values lie in them.

INP and WGT are kept unpacked, one byte a value. With dot-product instructions (VNNI), WGT is kept in groups of four
inputs, `[in / 4][out][4]`, plus 128: the instruction multiplies unsigned by signed bytes, and -128 * sum(INP) is kept
beside every INP vector to take the offset out again. Otherwise WGT is `[in][out]`, so that outputs are lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.vta.config import Memory, VTAConfig

COLUMNS = 14  # of the instruction table: the kind, then its operands
STATUS = 6  # error kind, row, largest index of dst, src and wgt, reserved


@dataclass(frozen=True)
class Machinery:
    """How one configuration is simulated on one CPU."""

    config: VTAConfig
    has_vnni: bool

    @property
    def lanes(self) -> int:
        """Outputs in one vector."""
        return min(16, self.config.block)

    @property
    def group(self) -> int:
        """Inputs that one instruction multiplies and adds."""
        return 4 if self.has_vnni and self.config.block >= 4 else 1

    @property
    def values(self) -> int:
        """Values of one ACC or INP element."""
        return self.config.batch * self.config.block

    @property
    def wgt_dtype(self) -> str:
        return "uint8" if self.group == 4 else "int8"

    def wgt_position(self, out: Any, inner: Any) -> Any:
        """Offset of WGT[out][inner] in its element."""
        block = self.config.block
        if self.group == 1:
            return inner * block + out
        return (inner // 4 * block + out) * 4 + inner % 4

    def pack_wgt(self, values: NDArray[Any]) -> NDArray[Any]:
        """WGT of shape (depth, out, in) as the kernel keeps it."""
        depth, block, _ = values.shape
        grouped = values.reshape(depth, block, block // self.group, self.group).transpose(0, 2, 1, 3)
        return (grouped + (128 if self.group == 4 else 0)).astype(self.wgt_dtype).reshape(-1)

    def unpack_wgt(self, kept: NDArray[Any]) -> NDArray[np.int64]:
        """The inverse of `pack_wgt`."""
        block = self.config.block
        grouped = kept.astype(np.int64).reshape(-1, block // self.group, block, self.group).transpose(0, 2, 1, 3)
        return grouped.reshape(-1, block, block) - (128 if self.group == 4 else 0)


@dataclass(frozen=True)
class State:
    """Arguments of the emitted function, in their order."""

    table: Any  # (instructions, COLUMNS) int64
    dram: Any  # (bytes,) uint8
    uop: Any  # (depth,) uint32
    wgt: Any  # (depth * block * block,) int8 or uint8
    inp: Any  # (depth * batch * block,) int8
    offset: Any  # (depth * batch,) int32, -128 * the sum of each INP vector
    acc: Any  # (depth * batch * block,) int32
    status: Any  # (STATUS,) int64

    @classmethod
    def declare(cls, machinery: Machinery) -> State:
        """Declare the parameters of the open PrimFunc."""
        config = machinery.config
        rows, size = tirx.Var("rows", "int64"), tirx.Var("size", "int64")

        def arg(name: str, shape: list[Any], dtype: str) -> Any:
            return I.arg(name, I.buffer([int64(s) for s in shape], dtype))

        inp = config.depth(Memory.INP)
        return cls(
            arg("table", [rows, COLUMNS], "int64"),
            arg("dram", [size], "uint8"),
            arg("uop", [config.depth(Memory.UOP)], "uint32"),
            arg("wgt", [config.depth(Memory.WGT) * config.block**2], machinery.wgt_dtype),
            arg("inp", [inp * machinery.values], "int8"),
            arg("offset", [inp * config.batch], "int32"),
            arg("acc", [config.depth(Memory.ACC) * machinery.values], "int32"),
            arg("status", [STATUS], "int64"),
        )

    def operand(self, column: int) -> Any:
        """A number of the instruction being executed."""
        return I.Bind(self.table[self.status[1], int64(column)])


def int64(value: Any) -> Any:
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def vector(buffer: Any, first: Any, lanes: int) -> Any:
    """`lanes` consecutive elements."""
    return buffer[I.ramp(first, int64(1), lanes)]


def put(buffer: Any, value: Any, first: Any, lanes: int) -> None:
    I.buffer_store(buffer, value, [I.ramp(first, int64(1), lanes)])


def store(buffer: Any, value: Any, index: Any) -> None:
    I.buffer_store(buffer, value, [index])


def splat(value: Any, lanes: int) -> Any:
    return I.broadcast(value, lanes)
