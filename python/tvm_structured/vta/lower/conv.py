"""Convolutions: every tap of the kernel is a product of tiles, at another place of the input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.lower.builder import MOST_PADDING, Builder, Slots, tiles
from tvm_structured.vta.lower.by_product import as_weights, diagonal, fixed_input
from tvm_structured.vta.lower.conv_tiles import ConvTiles
from tvm_structured.vta.lower.epilogue import AccTile, Epilogue
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.problem import Problem, check_values
from tvm_structured.vta.lower.schedule import Schedule
from tvm_structured.vta.lower.uop_kernels import Loop, as_uops
from tvm_structured.vta.operators import Int8Conv2d, Int8Conv2dTranspose

Span = tuple[int, int]  # first, count


@dataclass(frozen=True, eq=False)
class Convolution(Problem):
    """A Int8Conv2d. Groups are a matrix of channel blocks with zeros, which are left out: a depthwise layer takes one
    product a tap and pixel, the ALU would take four cycles (multiply and add, two tensor operands each)."""

    config: VTAConfig
    layer: Int8Conv2d | Int8Conv2dTranspose
    weight: NDArray[np.int8]  # (out, in / groups, kh, kw)
    tiles: ConvTiles
    reason: str = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.layer.name

    def schedules(self, threads: int = 2) -> Iterator[Schedule]:
        return self.tiles.schedules(threads)

    def emit(self, b: Builder, s: Schedule, sources: Sequence[str], target: str) -> None:
        self.check_fits(self.tiles.fits(s), s)
        self.emission(self, b, s, list(sources), target).run()

    @property
    def emission(self) -> type[Emission]:
        return Emission

    def weights_of(self, out: int) -> NDArray[np.int8]:
        """Tiles of one output block, (in blocks, kh, kw, block, block)."""
        block, layer = self.config.block, self.layer
        first, end = out * block, min((out + 1) * block, layer.out_channels)
        out_group, in_group = layer.out_channels // layer.groups, self.weight.shape[1]
        rows = np.zeros((block, self.tiles.inner * block, *layer.kernel), np.int8)
        columns = np.arange(first, end)[:, None] // out_group * in_group + np.arange(in_group)
        rows[np.arange(end - first)[:, None], columns] = self.weight[first:end]
        return rows.reshape(block, self.tiles.inner, block, *layer.kernel).transpose(1, 3, 4, 0, 2)


def conv_problem(layer: Int8Conv2d, inputs: tuple[Layout, ...], config: VTAConfig) -> Problem:
    check_values(config, layer)
    shape = inputs[0]
    height, width = layer.output_shape(*(layout.shape for layout in inputs))[2:]
    size, output, stride = shape.size, (height, width), layer.stride
    if layer.kernel == (1, 1) and stride == (1, 1) and layer.padding == (0, 0, 0, 0):
        # pixels are all alike: one long row
        size = output = (1, height * width)
    geometry = ConvTiles(config, layer, shape.rows, size, output, layer.kernel, stride, layer.padding,
                         block_pairs(layer, layer.weight, config.block))  # fmt: skip
    return Convolution(config, layer, layer.weight, geometry)


def block_pairs(layer: Int8Conv2d | Int8Conv2dTranspose, weight: NDArray[np.int8], block: int) -> NDArray[np.bool_]:
    """Which output blocks use which input blocks; weight (out, in / groups, kh, kw)."""
    out_group, in_group = layer.out_channels // layer.groups, weight.shape[1]
    pairs = np.zeros((-(-layer.out_channels // block), -(-layer.in_channels // block)), np.bool_)
    for o in range(layer.out_channels):
        first = o // out_group * in_group
        pairs[o // block, first // block : (first + in_group - 1) // block + 1] = True
    return pairs


class Emission:
    """The instructions of one convolution under one schedule."""

    def __init__(self, problem: Convolution, b: Builder, s: Schedule, sources: list[str], target: str) -> None:
        self.problem, self.b, self.s, self.sources, self.target = problem, b, s, sources, target
        self.g = g = problem.tiles
        vectors, kept_blocks = g.steps.vectors, g.steps.blocks_kept(b.config, s.out)
        kept = vectors * kept_blocks
        self.accs = Slots(kept, g.acc_size(s), s.threads)
        height, width = g.window(s)
        in_slots, wgt_slots = g.slots(s)
        self.inps = Slots(0, height * width * s.inner, in_slots)
        self.wgts = Slots(0, g.weights(s), wgt_slots)
        self.epilogue = Epilogue(b, problem.layer, g.steps, kept_blocks, Slots(0, kept_blocks, vectors))
        # behind the slots: INP has the residual's tile and the fixed input, WGT its diagonal and the bias
        self.inp_room, self.wgt_room = g.room(s)

    def run(self) -> None:
        g, s, b = self.g, self.s, self.b
        if s.residual_by_product:
            assert g.layer.residual is not None
            diagonal(b, self.wgt_room, g.layer.residual.multiplier)
        if g.adds_by_product:
            fixed_input(b, b.config.depth(Memory.INP) - 1)
            added = g.all_steps.added
            tiles_of_bias = b.constant(
                Memory.WGT, (id(self.problem), "bias"), g.out, lambda: as_weights(added, b.config.block)
            )
            b.load(Memory.WGT, b.config.depth(Memory.WGT) - g.out, "WGT", tiles_of_bias, g.out)
        outs = list(tiles(g.out, s.out))
        pixels = [
            (row, y, x)
            for row in range(g.rows)
            for y in tiles(g.output[0], s.rows)
            for x in tiles(g.output[1], s.columns)
        ]
        pairs = [(o, p) for o in outs for p in pixels] if s.weights_stay else [(o, p) for p in pixels for o in outs]
        for count, (out, (row, y, x)) in enumerate(pairs):
            self._tile(count, out, row, y, x)

    def _tile(self, count: int, out: Span, row: int, y: Span, x: Span) -> None:
        b, s, g = self.b, self.s, self.g
        acc, _ = self.accs.take(count)
        pixels = y[1] * x[1]
        b.zero(acc, out[1] * pixels)
        if g.adds_by_product:
            fixed, bias = b.config.depth(Memory.INP) - 1, b.config.depth(Memory.WGT) - g.out + out[0]
            blocks = np.arange(out[1])
            b.gemm(as_uops(acc + blocks * pixels, fixed, bias + blocks), Loop(), Loop(pixels, 1))
        begin, end = g.spans(s.out)[out[0] // s.out]
        steps = [
            ((begin + first, size), ky, kx)
            for first, size in tiles(end - begin, s.inner)
            for ky in tiles(g.kernel[0], s.kernel[0])
            for kx in tiles(g.kernel[1], s.kernel[1])
        ]
        for number, (inner, ky, kx) in enumerate(steps):
            if s.residual_by_product and number == len(steps) - 1:
                # late enough to delay no input, and early enough to be there in time
                self._load_residual(Memory.INP, self.inp_room, out, row, y, x)
            self._step(acc, out, inner, row, y, x, ky, kx)
        tile = AccTile(acc, out[1], pixels, pixels, 1)
        self.epilogue(tile, out[0], lambda: self._add_residual(tile, out, row, y, x))
        for o in range(out[1]):
            first = self._output_element(row, out[0] + o, y[0], x[0])
            b.store(acc + o * pixels, self.target, first, *self._rows(y[1], x[1]))

    def _rows(self, rows: int, columns: int) -> tuple[int, int, int]:
        """columns, rows, stride of a window of the output; whole rows are one."""
        width = self.g.output[1]
        return (rows * columns, 1, 0) if columns == width else (columns, rows, width)

    def _output_element(self, row: int, channel: int, y: int, x: int) -> int:
        g = self.g
        return ((row * g.out + channel) * g.output[0] + y) * g.output[1] + x

    def _load_residual(self, memory: Memory, start: int, out: Span, row: int, y: Span, x: Span) -> None:
        for o in range(out[1]):
            first = self._output_element(row, out[0] + o, y[0], x[0])
            self.b.load(memory, start + o * y[1] * x[1], self.sources[1], first, *self._rows(y[1], x[1]))

    def _add_residual(self, tile: AccTile, out: Span, row: int, y: Span, x: Span) -> None:
        if self.s.residual_by_product:
            blocks = np.arange(tile.channels) * tile.pixels
            uops = as_uops(tile.first + blocks, self.inp_room + blocks, self.wgt_room)
            self.b.gemm(uops, Loop(), Loop(tile.pixels, 1, 1))
            return
        self.epilogue.add_loaded(
            tile, tile.first + tile.count, lambda spare: self._load_residual(Memory.ACC_8BIT, spare, out, row, y, x)
        )

    def _step(self, acc: int, out: Span, inner: Span, row: int, y: Span, x: Span, ky: Span, kx: Span) -> None:
        """One part of the sums: some input blocks under some taps."""
        g, b = self.g, self.b
        used = g.pairs[out[0] : out[0] + out[1], inner[0] : inner[0] + inner[1]]
        if not used.any():
            return
        down, across = g.stride[0] // g.row_step, g.stride[1]
        height, width = (y[1] - 1) * down + ky[1], (x[1] - 1) * across + kx[1]
        inp, is_present = self.inps.take((row, inner, y, x, ky, kx))
        if not is_present:
            top, left = y[0] * g.stride[0] + ky[0] - g.padding[0], x[0] * across + kx[0] - g.padding[1]
            for i in range(inner[1]):
                self._load_window(inp + i * height * width, row, inner[0] + i, (top, height), (left, width))
        wgt = self._weights(out, inner, ky, kx)
        # input blocks, taps, then output blocks: sums that follow each other are different ones
        blocks, outs = np.nonzero(used.T)
        taps = np.arange(ky[1] * kx[1])
        place = np.arange(len(outs))[:, None] * len(taps) + taps  # as `_weights` puts them
        uops = np.stack(
            [
                np.broadcast_to(acc + outs[:, None] * y[1] * x[1], place.shape),
                inp + blocks[:, None] * height * width + taps // kx[1] * width + taps % kx[1],
                wgt + place,
            ],
            axis=2,
        )
        order = np.lexsort([np.repeat(outs, len(taps)), np.tile(taps, len(outs)), np.repeat(blocks, len(taps))])
        b.gemm(
            uops.reshape(-1, 3)[order],
            Loop(y[1], x[1], down * width),
            Loop(x[1], 1, across),
        )

    def _weights(self, out: Span, inner: Span, ky: Span, kx: Span) -> int:
        key = (out, inner, ky, kx)
        start, is_present = self.wgts.take(key)
        if is_present:
            return start
        g, problem = self.g, self.problem
        i, o = np.nonzero(g.pairs[out[0] : out[0] + out[1], inner[0] : inner[0] + inner[1]].T)
        whole = (id(problem), *key)

        def tiled() -> NDArray[np.int8]:
            down, across = slice(ky[0], ky[0] + ky[1]), slice(kx[0], kx[0] + kx[1])
            columns = {a: problem.weights_of(out[0] + a)[:, down, across] for a in set(o.tolist())}
            return np.stack([columns[a][inner[0] + c] for a, c in zip(o.tolist(), i.tolist(), strict=True)])

        first = self.b.constant(Memory.WGT, whole, len(i) * ky[1] * kx[1], tiled)
        self.b.load(Memory.WGT, start, "WGT", first, len(i) * ky[1] * kx[1])
        return start

    def _load_window(self, sram: int, row: int, channel: int, down: Span, across: Span) -> None:
        """Rows [first, first + count), `row_step` apart, and columns of one input block; outside it is zero."""
        g, b = self.g, self.b
        (height, width), step = g.size, g.row_step
        base = (row * g.inner + channel) * height * width
        (top, rows), (left, columns) = down, across
        inside = [r for r in range(rows) if 0 <= top + r * step < height]
        before, first = max(0, -left), max(0, left)
        count = min(left + columns, width) - first
        after = columns - before - count
        pads = (inside[0], before, rows - 1 - inside[-1], after) if inside and count > 0 else ()
        if pads and max(pads) <= MOST_PADDING:
            start = base + (top + inside[0] * step) * width + first
            b.load(Memory.INP, sram, self.sources[0], start, count, len(inside), step * width, pads)
            return
        self._zero_window(sram, rows, columns, base)
        for r in inside if count > 0 else []:
            start = base + (top + r * step) * width + first
            b.load(Memory.INP, sram + r * columns + before, self.sources[0], start, count)

    def _zero_window(self, sram: int, rows: int, columns: int, base: int) -> None:
        """Padding beyond what one LOAD can add: loads of no rows, only padding."""
        done = 0
        while done < rows:
            top = min(MOST_PADDING, rows - done)
            bottom = min(MOST_PADDING, rows - done - top)
            self.b.load(Memory.INP, sram + done * columns, self.sources[0], base, columns, 0, 0, (top, 0, bottom, 0))
            done += top + bottom
