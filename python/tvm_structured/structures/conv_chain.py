"""Convolutions that are a chain of thinner ones: what the low-rank, Tucker and CP forms of a kernel have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm_structured.errors import ModelError
from tvm_structured.structures.arrays import contract
from tvm_structured.structures.base import Structure
from tvm_structured.structures.layer import Conv2d, Layer


@dataclass(frozen=True)
class Step:
    """One convolution of a chain.

    matrix: (groups * outs, kh * kw * channels of a group), channel fastest. `moves`: whether it takes over the stride,
    padding and dilation of the layer, vertically and horizontally; over a chain each is taken once.
    """

    matrix: Any
    kernel: tuple[int, int] = (1, 1)
    moves: tuple[bool, bool] = (False, False)
    groups: int = 1


@dataclass(frozen=True, eq=False)
class ConvChain(Structure):
    """A convolution as `steps`, run one after the other. `kernel` is the layer's (kh, kw)."""

    accepts: ClassVar[tuple[type[Layer], ...]] = (Conv2d,)

    kernel: tuple[int, int]

    @abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """The chain, first step first."""

    @abstractmethod
    def dense(self) -> Any:
        """(out, kh * kw * in), channel fastest; differentiable where the factors are torch tensors."""

    def apply(self, x: Any) -> Any:
        """x (batch, in, h, w) -> (batch, out, h - kh + 1, w - kw + 1): the convolution without padding, step by step.

        numpy or torch, whichever x and the factors are; gradients flow.
        """
        channels = self.shape[1] // math.prod(self.kernel)
        if len(x.shape) != 4 or x.shape[1] != channels:
            raise ModelError(f"{self.name} takes images of {channels} channels, got an input of shape {tuple(x.shape)}")
        for step in self.steps():
            x = convolve(x, step)
        return x

    def flops(self, rows: int) -> int:
        """Operations for `rows` output positions. Steps before a stride meet more positions than are counted here."""
        return 2 * rows * sum(int(math.prod(step.matrix.shape)) for step in self.steps())


def convolve(x: Any, step: Step) -> Any:
    """The step without padding and stride, tap by tap."""
    (kh, kw), groups = step.kernel, step.groups
    height, width = x.shape[2] - kh + 1, x.shape[3] - kw + 1
    outs = step.matrix.shape[0] // groups
    weight = step.matrix.reshape(groups, outs, kh, kw, -1)
    split = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    y: Any = 0
    for tap in range(kh * kw):
        i, j = divmod(tap, kw)
        part = split[..., i : i + height, j : j + width]
        y = y + contract("goc,bgchw->bgohw", weight[:, :, i, j], part)
    return y.reshape(x.shape[0], groups * outs, height, width)


def as_kernel(layer: Layer) -> tuple[int, int]:
    assert isinstance(layer, Conv2d)
    return layer.kernel
