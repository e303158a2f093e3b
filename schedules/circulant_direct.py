"""Block-circulant without transforms: a dense product whose weight is read out of c.

The lanes a .. a + lanes of column b of a circulant block are c[(a - b) mod n]: consecutive numbers of c written
twice in a row. As many operations as the dense layer, hardly any memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from tvm_structured.schedules.base import Config, Extent
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, ceildiv, parallel, row_blocks, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import multiply_block
from tvm_structured.schedules.space import around, block_rows, fits_registers
from tvm_structured.structures.block_circulant import BlockCirculant
from tvm_structured.structures.circulant_pattern import Blocks

ROWS_PER_UNIT = 128  # rows of x that a thread keeps in L2 while it walks through a block row
SERIAL_EFFORT = 30_000  # vector operations (about 5 us) below which waking the other threads costs more than it brings


def effort(blocks: Blocks, lanes: int) -> float:
    """Vector operations for one row."""
    p, columns, n = blocks.factor_shape
    return p * columns * n * -(-n // lanes)


def configs(structure: BlockCirculant, rows: Extent, cpu: Cpu) -> list[Config]:
    """Register blocks: many vectors for a single row, else mr x nr."""
    vectors = -(-structure.block // cpu.lanes)
    if isinstance(rows, int) and rows < 4:
        mr, nr = rows, min(vectors, (8 if cpu.registers >= 32 else 4) // max(1, rows))
    else:
        mr, nr = 8 if cpu.registers >= 32 else 4, min(vectors, 2)
    is_small = isinstance(rows, int) and rows * effort(structure.blocks, cpu.lanes) < SERIAL_EFFORT
    default = {"mode": "direct", "mr": mr, "nr": nr, "threads": 1 if is_small else cpu.cores, "chunk": ROWS_PER_UNIT}
    axes = {
        "mr": block_rows(rows, 12 if cpu.registers >= 32 else 6),
        "nr": [nr for nr in (1, 2, 3, 4, 6, 8) if nr <= vectors],
        "threads": (1, cpu.cores),
        "chunk": (32, 128, 512) if not isinstance(rows, int) or rows > 32 else (ROWS_PER_UNIT,),
    }
    return list(around(default, axes, fits_registers(cpu)))


def pack(structure: BlockCirculant, cpu: Cpu, config: Config) -> dict[str, np.ndarray]:
    """c twice and a little more, (p, taps * q, n + n rounded up to whole panels)."""
    n, panel = structure.block, config["nr"] * cpu.lanes
    length = n + -(-n // panel) * panel
    return {"weight": np.ascontiguousarray(np.asarray(structure.c)[..., np.arange(length) % n].astype(np.float32))}


@dataclass
class Direct:
    """Units of work: a panel of outputs of one block row, for a chunk of rows of x."""

    e: Emitter
    blocks: Blocks
    rows: Extent
    config: Config
    x: Any
    writer: RowWriter
    weight: Any

    def emit(self) -> None:
        p, _, n = self.blocks.factor_shape
        self.panel = self.config["nr"] * self.e.lanes
        panels = -(-n // self.panel)
        most = self.config["chunk"]
        chunks = ceildiv(self.rows, most)
        with (parallel if self.config["threads"] > 1 else serial)(0, chunks * (p * panels)) as unit:
            first = unit // (p * panels) * most
            place = unit % (p * panels)
            count = self.rows if isinstance(chunks, int) and chunks == 1 else tirx.min(most, self.rows - first)
            row_blocks(
                count, self.config["mr"], lambda row, r: self.block(place // panels, place % panels, row, r), first
            )

    def block(self, i: Any, panel: Any, row: Any, rows: int) -> None:
        e, n, out, width = self.e, self.blocks.length, self.blocks.shape[0], self.blocks.width
        acc = [e.registers(self.config["nr"]) for _ in range(rows)]
        for registers in acc:
            e.zero(registers)
        with serial(0, self.blocks.taps) as tap:
            if width >= n:
                with serial(0, width // n) as j:
                    self.accumulate(acc, i, panel, row, tap, j, n)
            if width % n:
                self.accumulate(acc, i, panel, row, tap, width // n, width % n)
        is_exact = n % self.panel == 0 and out % n == 0
        for r, registers in enumerate(acc):
            for q, register in enumerate(registers):
                feature = i * n + panel * self.panel + q * e.lanes
                limit = None if is_exact else tirx.min(i * n + n, out)
                self.writer.store(register[0], row + r, feature, limit=limit)

    def accumulate(self, acc: Any, i: Any, panel: Any, row: Any, tap: Any, j: Any, depth: int) -> None:
        """acc += the first `depth` columns of block (i, tap, j) times x."""
        e, n = self.e, self.blocks.length
        first = tap * self.blocks.width + j * n
        column = tap * self.blocks.columns + j
        sums = multiply_block(
            e,
            len(acc),
            len(acc[0]),
            depth,
            lambda r, b: self.x[row + r, first + b],
            lambda b, q: e.load(self.weight, i, column, n + panel * self.panel + q * e.lanes - b),
            start=lambda r, q: acc[r][q][0],
        )
        for r, registers in enumerate(acc):
            for q, register in enumerate(registers):
                e.set(register, sums[r][q][0])
