"""Block-circulant for many rows: transforms of x, one real GEMM for each spectral component, inverse transforms.

A complex product takes three real ones: with P1 = xr wr, P2 = xi wi, P3 = (xr + xi)(wr + wi) it is
(P1 - P2) + i (P3 - P1 - P2). The components are numbered: frequency 0, for even n frequency n / 2, then re, im and
re + im of every other frequency. Lanes are blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.schedules import fft
from tvm_structured.schedules.base import Config, Extent
from tvm_structured.schedules.circulant_blocks import LaneBlocks
from tvm_structured.schedules.cpu import Cpu
from tvm_structured.schedules.emit import Emitter, ceildiv, parallel, row_blocks, scratch, serial
from tvm_structured.schedules.epilogue import RowWriter
from tvm_structured.schedules.gemm import branch, most_rows, multiply_block
from tvm_structured.schedules.space import around, fits_registers
from tvm_structured.structures.block_circulant import BlockCirculant
from tvm_structured.structures.circulant_pattern import Blocks

STRIDE_PADDING = 80  # floats between components: a power-of-two stride would map them all to the same cache sets
LEAST_SUMS = 6  # in registers: with fewer the multiply-adds wait for each other
FAR_BYTES = 4 << 20  # of a weight: more than two threads keep in L2
CHUNK_BYTES = 2 << 20  # of both spectra: what two threads keep in L2
SERIAL_EFFORT = 60_000  # vector operations (about 10 us) below which three parallel regions cost more than they bring


def configs(structure: BlockCirculant, rows: Extent, cpu: Cpu) -> list[Config]:
    """Register blocks mr x nr, the best guess first: few padded lanes, then what was fastest."""
    vectors = -(-structure.c.shape[0] // cpu.lanes)
    # (mr, nr) -> how much slower than the best one for equal work, as measured
    options = (
        {(8, 2): 1.0, (6, 4): 1.04, (8, 3): 1.06, (14, 1): 1.15} if cpu.registers >= 32 else {(4, 2): 1.0, (6, 1): 1.1}
    )
    if isinstance(rows, int) and rows <= 6 and cpu.registers >= 32:
        options[6, 4] = 0.95
    if isinstance(rows, int) and 8 < rows < most_rows(cpu, 1) and is_far(structure):
        options[rows, 1] = 0.92  # a weight that is read from beyond level 2 is read once

    def time(option: tuple[int, int]) -> float:
        return -(-vectors // option[1]) * option[1] * options[option]

    mr, nr = min(options, key=time)
    default = {"mode": "many", "mr": mr, "nr": nr, "prefetch": 64, "chunk": CHUNK_BYTES}
    axes = {
        "mr": sorted({*range(1, 15 if cpu.registers >= 32 else 7), mr}),
        "nr": [count for count in (1, 2, 3, 4) if count <= max(vectors, nr)],
        "prefetch": (0, 16, 32, 128),
        "chunk": (CHUNK_BYTES // 2, 2 * CHUNK_BYTES),
    }
    likely = [{**default, "mr": mr, "nr": nr} for mr, nr in sorted(options, key=time)]
    rest = around(default, axes, fits_registers(cpu))
    return [*likely, *(config for config in rest if config not in likely and config["mr"] * config["nr"] >= LEAST_SUMS)]


def is_far(structure: BlockCirculant) -> bool:
    """Whether the spectrum of the weight does not stay in level 2."""
    p, columns, n = structure.c.shape
    return bool(4 * components(n) * p * columns > FAR_BYTES)


def effort(blocks: Blocks, lanes: int) -> float:
    """Vector operations for one row; a straight-line transform takes 2.5 times as long as its count, for it spills."""
    p, columns, n = blocks.factor_shape
    transform = 2.5 * n * (1.5 * math.log2(n) + 4) if fft.is_straight(n) else n * (n / 2 + 8)
    groups, tall = -(-columns // lanes), -(-p // lanes)
    return (groups + tall) * transform + components(n) * columns * tall


def components(n: int) -> int:
    """How many real GEMMs a block of length n takes."""
    return 3 * ((n - 1) // 2) + (2 if n % 2 == 0 else 1)


def pack(structure: BlockCirculant, cpu: Cpu, config: Config) -> dict[str, np.ndarray]:
    """The weight's components in GEMM panels, (component, panel, taps * q, nr * lanes), 1 / n included."""
    c = np.asarray(structure.c, dtype=np.float64)
    p, columns, n = c.shape
    spectrum = np.fft.rfft(c) / n
    inner = spectrum[..., 1 : (n + 1) // 2]
    edges = spectrum[..., [0]] if n % 2 else spectrum[..., [0, n // 2]]
    triples = np.stack([inner.real, inner.imag, inner.real + inner.imag], axis=-1).reshape(p, columns, -1)
    parts = np.concatenate([edges.real, triples], axis=-1).astype(np.float32)
    width = config["nr"] * cpu.lanes
    panels = -(-p // width)
    padded = np.zeros((panels * width, columns, parts.shape[-1]), np.float32)
    padded[:p] = parts
    weight = padded.reshape(panels, width, columns, -1).transpose(3, 0, 2, 1)
    tables = {} if fft.is_straight(n) else {"tables": fft.direct_tables(n)}
    return {"weight": np.ascontiguousarray(weight), **tables}


def padded_scratch(parts: int, size: int) -> Any:
    """(parts, size) and the padding; CompactBufferAllocation would drop that if nothing used its end."""
    buffer = scratch((parts, size + STRIDE_PADDING))
    I.buffer_store(buffer, I.float32(0), [parts - 1, size + STRIDE_PADDING - 1])
    return buffer


@dataclass
class ManyRows:
    """The three stages over chunks of rows, so that scratch stays small for any number of them."""

    e: Emitter
    blocks: Blocks
    rows: Extent
    config: Config
    x: Any
    writer: RowWriter
    weight: Any  # (component, panel, taps * q, width)
    tables: Any = None  # of the direct transform, where one is used

    def __post_init__(self) -> None:
        lanes, (p, columns, n) = self.e.lanes, self.blocks.factor_shape
        self.n, self.columns = n, columns
        self.in_groups, self.out_groups = -(-columns // lanes), -(-p // lanes)
        self.width = self.config["nr"] * lanes
        self.panels = -(-p // self.width)
        self.x_stride, self.y_stride = self.in_groups * lanes, self.panels * self.width

    def emit(self) -> None:
        """Many rows: each thread takes pieces of its own through all stages. Fewer: all threads share each stage."""
        cores, is_static = self.e.cpu.cores, isinstance(self.rows, int)
        piece = self.piece_rows(self.config["chunk"] // 2, 64 if not is_static else 256)
        enough = self.rows >= cores * (piece if not is_static else 4 * self.config["mr"])
        if is_static and (cores == 1 or self.rows * effort(self.blocks, self.e.lanes) < SERIAL_EFFORT):
            self.pieces(serial, serial, self.balanced(piece, 1))
        else:
            branch(
                enough,
                lambda: self.pieces(parallel, serial, self.balanced(piece, cores)),
                lambda: self.pieces(serial, parallel, self.balanced(self.piece_rows(self.config["chunk"], 256), 1)),
            )

    def piece_rows(self, cache: int, most: int) -> int:
        """Rows whose two spectra fit that many bytes, in whole register blocks."""
        mr = self.config["mr"]
        row_bytes = 4 * components(self.n) * (self.x_stride + self.y_stride)
        return max(4 * mr, min(most, cache // row_bytes) // mr * mr)

    def balanced(self, rows: int, workers: int) -> int:
        """No more rows to a piece than that, and the same work for every worker, where the batch is known."""
        if not isinstance(self.rows, int):
            return rows
        mr = self.config["mr"]
        pieces = ceildiv(ceildiv(self.rows, rows), workers) * workers
        return min(self.rows, ceildiv(ceildiv(self.rows, pieces), mr) * mr)

    def pieces(self, outer: Any, inner: Any, chunk: int) -> None:
        """All rows, `chunk` at a time; `outer` and `inner` say which of the loops runs in parallel."""
        parts, rows = components(self.n), self.rows
        is_single = isinstance(rows, int) and rows <= chunk

        def stages(first: Any, count: Extent) -> None:
            self.forward(inner, first, count)
            with inner(0, parts * self.panels) as unit:
                row_blocks(count, self.config["mr"], lambda row, size: self.multiply(unit, row, size))
            self.inverse(inner, first, count)

        def allocate() -> None:
            self.spectra = padded_scratch(parts, chunk * self.x_stride)
            self.products = padded_scratch(parts, chunk * self.y_stride)

        if outer is serial:  # before the loop: what lies in front of an inner parallel loop is allocated once
            allocate()
        if is_single:
            stages(0, rows)
            return
        with outer(0, ceildiv(rows, chunk)) as piece:
            if outer is parallel:
                allocate()
            is_even = isinstance(rows, int) and rows % chunk == 0
            stages(piece * chunk, chunk if is_even else tirx.min(chunk, rows - piece * chunk))

    # -- forward ---------------------------------------------------------------------------------

    def forward(self, loop: Any, first: Any, count: Extent) -> None:
        with loop(0, count * self.in_groups) as unit:
            row, group = unit // self.in_groups, unit % self.in_groups
            lanes = LaneBlocks(self.e, self.blocks)
            lanes.load(self.x, first + row, group)
            place = row * self.x_stride + group * self.e.lanes
            if self.tables is None:
                self.store_spectrum(fft.real_fft(self.e, [lanes.get(c) for c in range(self.n)]), place)
            else:
                self.transform_directly(lanes, place)

    def store_spectrum(self, spectrum: Sequence[fft.Pair], place: Any) -> None:
        part = 0
        for re, im in sorted(spectrum, key=lambda pair: pair[1] is not None):  # the real ones are numbered first
            values = [re] if im is None else [re, im, re + im]
            for value in values:
                self.e.store(self.spectra, value, part, place)
                part += 1

    def transform_directly(self, lanes: LaneBlocks, place: Any) -> None:
        """re[f] = sum_c (x[c] + x[n - c]) cos, im[f] = -sum_c (x[c] - x[n - c]) sin."""
        e, n, edges = self.e, self.n, len(self.edge_bins())
        halves = fft.Halves(e, n)
        for c in self.edge_bins():
            halves.set(c, e.bind(lanes.get(c)), e.splat(0.0))
        with serial(0, (n - 1) // 2) as c:
            low, high = e.bind(lanes.get(c + 1)), e.bind(lanes.get(n - 1 - c))
            halves.set(c + 1, low + high, low - high)
        re, im = halves.transform(self.tables)
        for part, f in enumerate(self.edge_bins()):
            e.store(self.spectra, e.load(re, f, 0), part, place)
        with serial(0, (n - 1) // 2) as f:
            x, y = e.bind(e.load(re, f + 1, 0)), e.bind(e.load(im, f + 1, 0))
            for i, value in enumerate((x, e.splat(0.0) - y, x - y)):
                e.store(self.spectra, value, edges + 3 * f + i, place)

    def edge_bins(self) -> list[int]:
        """The frequencies (and the places) that are their own mirror image."""
        return [0] if self.n % 2 else [0, self.n // 2]

    # -- product ---------------------------------------------------------------------------------

    def multiply(self, unit: Any, row: Any, rows: int) -> None:
        e, nr = self.e, self.config["nr"]
        part, panel = unit // self.panels, unit % self.panels
        ahead = self.config["prefetch"]

        def fetch(k: Any) -> None:
            for q in range(nr):
                e.prefetch(self.weight, part, panel, k + ahead, q * e.lanes)

        acc = multiply_block(
            e,
            rows,
            nr,
            self.columns,
            lambda i, k: self.spectra[part, (row + i) * self.x_stride + k],
            lambda k, q: e.load(self.weight, part, panel, k, q * e.lanes),
            prefetch=fetch if ahead else None,
        )
        for i in range(rows):
            for q in range(nr):
                place = (row + i) * self.y_stride + panel * self.width + q * e.lanes
                e.store(self.products, acc[i][q][0], part, place)

    # -- inverse ---------------------------------------------------------------------------------

    def inverse(self, loop: Any, first: Any, count: Extent) -> None:
        with loop(0, count * self.out_groups) as unit:
            row, group = unit // self.out_groups, unit % self.out_groups
            lanes = LaneBlocks(self.e, self.blocks)
            place = row * self.y_stride + group * self.e.lanes
            if self.tables is None:
                for c, vector in enumerate(fft.real_ifft(self.e, self.load_spectrum(place), self.n)):
                    lanes.set(c, vector)
            else:
                self.invert_directly(lanes, place)
            lanes.write(self.writer, first + row, group)

    def load_spectrum(self, place: Any) -> list[fft.Pair]:
        edges = [self.e.bind(self.e.load(self.products, part, place)) for part in range(len(self.edge_bins()))]
        inner = [self.complex_product(f, place) for f in range((self.n - 1) // 2)]
        return [(edges[0], None), *inner, *((edge, None) for edge in edges[1:])]

    def complex_product(self, f: Any, place: Any) -> fft.Pair:
        """Frequency f + 1 out of its three real products."""
        e, first = self.e, len(self.edge_bins()) + 3 * f
        p1, p2, p3 = (e.bind(e.load(self.products, first + i, place)) for i in range(3))
        return e.bind(p1 - p2), e.bind(p3 - p1 - p2)

    def invert_directly(self, lanes: LaneBlocks, place: Any) -> None:
        """y[c] = E - O and y[n - c] = E + O with E = sum_f 2 re cos and O = sum_f 2 im sin (real bins once)."""
        e, n = self.e, self.n
        halves = fft.Halves(e, n)
        for part, f in enumerate(self.edge_bins()):
            halves.set(f, e.load(self.products, part, place), e.splat(0.0))
        with serial(0, (n - 1) // 2) as f:
            re, im = self.complex_product(f, place)
            halves.set(f + 1, re + re, im + im)
        even, odd = halves.transform(self.tables)
        for c in self.edge_bins():
            lanes.set(c, e.load(even, c, 0))
        with serial(0, (n - 1) // 2) as c:
            a, b = e.bind(e.load(even, c + 1, 0)), e.bind(e.load(odd, c + 1, 0))
            lanes.set(c + 1, a - b)
            lanes.set(n - 1 - c, a + b)
