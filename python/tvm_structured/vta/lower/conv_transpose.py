"""Transposed convolutions: every tap scatters a product of tiles, at pixels `stride` apart; no zero is inserted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.lower.conv import Convolution, Emission, Span, block_pairs
from tvm_structured.vta.lower.conv_tiles import ConvTiles
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.problem import Problem, check_values
from tvm_structured.vta.lower.schedule import Schedule
from tvm_structured.vta.lower.uop_kernels import Loop, as_uops
from tvm_structured.vta.operators import Int8Conv2dTranspose
from tvm_structured.vta.operators.windows import Pair


class ScatterTiles(ConvTiles):
    """The same tiles, over another part of the input."""

    def window(self, s: Schedule) -> Pair:
        rows = (s.rows + s.kernel[0] - 2) // self.stride[0] + 1
        columns = (s.columns + s.kernel[1] - 2) // self.stride[1] + 1
        return min(rows, self.size[0]), min(columns, self.size[1])


@dataclass(frozen=True, eq=False)
class TransposedConvolution(Convolution):
    @property
    def emission(self) -> type[Emission]:
        return ScatterEmission


class ScatterEmission(Emission):
    def _step(self, acc: int, out: Span, inner: Span, row: int, y: Span, x: Span, ky: Span, kx: Span) -> None:
        g, b = self.g, self.b
        used = g.pairs[out[0] : out[0] + out[1], inner[0] : inner[0] + inner[1]]
        rows, columns = self._inside(0, y, ky), self._inside(1, x, kx)
        if not used.any() or not rows[1] or not columns[1]:
            return
        area = rows[1] * columns[1]
        inp, is_present = self.inps.take((row, inner, y, x, ky, kx))
        if not is_present:
            for i in range(inner[1]):
                first = ((row * g.inner + inner[0] + i) * g.size[0] + rows[0]) * g.size[1] + columns[0]
                whole = columns[1] == g.size[1]
                shape = (area, 1, 0) if whole else (columns[1], rows[1], g.size[1])
                b.load(Memory.INP, inp + i * area, self.sources[0], first, *shape)
        wgt = self._weights(out, inner, ky, kx)
        blocks, outs = np.nonzero(used.T)
        for i in range(ky[1]):
            top, down = self._inside(0, y, (ky[0] + i, 1))
            for j in range(kx[1]):
                left, across = self._inside(1, x, (kx[0] + j, 1))
                if not down or not across:
                    continue
                pixel = (self._pixel(0, top, ky[0] + i) - y[0]) * x[1] + self._pixel(1, left, kx[0] + j) - x[0]
                place = (top - rows[0]) * columns[1] + left - columns[0]
                uops = as_uops(
                    acc + outs * y[1] * x[1] + pixel,
                    inp + blocks * area + place,
                    wgt + np.arange(len(outs)) * ky[1] * kx[1] + i * kx[1] + j,
                )
                b.gemm(uops, Loop(down, g.stride[0] * x[1], columns[1]), Loop(across, g.stride[1], 1))

    def _pixel(self, axis: int, place: int, tap: int) -> int:
        """Row or column of the output to which an input scatters through a tap."""
        return place * self.g.stride[axis] + tap - self.g.padding[axis]

    def _inside(self, axis: int, tile: Span, taps: Span) -> Span:
        """Rows or columns of the input that reach a tile of the output through some taps."""
        stride, offset = self.g.stride[axis], self.g.padding[axis]
        first = max(-(-(tile[0] + offset - taps[0] - taps[1] + 1) // stride), 0)
        last = min((tile[0] + tile[1] - 1 + offset - taps[0]) // stride, self.g.size[axis] - 1)
        return first, max(last - first + 1, 0)


def conv_transpose_problem(layer: Int8Conv2dTranspose, inputs: tuple[Layout, ...], config: VTAConfig) -> Problem:
    check_values(config, layer)
    shape, groups = inputs[0], layer.groups
    height, width = layer.extents(shape.size)
    grouped = layer.weight.reshape(groups, -1, *layer.weight.shape[1:]).transpose(0, 2, 1, 3, 4)
    weight = grouped.reshape(layer.out_channels, -1, *layer.kernel)
    pairs = block_pairs(layer, weight, config.block)
    tiles = ScatterTiles(
        config, layer, shape.rows, shape.size, (height, width), layer.kernel, layer.stride, layer.padding, pairs
    )
    return TransposedConvolution(config, layer, weight, tiles)
