"""A layer: one weight with its geometry, named by its parameter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_structured.errors import ModelError

Array = NDArray[Any]
EXACT = 1e-5  # relative Frobenius error up to which a weight counts as a member
HALF = {"float16": (11, -14), "bfloat16": (8, -126)}  # bits of the significand, least exponent of a normal number


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight, whatever its number of uses. `matrix` is its (out, in) form.

    `stored` is the type in which the model holds the weight, where `weight` is in a wider one.
    """

    name: str
    weight: Array
    stored: str = field(default="", kw_only=True)

    @cached_property
    def tolerance(self) -> float:
        """Relative Frobenius error up to which the weight counts as a member of a structure: 1e-5, or what rounding
        every entry of a weight in half precision can make of a member, where that is more."""
        half = HALF.get(self.stored or self.weight.dtype.name)
        return EXACT if half is None else max(EXACT, largest_rounding(self.weight, *half))

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
    """A Layer as it is; a (out, in) array becomes `Dense`, a (out, in, kh, kw) array `Conv2d`; bfloat16 is widened.

    Raises ModelError for any other rank, for an empty or non-numeric array and for NaN or Inf.
    """
    if isinstance(weight, Layer):
        check_weight(weight.weight, weight.name)
        return weight
    stored = ""
    if hasattr(weight, "detach"):
        weight = weight.detach().cpu()
        if str(weight.dtype) == "torch.bfloat16":
            weight, stored = weight.float(), "bfloat16"
        weight = weight.numpy()
    array = np.asarray(weight)
    if array.dtype.name == "bfloat16":  # as the package ml_dtypes adds it to numpy
        array, stored = array.astype(np.float32), "bfloat16"
    check_weight(array, name)
    if array.ndim == 2:
        return Dense(name, array, stored=stored)
    if array.ndim == 4:
        return Conv2d(name, array, stored=stored)
    raise ModelError(f"{name}: a weight has 2 (out, in) or 4 (out, in, kh, kw) dimensions, got shape {array.shape}")


def to_detect(weight: Any, tol: float | None) -> tuple[Layer, float]:
    """A layer for `detect`, in float32 where it is in half precision, as rounded factors would not reach the tolerance;
    and the tolerance: the layer's own unless one is given. Raises ModelError as `as_layer` does."""
    layer = as_layer(weight)
    if layer.weight.dtype.name in HALF:
        layer = replace(layer, weight=layer.weight.astype(np.float32), stored=layer.weight.dtype.name)
    return layer, layer.tolerance if tol is None else tol


def largest_rounding(weight: Array, bits: int, least_exponent: int) -> float:
    """The relative Frobenius error of a weight each of whose entries is wrong by half a unit in its last place.

    Zeros count as exact. About 3.5e-4 for float16 (11 bits) and 2.8e-3 for bfloat16 (8 bits); subnormals add to it.
    """
    norm = float(np.linalg.norm(weight.astype(np.float32, copy=False)))
    _, exponents = np.frexp(
        weight[weight != 0]
    )  # |w| = m 2^e with 1/2 <= m < 1: a unit in the last place is 2^(e - bits)
    values, counts = np.unique(np.maximum(exponents, least_exponent + 1), return_counts=True)
    units = float((counts * 4.0 ** (values - bits)).sum())
    return 0.5 * units**0.5 / norm if norm else 0.0


def check_weight(weight: Array, name: str) -> None:
    """Raise ModelError unless the weight is a non-empty array of finite floating-point numbers."""
    if weight.dtype.kind != "f":
        raise ModelError(f"{name}: weights must be floating point, got {weight.dtype}; convert them first")
    if weight.size == 0:
        raise ModelError(f"{name}: weight of shape {weight.shape} is empty; remove the layer")
    if not np.isfinite(weight).all():
        bad = int(np.size(weight) - np.isfinite(weight).sum())
        raise ModelError(f"{name}: weight holds {bad} NaN or Inf values; repair the model before compiling it")
