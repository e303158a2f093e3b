"""Pooling over windows, (n, c, h, w) -> (n, c, oh, ow)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tvm_structured.errors import VTAError
from tvm_structured.vta.operators.base import Int8, Operator, Shape, check_numbers
from tvm_structured.vta.operators.requantize import LARGEST_IMMEDIATE, Scale, check_clip, clipped, multiplied
from tvm_structured.vta.operators.windows import Padding, Pair, padded, taps, window, window_extents


@dataclass(frozen=True, eq=False)
class _Pool(Operator):
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    low: int = -128
    high: int = 127
    name: str = "pool"

    def __post_init__(self) -> None:
        check_numbers(self.name, "kernel", self.kernel, 2, 1)
        check_numbers(self.name, "stride", self.stride, 2, 1)
        check_numbers(self.name, "padding", self.padding, 4, 0)
        check_clip(self.low, self.high)

    def output_shape(self, *shapes: Shape) -> Shape:
        self.check_inputs(shapes, 4)
        n, channels, height, width = shapes[0]
        return n, channels, *window_extents(self.name, (height, width), self.kernel, self.stride, self.padding)


@dataclass(frozen=True, eq=False)
class Int8MaxPool(_Pool):
    """clip(max over the window); padding counts as -128, so that it never wins."""

    def compute(self, *inputs: Int8) -> Int8:
        output = self.output_shape(inputs[0].shape)
        wide, result = padded(inputs[0], self.padding, -128), np.full(output, -128, np.int8)
        for tap in taps(self.kernel):
            result = np.maximum(result, window(wide, tap, self.stride, (output[2], output[3])))
        return np.clip(result, self.low, self.high)


@dataclass(frozen=True, eq=False)
class Int8AvgPool(_Pool):
    """clip(scale(sum over the window)); padding counts as zeros. `scale` stands for the division, see `mean`."""

    scale: Scale = field(default_factory=Scale)

    def __post_init__(self) -> None:
        super().__post_init__()
        multiplied(self.name, 128 * self.kernel[0] * self.kernel[1], self.scale.multiplier, self.scale.shift)

    @classmethod
    def mean(
        cls,
        kernel: Pair,
        stride: Pair = (1, 1),
        padding: Padding = (0, 0, 0, 0),
        low: int = -128,
        high: int = 127,
        name: str = "pool",
        factor: float = 1.0,
    ) -> Int8AvgPool:
        """The average times `factor`, with the closest multiplier and shift that keep within 32 bits."""
        count = kernel[0] * kernel[1]
        ratio = factor / count
        if not 0 < ratio:
            raise VTAError(f"{name}: factor={factor!r}: expected a positive number")
        limit = min(LARGEST_IMMEDIATE, ((1 << 31) - (1 << 14) - 1) // (128 * count))
        shift = max((s for s in range(32) if round(ratio * 2**s) <= limit), default=0)
        return cls(kernel, stride, padding, low, high, name, Scale(round(ratio * 2**shift), shift))

    def compute(self, *inputs: Int8) -> Int8:
        output = self.output_shape(inputs[0].shape)
        wide, total = padded(inputs[0], self.padding).astype(np.int64), np.zeros(output, np.int64)
        for tap in taps(self.kernel):
            total += window(wide, tap, self.stride, (output[2], output[3]))
        return clipped(self.scale.reference(total), self.low, self.high)
