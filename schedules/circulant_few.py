"""Block-circulant for a few rows: the spectrum of the weight streams through once, without a barrier.

Threads share the block rows; each transforms all of x for itself, which costs far less than a second parallel
region. Lanes are block rows, spectra of x are broadcast. The numbers of a spectrum are re and im of each
frequency in turn; frequency 0 and, for even n, frequency n / 2 are real and share the first pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules.base import Config, Extent
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, parallel, row_blocks, scratch, serial, when
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import multiply_block
from tvm_structured.schedules.space import around
from tvm_structured.structures.block_circulant import BlockCirculant
from tvm_structured.structures.circulant_pattern import Blocks

SERIAL_EFFORT = 30_000  # vector operations (about 5 us) below which waking the other threads costs more than it brings
MOST_ROWS = 4  # their sums still fit the registers
TABLE_BLOCKS = 4  # blocks that are transformed at once


def configs(structure: BlockCirculant, rows: Extent, cpu: Cpu) -> list[Config]:
    """`ni` vectors of block rows at once: wide streams, unless padding or idle threads cost more.

    To tune: the threads, how many block columns ahead the weight is prefetched, and how many are unrolled. Nothing
    for more than MOST_ROWS rows.
    """
    if not isinstance(rows, int) or rows > MOST_ROWS:
        return []
    vectors = -(-structure.c.shape[0] // cpu.lanes)
    largest = max(1, cpu.registers // (8 * rows))

    def time(ni: int) -> float:
        groups = -(-vectors // ni)
        return -(-groups // cpu.cores) * ni + 0.1 / ni

    ranked = sorted((n for n in (4, 2, 1) if n <= largest), key=time)
    is_small = rows * effort(structure.blocks, cpu.lanes) < SERIAL_EFFORT
    default = {"mode": "few", "ni": ranked[0], "threads": 1 if is_small else cpu.cores, "ahead": 0, "unroll": 1}
    axes = {
        "ni": [*ranked, *(n for n in (3, 6) if n <= min(vectors, largest))],
        "ahead": (4, 16, 64),
        "unroll": [n for n in (2, 4) if n <= structure.c.shape[1]],
        "threads": (1, cpu.cores),
    }
    return list(around(default, axes))


def effort(blocks: Blocks, lanes: int) -> float:
    """Vector operations for one row."""
    p, columns, n = blocks.factor_shape
    half, tall, wide = half_length(n), -(-p // lanes), -(-n // lanes)
    return columns * n * wide + 4 * half * columns * tall + 2 * half * p * wide


def half_length(n: int) -> int:
    """Complex numbers in the packed spectrum of n reals."""
    return (n + 1) // 2


def forward_table(n: int) -> np.ndarray:
    """(n, 2 * half): x @ table is the packed spectrum."""
    spectrum = np.fft.rfft(np.eye(n))
    packed = np.stack([spectrum.real, spectrum.imag], axis=-1)[:, : half_length(n)]
    if n % 2 == 0:
        packed[:, 0, 1] = spectrum[:, n // 2].real
    return packed.reshape(n, -1)


def inverse_table(n: int) -> np.ndarray:
    """(2 * half, n): packed spectrum @ table is x."""
    half = half_length(n)
    units = np.eye(2 * half).reshape(2 * half, half, 2)
    spectrum = np.zeros((2 * half, n // 2 + 1), complex)
    spectrum[:, :half] = units[..., 0] + 1j * units[..., 1]
    spectrum[:, 0] = units[:, 0, 0]
    if n % 2 == 0:
        spectrum[:, n // 2] = units[:, 0, 1]
    return np.fft.irfft(spectrum, n=n)


def widened(table: np.ndarray, multiple: int) -> np.ndarray:
    """Columns padded with zeros."""
    extra = -table.shape[1] % multiple
    return np.ascontiguousarray(np.pad(table, ((0, 0), (0, extra))).astype(np.float32))


def table_vectors(length: int, cpu: Cpu) -> int:
    """Vectors of a table that are computed at once: TABLE_BLOCKS times as many accumulators."""
    return min(-(-length // cpu.lanes), 4 if cpu.registers >= 32 else 2)


def pack(structure: BlockCirculant, cpu: Cpu, config: Config) -> dict[str, np.ndarray]:
    """The weight's packed spectrum, (group, frequency, taps * q, re / im, ni * lanes), and the two tables."""
    c = np.asarray(structure.c, dtype=np.float64)
    p, columns, n = c.shape
    half, width = half_length(n), config["ni"] * cpu.lanes
    groups = -(-p // width)
    spectrum = np.zeros((groups * width, columns, 2 * half), np.float32)
    spectrum[:p] = c @ forward_table(n)
    weight = spectrum.reshape(groups, width, columns, half, 2).transpose(0, 3, 2, 4, 1)
    return {
        "weight": np.ascontiguousarray(weight),
        "forward": widened(forward_table(n), table_vectors(2 * half, cpu) * cpu.lanes),
        "inverse": widened(inverse_table(n), table_vectors(n, cpu) * cpu.lanes),
    }


@dataclass
class FewRows:
    """One region; every worker walks through its groups of block rows."""

    e: Emitter
    blocks: Blocks
    rows: int
    config: Config
    x: Any
    writer: RowWriter
    weight: Any
    forward: Any  # (n, padded spectrum)
    inverse: Any  # (spectrum, padded n)

    def __post_init__(self) -> None:
        p, self.columns, self.n = self.blocks.factor_shape
        self.half = half_length(self.n)
        self.width = self.config["ni"] * self.e.lanes
        self.groups = -(-p // self.width)
        self.workers = min(self.groups, self.config["threads"])

    def emit(self) -> None:
        loop = parallel if self.workers > 1 else serial
        turns = -(-self.groups // self.workers)
        with loop(0, self.workers) as worker:
            self.spectra = scratch((self.rows, self.columns, int(self.forward.shape[1])))
            self.products = scratch((self.rows, 2 * self.half, self.width))
            self.transform()
            with serial(0, turns) as turn:
                group = worker * turns + turn
                if turns * self.workers == self.groups:
                    self.group(group)
                else:
                    with when(group < self.groups):
                        self.group(group)

    def transform(self) -> None:
        """spectra[row, j] = x_j @ forward, TABLE_BLOCKS blocks at once."""
        source = self.padded() if self.blocks.columns * self.n != self.blocks.width else self.x
        nr = table_vectors(2 * self.half, self.e.cpu)
        panel = nr * self.e.lanes

        def blocks(row: Any, vector: Any, j: Any, count: int) -> None:
            acc = multiply_block(
                self.e,
                count,
                nr,
                self.n,
                lambda i, c: source[row, (j + i) * self.n + c],
                lambda c, q: self.e.load(self.forward, c, vector * panel + q * self.e.lanes),
            )
            for i in range(count):
                for q in range(nr):
                    self.e.store(self.spectra, acc[i][q][0], row, j + i, vector * panel + q * self.e.lanes)

        with serial(0, self.rows) as row, serial(0, int(self.forward.shape[1]) // panel) as vector:
            row_blocks(self.columns, TABLE_BLOCKS, lambda j, count: blocks(row, vector, j, count))

    def padded(self) -> Any:
        """A copy of x in which every tap is filled up with zeros."""
        e, width, size = self.e, self.blocks.width, self.blocks.columns * self.n
        copy = scratch((self.rows, self.columns * self.n))
        with serial(0, self.rows) as row, serial(0, self.blocks.taps) as tap:
            if width >= e.lanes:
                with serial(0, width // e.lanes) as i:
                    e.store(copy, e.load(self.x, row, tap * width + i * e.lanes), row, tap * size + i * e.lanes)
            for i in range(width // e.lanes * e.lanes, width):
                I.buffer_store(copy, self.x[row, tap * width + i], [row, tap * size + i])
            for i in range(width, size):
                I.buffer_store(copy, I.float32(0), [row, tap * size + i])
        return copy

    def group(self, group: Any) -> None:
        self.frequency(group, 0, True)
        if self.half > 1:
            with serial(0, self.half - 1) as f:
                self.frequency(group, f + 1, False)
        row_blocks(self.width, TABLE_BLOCKS, lambda i, count: self.invert(group, i, count))

    def frequency(self, group: Any, f: Any, is_edge: bool) -> None:
        """products[row, f] = sum_j weight[f, j] * spectra[row, j, f]; the edge is two reals, not a complex number."""
        e, ni = self.e, self.config["ni"]
        kinds = ("rr", "ii") if is_edge else ("rr", "ii", "ri", "ir")
        # one accumulator for each of the four products: sums of two would wait for each other
        acc = [{kind: e.registers(ni) for kind in kinds} for _ in range(self.rows)]
        for sums in acc:
            for registers in sums.values():
                e.zero(registers)

        def step(j: Any) -> None:
            w = {
                part: [e.bind(e.load(self.weight, group, f, j, index, q * e.lanes)) for q in range(ni)]
                for index, part in enumerate("ri")
            }
            if self.config["ahead"]:
                for index in range(2):
                    for q in range(ni):
                        e.prefetch(self.weight, group, f, j + self.config["ahead"], index, q * e.lanes)
            for row, sums in enumerate(acc):
                x = {part: e.bind(e.splat(self.spectra[row, j, 2 * f + i])) for i, part in enumerate("ri")}
                for kind, registers in sums.items():
                    for q, register in enumerate(registers):
                        e.set(register, register[0] + w[kind[0]][q] * x[kind[1]])

        row_blocks(self.columns, self.config["unroll"], lambda j, count: [step(j + i) for i in range(count)])
        for row, sums in enumerate(acc):
            for q in range(ni):
                rr, ii = sums["rr"][q][0], sums["ii"][q][0]
                re, im = (rr, ii) if is_edge else (rr - ii, sums["ri"][q][0] + sums["ir"][q][0])
                e.store(self.products, re, row, 2 * f, q * e.lanes)
                e.store(self.products, im, row, 2 * f + 1, q * e.lanes)

    def invert(self, group: Any, first: Any, count: int) -> None:
        """y_i = products @ inverse for a few block rows."""
        e, n, out = self.e, self.n, self.blocks.shape[0]
        nr = table_vectors(n, e.cpu)
        panel = nr * e.lanes
        is_exact = n % panel == 0 and self.groups * self.width * n == out

        def vectors(row: Any, vector: Any) -> None:
            acc = multiply_block(
                e,
                count,
                nr,
                2 * self.half,
                lambda i, t: self.products[row, t, first + i],
                lambda t, q: e.load(self.inverse, t, vector * panel + q * e.lanes),
            )
            for i in range(count):
                start = (group * self.width + first + i) * n
                for q in range(nr):
                    feature = vector * panel + q * e.lanes
                    limit = None if is_exact else tirx.min(start + n, out)
                    self.writer.store(acc[i][q][0], row, start + feature, limit=limit)

        with serial(0, self.rows) as row, serial(0, int(self.inverse.shape[1]) // panel) as vector:
            vectors(row, vector)
