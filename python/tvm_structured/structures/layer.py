"""A layer: one weight with its geometry, named by its parameter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import ModelError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight, whatever its number of uses. `matrix` is its (out, in) form."""

    name: str
    weight: Array

    @property
    def matrix(self) -> Array:
        """(out, in) view of the weight; convolutions flatten as (out, kh, kw, in), channel fastest."""
        raise NotImplementedError

    @property
    def taps(self) -> int:
        """Number of equal column groups of `matrix` (kh * kw for a convolution, 1 for a dense layer)."""
        return 1

    @property
    def num_params(self) -> int:
        return int(self.weight.size)

    def rows(self, batch: int) -> int:
        """How many vectors the matrix is applied to for a batch of that size."""
        return batch

    def flops(self, batch: int) -> int:
        """Floating-point operations of the dense form (a multiply-add counts as two)."""
        return 2 * self.rows(batch) * self.num_params

    def with_matrix(self, matrix: Array) -> Layer:
        """The same layer holding another (out, in) matrix."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Dense(Layer):
    """y = x W^T with weight (out, in)."""

    @property
    def matrix(self) -> Array:
        return self.weight

    def with_matrix(self, matrix: Array) -> Dense:
        return replace(self, weight=matrix)


@dataclass(frozen=True, eq=False)
class Conv2d(Layer):
    """2-D convolution with weight (out, in / groups, kh, kw), NCHW activations.

    `padding` is (top, left, bottom, right). `input_hw` is the input's (height, width) where known;
    a one-dimensional convolution is one with height 1.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    input_hw: tuple[int, int] | None = None

    @cached_property  # a copy, and searches ask for it again and again
    def matrix(self) -> Array:
        return self.weight.transpose(0, 2, 3, 1).reshape(self.weight.shape[0], -1)

    @property
    def kernel(self) -> tuple[int, int]:
        """(kh, kw)."""
        return int(self.weight.shape[2]), int(self.weight.shape[3])

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def output_hw(self) -> tuple[int, int] | None:
        """Output (height, width), or None where the input's is not known."""
        if self.input_hw is None:
            return None
        (h, w), (kh, kw) = self.input_hw, self.kernel
        top, left, bottom, right = self.padding
        return (
            (h + top + bottom - self.dilation[0] * (kh - 1) - 1) // self.stride[0] + 1,
            (w + left + right - self.dilation[1] * (kw - 1) - 1) // self.stride[1] + 1,
        )

    def rows(self, batch: int) -> int:
        height, width = self.output_hw or (1, 1)
        return batch * height * width

    def with_matrix(self, matrix: Array) -> Conv2d:
        out, channels, kh, kw = self.weight.shape
        return replace(self, weight=matrix.reshape(out, kh, kw, channels).transpose(0, 3, 1, 2))


def as_layer(weight: Any, name: str = "weight") -> Layer:
    """A Layer as it is; a (out, in) array becomes `Dense`, a (out, in, kh, kw) array `Conv2d`.

    Raises ModelError for any other rank, for an empty or non-numeric array and for NaN or Inf.
    """
    if isinstance(weight, Layer):
        check_weight(weight.weight, weight.name)
        return weight
    if hasattr(weight, "detach"):
        weight = weight.detach().cpu().numpy()
    array = np.asarray(weight)
    check_weight(array, name)
    if array.ndim == 2:
        return Dense(name, array)
    if array.ndim == 4:
        return Conv2d(name, array)
    raise ModelError(f"{name}: a weight has 2 (out, in) or 4 (out, in, kh, kw) dimensions, got shape {array.shape}")


def check_weight(weight: Array, name: str) -> None:
    """Raise ModelError unless the weight is a non-empty array of finite floating-point numbers."""
    if weight.dtype.kind != "f":
        raise ModelError(f"{name}: weights must be floating point, got {weight.dtype}; convert them first")
    if weight.size == 0:
        raise ModelError(f"{name}: weight of shape {weight.shape} is empty; remove the layer")
    if not np.isfinite(weight).all():
        bad = int(np.size(weight) - np.isfinite(weight).sum())
        raise ModelError(f"{name}: weight holds {bad} NaN or Inf values; repair the model before compiling it")
