"""Convolutions and transposed convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_structured.errors import VTAError
from tvm_structured.vta.operators.base import Int8, Shape, Weighted, absolute_sums, check_array, check_numbers
from tvm_structured.vta.operators.requantize import Integers
from tvm_structured.vta.operators.windows import Padding, Pair, padded, taps, window, window_extents


@dataclass(frozen=True, eq=False)
class Int8Conv2d(Weighted):
    """(n, in, h, w) -> (n, out, oh, ow), weight (out, in / groups, kh, kw), zero padding (top, left, bottom, right)."""

    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    groups: int = 1

    def check_weight(self) -> None:
        check_array(self.name, "weight", self.weight, np.int8, (None,) * 4)
        check_numbers(self.name, "stride", self.stride, 2, 1)
        check_numbers(self.name, "padding", self.padding, 4, 0)
        if self.groups < 1 or self.weight.shape[0] % self.groups:
            raise VTAError(f"{self.name}: {self.weight.shape[0]} output channels in {self.groups} groups")

    @property
    def kernel(self) -> Pair:
        return int(self.weight.shape[2]), int(self.weight.shape[3])

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[1]) * self.groups

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[0])

    def weight_sums(self) -> Integers:
        return absolute_sums(self.weight, (1, 2, 3))

    def output_shape(self, *shapes: Shape) -> Shape:
        self.check_inputs(shapes, 4, self.in_channels)
        n, _, height, width = shapes[0]
        extents = window_extents(self.name, (height, width), self.kernel, self.stride, self.padding)
        output = (n, self.out_channels, *extents)
        self.check_residual(shapes, output)
        return output

    def products(self, x: Int8) -> Integers:
        height, width = window_extents(self.name, x.shape[2:], self.kernel, self.stride, self.padding)
        wide = padded(x, self.padding).astype(np.float64)
        n, groups = len(x), self.groups
        weight = self.weight.astype(np.float64).reshape(groups, -1, *self.weight.shape[1:])
        total = np.zeros((n, groups, weight.shape[1], height * width))
        for i, j in taps(self.kernel):
            part = window(wide, (i, j), self.stride, (height, width)).reshape(n, groups, -1, height * width)
            total += np.matmul(weight[..., i, j], part)
        return total.reshape(n, -1, height, width).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Int8Conv2dTranspose(Weighted):
    """(n, in, h, w) -> (n, out, oh, ow), weight (in, out / groups, kh, kw): every input scatters a kernel, stride
    apart; `padding` is cut off the result and `output_padding` appended at the bottom and the right.
    oh = (h - 1) * stride - top - bottom + kh + output_padding."""

    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    output_padding: Pair = (0, 0)
    groups: int = 1

    def check_weight(self) -> None:
        check_array(self.name, "weight", self.weight, np.int8, (None,) * 4)
        check_numbers(self.name, "stride", self.stride, 2, 1)
        check_numbers(self.name, "padding", self.padding, 4, 0)
        check_numbers(self.name, "output_padding", self.output_padding, 2, 0)
        if self.groups < 1 or self.weight.shape[0] % self.groups:
            raise VTAError(f"{self.name}: {self.weight.shape[0]} input channels in {self.groups} groups")

    @property
    def kernel(self) -> Pair:
        return int(self.weight.shape[2]), int(self.weight.shape[3])

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[0])

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[1]) * self.groups

    def weight_sums(self) -> Integers:
        return absolute_sums(self.weight.reshape(self.groups, -1, *self.weight.shape[1:]), (1, 3, 4)).reshape(-1)

    def extents(self, size: Pair) -> Pair:
        """Output height and width. Raises VTAError where the padding leaves nothing."""
        extents = [
            (size[i] - 1) * self.stride[i]
            + self.kernel[i]
            + self.output_padding[i]
            - self.padding[i]
            - self.padding[i + 2]
            for i in range(2)
        ]
        if min(extents) < 1:
            raise VTAError(f"{self.name}: padding {self.padding} leaves nothing of the output")
        return extents[0], extents[1]

    def output_shape(self, *shapes: Shape) -> Shape:
        self.check_inputs(shapes, 4, self.in_channels)
        output = (shapes[0][0], self.out_channels, *self.extents((shapes[0][2], shapes[0][3])))
        self.check_residual(shapes, output)
        return output

    def products(self, x: Int8) -> Integers:
        n, _, height, width = x.shape
        top, left, _, _ = self.padding
        rows, columns = self.extents((height, width))
        # as large as what is scattered and as what is cut out of it
        spread = [
            max((size - 1) * s + k, cut)
            for size, s, k, cut in zip(
                (height, width), self.stride, self.kernel, (top + rows, left + columns), strict=True
            )
        ]
        whole = np.zeros((n, self.out_channels, *spread))
        weight = self.weight.astype(np.float64).reshape(self.groups, -1, *self.weight.shape[1:])
        part = x.astype(np.float64).reshape(n, self.groups, -1, height * width)
        for i, j in taps(self.kernel):
            values = np.matmul(weight[..., i, j].transpose(0, 2, 1), part).reshape(n, -1, height, width)
            window(whole, (i, j), self.stride, (height, width))[...] += values
        return whole[:, :, top : top + rows, left : left + columns].astype(np.int64)
