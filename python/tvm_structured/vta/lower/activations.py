"""Activations into ACC: sign-extended by the LOAD where inputs have 8 bits, else through INP and an identity."""

from __future__ import annotations

import numpy as np

from tvm_structured.vta.config import Memory
from tvm_structured.vta.lower.builder import Builder, Slots, tiles
from tvm_structured.vta.lower.uop_kernels import Loop, as_uops


class Activations:
    """For operators that use neither INP nor WGT otherwise."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.room = max(b.config.depth(Memory.INP) // 2, 1)
        self.slots = Slots(0, self.room, 2)
        self.loads = 0

    def load(self, acc: int, region: str, first: int, columns: int, rows: int = 1, stride: int = 0) -> None:
        """ACC[acc ...] = `rows` rows of `columns` elements, `stride` apart, from element `first` of a region."""
        if self.b.config.has_acc_8bit:
            self.b.load(Memory.ACC_8BIT, acc, region, first, columns, rows, stride)
            return
        self.b.zero(acc, rows * columns)
        for x, width in tiles(columns, self.room):
            for y, height in tiles(rows, max(self.room // width, 1)):
                self._part(acc + y * columns + x, region, first + y * (stride or columns) + x, width, height,
                           stride or columns, columns)  # fmt: skip

    def _part(self, acc: int, region: str, first: int, width: int, height: int, stride: int, pitch: int) -> None:
        b = self.b
        if not self.loads:
            identity = b.constant(Memory.WGT, "identity", 1, lambda: np.eye(b.config.block, dtype=np.int8))
            b.load(Memory.WGT, 0, "WGT", identity, 1)
        self.loads += 1
        inp, _ = self.slots.take(self.loads)
        b.load(Memory.INP, inp, region, first, width, height, stride)
        b.gemm(as_uops(acc, inp, 0), Loop(height, pitch, width), Loop(width, 1, 1))
